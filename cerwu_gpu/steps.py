"""Codes of steps and scales: s stands for 2**(s / STEP_RESOLUTION), rounded once to float32."""

import math

import torch
from torch import Tensor

from cerwu_gpu.spec import STEP_RESOLUTION

_VALUES = torch.tensor(
    [2.0 ** (k / STEP_RESOLUTION) for k in range(STEP_RESOLUTION)], dtype=torch.float32
).repeat(65536 // STEP_RESOLUTION) * torch.tensor(
    [2.0**e for e in range(-32768 // STEP_RESOLUTION, 32768 // STEP_RESOLUTION)],
    dtype=torch.float32,
).repeat_interleave(STEP_RESOLUTION)
"""Values of the codes -32768 ... 32767; a mantissa times a power of two is rounded once."""

LEAST_CODE = -126 * STEP_RESOLUTION
"""2^-126: below, float32 is subnormal, and one over it is infinite."""


def step_values(codes: Tensor) -> Tensor:
    """Return the float32 nearest to 2**(s / 256) for every code s (any integer dtype and shape)."""
    return _VALUES.to(codes.device)[codes.to(torch.int32) + 32768]


def step_codes(steps: Tensor, unit: int = 1) -> Tensor:
    """Return the int16 code nearest to each positive step that is a multiple of `unit`.

    No step is chosen below LEAST_CODE, whatever a file may hold.
    """
    exact = steps.to(torch.float64).log2() * (STEP_RESOLUTION / unit)
    return (exact.round() * unit).clamp(LEAST_CODE, 32767).to(torch.int16)


def covering_code(size: float) -> int:
    """Return the smallest code >= LEAST_CODE whose step is at least `size`; 0 for 0."""
    if size <= 0:
        return 0
    return max(LEAST_CODE, min(32767, math.ceil(math.log2(size) * STEP_RESOLUTION)))
