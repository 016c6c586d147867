"""From integers to weights on one core; `reference.dequantize` defines every bit of them."""

# mypy: allow-untyped-decorators, allow-untyped-defs

import numpy as np
import torch
from numba import njit
from torch import Tensor

from cerwu_gpu.spec import TRELLIS_NEXT, TRELLIS_QUANTIZER
from cerwu_gpu.steps import step_values

f32, i64 = np.float32, np.int64


def dequantize(
    symbols: Tensor,
    column_step: Tensor,
    row_scale: Tensor,
    *,
    grid: Tensor | None = None,
    second: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the stored weight [m, n] in `dtype`; see `reference.dequantize.dequantize`."""
    m, n = symbols.shape
    weight = torch.empty(m, n, dtype=torch.float32)
    steps = step_values(column_step).expand(n).contiguous().numpy()
    scales = step_values(row_scale).expand(m).contiguous().numpy()
    integers = symbols.contiguous().numpy()
    if grid is not None:
        _scale_listed(integers, grid.contiguous().numpy(), steps, scales, weight.numpy())
    elif second is not None:
        _scale_trellis(integers, second.contiguous().numpy(), steps, scales, weight.numpy())
    else:
        _scale(integers, steps, scales, weight.numpy())
    return weight.to(dtype)


def trellis_quantizers(symbols: Tensor, states: int) -> Tensor:
    """Return which symbols [m, n] belong to a trellis's second quantizer: [m, n] bool; see
    `reference.dequantize.trellis_quantizers`."""
    second = torch.empty(symbols.shape, dtype=torch.bool)
    follow = np.array(TRELLIS_NEXT[states], np.int64)
    quantizer = np.array(TRELLIS_QUANTIZER[states], np.bool_)
    _walk(symbols.contiguous().numpy(), follow, quantizer, second.numpy())
    return second


@njit(cache=True, nogil=True, error_model="numpy")
def _walk(symbols, follow, quantizer, second):
    rows, columns = symbols.shape
    for i in range(rows):
        state = 0
        for j in range(columns):
            second[i, j] = quantizer[state]
            state = follow[state, i64(symbols[i, j]) & 1]


@njit(cache=True, nogil=True, error_model="numpy")
def _scale(integers, steps, scales, weight):
    for i in range(len(integers)):
        row, target, scale = integers[i], weight[i], scales[i]
        for j in range(len(row)):
            target[j] = f32(f32(row[j]) * steps[j]) * scale


@njit(cache=True, nogil=True, error_model="numpy")
def _scale_listed(positions, levels, steps, scales, weight):
    rows, columns = positions.shape
    for i in range(rows):
        for j in range(columns):
            weight[i, j] = f32(levels[positions[i, j]] * steps[j]) * scales[i]


@njit(cache=True, nogil=True, error_model="numpy")
def _scale_trellis(symbols, second, steps, scales, weight):
    rows, columns = symbols.shape
    for i in range(rows):
        for j in range(columns):
            symbol = i64(symbols[i, j])
            sign = i64(symbol > 0) - i64(symbol < 0)
            level = 2 * symbol - i64(second[i, j]) * sign
            weight[i, j] = f32(f32(level) * steps[j]) * scales[i]
