"""Shared parts of the benchmarks: sizes of a run, forcing a form, rows with times."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cerwu_gpu import backend

Row = dict[str, Any]
"""Fields section, case, what; median, low and high (20 % and 80 %) in seconds; derived figures."""


class Mismatch(Exception):
    """Difference between a kernel's result and its definition's."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the cases of a run.

    Attributes:
        sides, levels: sides of the square matrices, and |G|, of the passes.
        coded: (m, n) of the coded matrix.
        copies: number of its copies that are decoded together.
        moments: (p, n) of the inputs of a Hessian.
        models: names in MODELS.
    """

    sides: tuple[int, ...]
    levels: tuple[int, ...]
    coded: tuple[int, int]
    copies: int
    moments: tuple[int, int]
    models: tuple[str, ...]


FULL = Sizes(
    sides=(512, 1024, 2048, 4096, 8192),
    levels=(16, 33, 64, 256, 1024),
    coded=(4096, 4096),
    copies=6,
    moments=(8192, 4096),
    models=("Pythia-70M", "Llama-3.2-1B", "Llama-3.1-8B"),
)
TINY = Sizes((12,), (5,), (4, 5), 2, (20, 24), ("toy",))


@contextmanager
def form(name: str) -> Iterator[None]:
    """Run the operations of the backend as `torch` or as `triton` inside the context."""
    before = os.environ.get(backend.VARIABLE)
    os.environ[backend.VARIABLE] = name
    try:
        yield
    finally:
        del os.environ[backend.VARIABLE]
        if before is not None:
            os.environ[backend.VARIABLE] = before


def timed(section: str, case: str, what: str, run: Callable[[], object], **figures: Any) -> Row:
    """Return a row with the median of many runs on a warm GPU."""
    from triton.testing import do_bench

    median, low, high = (ms / 1e3 for ms in do_bench(run, quantiles=(0.5, 0.2, 0.8)))
    spread = {"median": median, "low": low, "high": high}
    return {"section": section, "case": case, "what": what, **spread, **figures}


def placed(thing: Any, device: torch.device) -> Any:
    """Return a dataclass with its tensors on `device`."""
    fields = {k: v.to(device) if torch.is_tensor(v) else v for k, v in vars(thing).items()}
    return type(thing)(**fields)
