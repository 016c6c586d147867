"""Kernel, compiled or reference, per operation: the place that chooses by where the tensors are.

Tensors on a CUDA device go to the Triton kernels, those on the CPU to the forms that numba
compiles, all others to the plain torch form. The environment variable
CERWU_GPU_BACKEND=torch|numba|triton forces one form; off CUDA devices Triton works only in its
interpreter (TRITON_INTERPRET=1). Triton and numba are imported when their first operation runs.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from cerwu_gpu.block_problem import BlockProblem
from cerwu_gpu.coded import CodedMatrix, Reconstruction
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.reference import ans, counts, hessian, obs, trellis, weights
from cerwu_gpu.reference import dequantize as levels

__all__ = [
    "accumulate_hessian",
    "decode",
    "decode_weights",
    "dequantize",
    "form",
    "quantize_block",
    "quantize_block_trellis",
    "symbol_counts",
    "trellis_quantizers",
]

Form = Literal["torch", "numba", "triton"]

VARIABLE = "CERWU_GPU_BACKEND"


def quantize_block(problem: BlockProblem, *, exhaustive: bool) -> tuple[Tensor, Tensor]:
    """Quantize the columns of one block: reference.obs.quantize_block, or its faster forms."""
    run = _form_of("obs", obs.quantize_block, problem.x.device)
    symbols, errors = run(problem, exhaustive=exhaustive)
    return symbols, errors


def quantize_block_trellis(
    problem: BlockProblem, *, states: int, start: Tensor, commit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a block under a trellis: reference.trellis.quantize_block_trellis, or its faster
    forms."""
    run = _form_of("trellis", trellis.quantize_block_trellis, problem.x.device)
    symbols, errors, end = run(problem, states=states, start=start, commit=commit)
    return symbols, errors, end


def decode(batch: Sequence[CodedMatrix]) -> list[Tensor]:
    """Decode the symbols [m, n] int32 of all matrices: reference.ans.decode, or a faster form."""
    if not batch:
        return []
    decoded: list[Tensor] = _form_of("ans", ans.decode, batch[0].words.device)(batch)
    return decoded


