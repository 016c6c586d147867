"""Watches what an interpreted kernel reads and writes: every address must be of its arguments."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch


@dataclass
class Accesses:
    """How many elements were loaded and stored, and how many of them outside of the tensors."""

    count: int = 0
    outside: int = 0
    bounds: list[tuple[int, int]] = field(default_factory=list)

    def permit(self, addresses: Any, mask: Any) -> Any:
        """`mask` without the addresses that are not the kernel's to touch."""
        wanted, inside = np.asarray(mask), np.zeros(np.shape(mask), dtype=bool)
        for first, last in self.bounds:
            inside |= (addresses >= first) & (addresses < last)
        self.count += int(wanted.sum())
        self.outside += int((wanted & ~inside).sum())
        return wanted & inside


@contextmanager
def guarded(module: ModuleType, kernel: str) -> Iterator[Accesses]:
    """While this is open, launches of module.kernel reach their own tensors only.

    It works in the interpreter alone; a test that uses it is skipped on a GPU.
    """
    if torch.cuda.is_available():
        pytest.skip("addresses can be watched in the interpreter only")
    from triton.runtime import interpreter

    accesses = Accesses()
    true_kernel, true_builder = getattr(module, kernel), interpreter._interpreter

    class Launcher:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*arguments: Any, **options: Any) -> Any:
                for tensor in filter(torch.is_tensor, arguments):
                    first = tensor.data_ptr()
                    last = first + tensor.numel() * tensor.element_size()
                    accesses.bounds.append((first, last))
                return true_kernel[grid](*arguments, **options)

            return launch

    class Memory:
        def load(self, addresses: Any, mask: Any, *rest: Any) -> Any:
            return true_builder.load(addresses, accesses.permit(addresses, mask), *rest)

        def store(self, addresses: Any, values: Any, mask: Any) -> Any:
            return true_builder.store(addresses, values, accesses.permit(addresses, mask))

        def __getattr__(self, name: str) -> Any:
            return getattr(true_builder, name)

    with (
        patch.object(module, kernel, Launcher()),
        patch.object(interpreter, "_interpreter", Memory()),
    ):
        yield accesses
