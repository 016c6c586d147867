r"""From integers to weights: the exact reconstruction rule of docs/format.md.

    W_ij = round_dtype( fl32( fl32(level_ij * step_j) * scale_i ) )

level is the integer itself, grid[q] for a list, and 2q - sgn(q) [state uses quantizer 1] for 2q
under a trellis. Steps and scales are stored as integer codes s and stand for 2**(s/256).
"""

import torch
from torch import Tensor

from cerwu_gpu.spec import TRELLIS_NEXT, TRELLIS_QUANTIZER
from cerwu_gpu.steps import step_values


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