def decode_weights(
    batch: Sequence[CodedMatrix],
    rules: Sequence[Reconstruction],
    dtype: torch.dtype,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Decode the weights [m, n] of all matrices: reference.weights.decode_weights, or its faster
    forms."""
    if not batch:
        return []
    run = _form_of("ans", weights.decode_weights, batch[0].words.device)
    decoded: list[Tensor] = run(batch, rules, dtype, out)
    return decoded


def symbol_counts(
    symbols: Tensor,
    row_class: Tensor,
    column_class: Tensor,
    *,
    tables: int,
    lowest: int,
    size: int,
    escapes: int,
    second: Tensor | None = None,
) -> Tensor:
    """Count the symbols under each table: reference.counts.symbol_counts, or its faster form."""
    run = _form_of("counts", counts.symbol_counts, symbols.device, kernel=False)
    alphabet = {"lowest": lowest, "size": size, "escapes": escapes}
    counted: Tensor = run(
        symbols, row_class, column_class, tables=tables, second=second, **alphabet
    )
    return counted


def dequantize(
    symbols: Tensor,
    column_step: Tensor,
    row_scale: Tensor,
    *,
    grid: Tensor | None = None,
    second: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the stored weights: reference.dequantize.dequantize, or its faster form."""
    run = _form_of("dequantize", levels.dequantize, symbols.device, kernel=False)
    weight: Tensor = run(symbols, column_step, row_scale, grid=grid, second=second, dtype=dtype)
    return weight


def trellis_quantizers(symbols: Tensor, states: int) -> Tensor:
    """Return the symbols of the second quantizer: reference.dequantize.trellis_quantizers, or its
    faster form."""
    run = _form_of("dequantize", levels.trellis_quantizers, symbols.device, kernel=False)
    second: Tensor = run(symbols, states)
    return second


def accumulate_hessian(total: Tensor, inputs: Tensor) -> None:
    """Add X^T X to `total`: reference.hessian.accumulate_hessian, whose matrix product is as fast
    as any; the kernel has to be forced."""
    run: Callable[[Tensor, Tensor], None] = hessian.accumulate_hessian
    if _wish() == "triton":
        run = _form_of("hessian", hessian.accumulate_hessian, total.device)
    run(total, inputs)


def _form_of(
    family: str, reference: Callable[..., Any], device: torch.device, *, kernel: bool = True
) -> Callable[..., Any]:
    """Return the operation in the form for this device, from compiled/<family> or kernels/<family>.

    Args:
        kernel: there is one; on a GPU the torch form takes its place otherwise.

    Raises:
        ConfigError: CERWU_GPU_BACKEND has an unknown value, or forces an impossible form.
    """
    chosen = form(device, kernel=kernel)
    if chosen == "triton":
        return _kernel(family, reference.__name__, device)
    if chosen == "numba":
        return _or_reference(_forced_compiled(family, reference.__name__, device), reference)
    return reference


def form(device: torch.device, *, kernel: bool = True) -> Form:
    """Return the form of an operation on this device; `kernel`: there is one in Triton.

    Raises:
        ConfigError: CERWU_GPU_BACKEND has an unknown value.
    """
    wish = _wish()
    if wish is not None:
        return "torch" if wish == "triton" and not kernel else wish
    if device.type == "cpu" and not isinstance(_compiled(), str):
        return "numba"
    if device.type == "cuda" and kernel:
        if find_spec("triton") is not None:
            return "triton"
        warnings.warn("Triton is not installed: the slower torch forms run.", stacklevel=5)
    return "torch"


def _wish() -> Form | None:
    """Return the form that the environment forces, if any."""
    wish = os.environ.get(VARIABLE, "")
    if wish not in ("", "torch", "numba", "triton"):
        raise ConfigError(f"{VARIABLE} is {wish!r}: set it to torch, numba or triton, or unset it.")
    return wish or None  # type: ignore[return-value]


def _kernel(family: str, name: str, device: torch.device) -> Callable[..., Any]:
    """Return the operation of kernels/<family>.py, started on `device`."""
    if find_spec("triton") is None:
        raise ConfigError(f"{VARIABLE} is triton, which is not installed: pip install triton.")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"{VARIABLE} is triton, but the tensors are on device {device}: unset it, or set "
            "TRITON_INTERPRET=1 for Triton's (very slow) interpreter."
        )
    kernel: Callable[..., Any] = getattr(import_module(f"cerwu_gpu.kernels.{family}"), name)

    def run(*arguments: Any, **options: Any) -> Any:
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return kernel(*arguments, **options)

    return run


def _forced_compiled(family: str, name: str, device: torch.device) -> Callable[..., Any]:
    """Return the operation of compiled/<family>.py."""
    if device.type != "cpu":
        raise ConfigError(
            f"{VARIABLE} is numba, but the tensors are on device {device}: unset it, or work on "
            "the CPU."
        )
    modules = _compiled()
    if isinstance(modules, str):
        raise ConfigError(f"{VARIABLE} is numba, which does not work here ({modules}).")
    operation: Callable[..., Any] = getattr(modules[family], name)
    return operation


def _or_reference(
    compiled: Callable[..., Any], reference: Callable[..., Any]
) -> Callable[..., Any]:
    """Return the compiled operation; where numba cannot keep what it compiled, as on a full disk,
    `reference` computes that result. Later calls take what is compiled in memory."""

    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return compiled(*arguments, **options)
        except OSError as error:
            _warn_of_cache(error.strerror or str(error))
            return reference(*arguments, **options)

    return run


@cache
def _warn_of_cache(reason: str) -> None:
    """Warn, once for each reason, that the cache cannot be written."""
    warnings.warn(
        f"numba cannot write its cache ({reason}): make room, or set NUMBA_CACHE_DIR to a "
        "directory that can be written. Until then the first steps run in the torch forms, many "
        "times slower, and each process compiles anew.",
        stacklevel=5,
    )


@cache
def _compiled() -> dict[str, ModuleType] | str:
    """Return the modules of compiled/ by name, or why there are none, of which the first call
    warns."""
    try:
        names = ("obs", "trellis", "ans", "counts", "dequantize")
        return {name: import_module(f"cerwu_gpu.compiled.{name}") for name in names}
    except ImportError as error:
        reason = f"{error}; pip install numba"
    except RuntimeError as error:  # of numba, where no cache directory can be written
        reason = f"{error}; set NUMBA_CACHE_DIR to a directory that can be written"
    warnings.warn(
        f"The compiled forms cannot run ({reason}): the torch forms do, many times slower.",
        stacklevel=5,
    )
    return reason
