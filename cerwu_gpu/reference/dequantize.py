r"""From integers to weights: the exact reconstruction rule of docs/format.md.

    W_ij = round_dtype( fl32( fl32(level_ij * step_j) * scale_i ) )

level is the integer itself, grid[q] for a list, and 2q - sgn(q) [state uses quantizer 1] for 2q
under a trellis. Steps and scales are stored as integer codes s and stand for 2**(s/256).
"""

import math

import torch
from torch import Tensor

from cerwu_gpu.spec import STEP_RESOLUTION, TRELLIS_NEXT, TRELLIS_QUANTIZER

_MANTISSAS = [2.0 ** (k / STEP_RESOLUTION) for k in range(STEP_RESOLUTION)]
_POWERS = [2.0**e for e in range(-32768 // STEP_RESOLUTION, 32768 // STEP_RESOLUTION)]

LEAST_CODE = -126 * STEP_RESOLUTION
"""2^-126: below, float32 is subnormal, and one over it is infinite."""


def step_values(codes: Tensor) -> Tensor:
    """The float32 nearest to 2**(s / 256) for every code s (any integer dtype, any shape)."""
    wide = codes.to(torch.int64)
    mantissa = torch.tensor(_MANTISSAS, dtype=torch.float32, device=codes.device)
    power = torch.tensor(_POWERS, dtype=torch.float32, device=codes.device)
    exponent = torch.div(wide, STEP_RESOLUTION, rounding_mode="floor")
    return mantissa[wide - exponent * STEP_RESOLUTION] * power[exponent + len(_POWERS) // 2]


def step_codes(steps: Tensor, unit: int = 1) -> Tensor:
    """The int16 code nearest to each positive step that is a multiple of `unit`.

    No step is chosen below LEAST_CODE, whatever a file may hold.
    """
    exact = steps.to(torch.float64).log2() * (STEP_RESOLUTION / unit)
    return (exact.round() * unit).clamp(LEAST_CODE, 32767).to(torch.int16)


def covering_code(size: float) -> int:
    """The smallest code >= LEAST_CODE whose step is at least `size`; 0 for 0."""
    if size <= 0:
        return 0
    return max(LEAST_CODE, min(32767, math.ceil(math.log2(size) * STEP_RESOLUTION)))


def trellis_states(parity: Tensor, states: int) -> Tensor:
    """State before each symbol [m, n] int64, from the symbols' parity [m, n]; rows start in 0."""
    follow = torch.tensor(TRELLIS_NEXT[states], device=parity.device)
    odd = parity.t().to(torch.int64).contiguous()
    before = torch.empty_like(odd)
    state = torch.zeros_like(odd[0])
    for j in range(odd.shape[0]):
        before[j] = state
        state = follow[state, odd[j]]
    return before.t()


def trellis_quantizers(symbols: Tensor, states: int) -> Tensor:
    """Quantizer, 0 or 1, of each trellis symbol [m, n] int32: [m, n] int64."""
    quantizer = torch.tensor(TRELLIS_QUANTIZER[states], device=symbols.device)
    return quantizer[trellis_states(symbols & 1, states)]


def trellis_levels(symbols: Tensor, states: int, second: Tensor | None = None) -> Tensor:
    """Integer levels [m, n] of trellis symbols [m, n]: 2q, or 2q - sgn(q) in quantizer 1.

    `second` [m, n] bool says which are of quantizer 1, where that is known already.
    """
    if second is None:
        second = trellis_quantizers(symbols, states).bool()
    return 2 * symbols - symbols.sign() * second


def dequantize(
    symbols: Tensor,
    column_step: Tensor,
    row_scale: Tensor,
    *,
    grid: Tensor | None = None,
    states: int = 0,
    second: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The stored weight [m, n] in `dtype`.

    Args:
        symbols: [m, n] int32, integers (positions for a grid).
        column_step: [n] or [1] int16 codes.
        row_scale: [m] or [1] int16 codes.
        grid: [K] float32, or None for integers.
        states: 0, 4 or 8 states of the trellis.
        second: see trellis_levels.
        dtype: what the product is rounded to, once.
    """
    if grid is not None:
        level = grid[symbols]
    elif states:
        level = trellis_levels(symbols, states, second).to(torch.float32)
    else:
        level = symbols.to(torch.float32)
    level = level.mul_(step_values(column_step)[None, :]).mul_(step_values(row_scale)[:, None])
    return level.to(dtype)
