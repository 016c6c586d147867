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
    """Return the state [m, n] int64 before each symbol, by their parities; rows start in 0."""
    follow = torch.tensor(TRELLIS_NEXT[states], device=parity.device)
    columns = parity.t().to(torch.int64).contiguous()
    before = torch.empty_like(columns)
    state = torch.zeros_like(columns[0])
    for j in range(len(columns)):
        before[j] = state
        state = follow[state, columns[j]]
    return before.t()


def trellis_quantizers(symbols: Tensor, states: int) -> Tensor:
    """Return which trellis symbols [m, n] int32 belong to the second quantizer: [m, n] bool."""
    second = torch.tensor(TRELLIS_QUANTIZER[states], dtype=torch.bool, device=symbols.device)
    return second[trellis_states(symbols & 1, states)]


def trellis_levels(symbols: Tensor, second: Tensor) -> Tensor:
    """Return the levels [m, n] of trellis symbols [m, n]: 2q, or 2q - sgn(q) where `second`."""
    return 2 * symbols - symbols.sign() * second


def dequantize(
    symbols: Tensor,
    column_step: Tensor,
    row_scale: Tensor,
    *,
    grid: Tensor | None = None,
    second: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the stored weight [m, n] in `dtype`.

    Args:
        symbols: [m, n] int32, integers (positions for a grid).
        column_step: [n] or [1] int16 codes.
        row_scale: [m] or [1] int16 codes.
        grid: [K] float32, or None for integers.
        second: [m, n] bool, as `trellis_quantizers` returns it; None without a trellis.
        dtype: the dtype that the product is rounded to, once.
    """
    if grid is not None:
        level = grid[symbols]
    elif second is not None:
        level = trellis_levels(symbols, second).to(torch.float32)
    else:
        level = symbols.to(torch.float32)
    level = level.mul_(step_values(column_step)[None, :]).mul_(step_values(row_scale)[:, None])
    return level.to(dtype)
