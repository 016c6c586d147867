"""Kernel or reference, per operation: the only place that asks where the tensors are.

Tensors on a CUDA device go to the Triton kernels, all others to the plain torch form. The
environment variable CERWU_GPU_BACKEND=torch|triton forces one form; off CUDA devices Triton works
only in its interpreter (TRITON_INTERPRET=1). Triton is imported when the first kernel runs.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from cerwu_gpu.errors import ConfigError
from cerwu_gpu.reference import ans, hessian, obs, trellis, weights
from cerwu_gpu.reference.coded import CodedMatrix
from cerwu_gpu.reference.dequantize import step_values
from cerwu_gpu.reference.weights import Reconstruction

__all__ = [
    "accumulate_hessian",
    "decode",
    "decode_weights",
    "quantize_block",
    "quantize_block_trellis",
]

VARIABLE = "CERWU_GPU_BACKEND"

P = ParamSpec("P")
R = TypeVar("R")


def _takes_kernel(device: torch.device, *, measured: bool = True) -> bool:
    """Whether a kernel works on tensors of this device; one that was not measured must be forced.

    Raises:
        ConfigError: CERWU_GPU_BACKEND has an unknown value, or forces what is impossible.
    """
    wish = os.environ.get(VARIABLE, "")
    if wish not in ("", "torch", "triton"):
        raise ConfigError(f"{VARIABLE} is {wish!r}: set it to torch or triton, or unset it.")
    if wish == "torch" or (wish == "" and not (measured and device.type == "cuda")):
        return False
    if find_spec("triton") is None:
        if wish == "triton":
            raise ConfigError(f"{VARIABLE} is triton, which is not installed: pip install triton.")
        warnings.warn("Triton is not installed: the slower torch forms run.", stacklevel=4)
        return False
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"{VARIABLE} is triton, but the tensors are on device {device}: unset it, or set "
            "TRITON_INTERPRET=1 for Triton's (very slow) interpreter."
        )
    return True


def _kernel(family: str, name: str, device: torch.device) -> Callable[..., Any]:
    """What kernels/<family>.py has under this name, started on `device`."""
    kernel: Callable[..., Any] = getattr(import_module(f"cerwu_gpu.kernels.{family}"), name)

    def run(*arguments: Any, **options: Any) -> Any:
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return kernel(*arguments, **options)

    return run


def _operation(reference: Callable[P, R], *, measured: bool = True) -> Callable[P, R]:
    """`reference`, or the kernel of its name and module, by the device of the first argument."""
    family = reference.__module__.rpartition(".")[2]

    @wraps(reference)
    def operation(*arguments: P.args, **options: P.kwargs) -> R:
        first: Any = arguments[0]
        if not _takes_kernel(first.device, measured=measured):
            return reference(*arguments, **options)
        kernel = _kernel(family, reference.__name__, first.device)
        result: R = kernel(*arguments, **options)
        return result

    return operation


quantize_block = _operation(obs.quantize_block)
quantize_block_trellis = _operation(trellis.quantize_block_trellis)
accumulate_hessian = _operation(hessian.accumulate_hessian, measured=False)


def decode(batch: Sequence[CodedMatrix]) -> list[Tensor]:
    """reference.ans.decode or its kernel: the symbols [m, n] int32 of all matrices."""
    if not batch or not _takes_kernel(batch[0].words.device):
        return ans.decode(batch)
    decoded: list[Tensor] = _kernel("ans", "decode", batch[0].words.device)(batch)
    return decoded


def decode_weights(
    batch: Sequence[CodedMatrix], rules: Sequence[Reconstruction], dtype: torch.dtype
) -> list[Tensor]:
    """reference.weights.decode_weights or its kernel: the weights [m, n] of all matrices."""
    if not batch or not _takes_kernel(batch[0].words.device):
        return weights.decode_weights(batch, rules, dtype)
    steps = [rule.column_step.expand(m.shape[1]) for m, rule in zip(batch, rules, strict=True)]
    scales = [rule.row_scale.expand(m.shape[0]) for m, rule in zip(batch, rules, strict=True)]
    kernel = _kernel("ans", "decode_weights", batch[0].words.device)
    decoded: list[Tensor] = kernel(
        batch, rules, step_values(torch.cat(steps)), step_values(torch.cat(scales)), dtype
    )
    return decoded
