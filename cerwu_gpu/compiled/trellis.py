r"""Trellis quantization of one block of columns, on one core.

`reference.trellis.quantize_block_trellis` defines the result. ROWS rows stand side by side where
survivors are extended, so that the loops over (state, row) become vector instructions; where a
survivor takes over its ancestor's residual, the loop over columns does.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from cerwu_gpu.block_problem import BlockProblem
from cerwu_gpu.spec import TRELLIS_NEXT, TRELLIS_QUANTIZER

ROWS = 8
"""Rows side by side: with 8 states and 160 columns their residuals take 80 KB, twice."""
f32, i32 = np.float32, np.int32
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
"""The interpreter lock is let go; a product and a sum may be rounded once, as on a GPU."""


def quantize_block_trellis(
    problem: BlockProblem, *, states: int, start: Tensor, commit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the first `commit` columns of a block, looking at all of its columns.

    Args:
        problem: on the CPU; rates [T * 2, K + 1], row 2c + quantizer, the last column an escape.
        states: 4 or 8.
        start: [m] int64, the state in which each row enters the block.
        commit: the decisions of later columns are dropped; they only decide which path is best.

    Returns:
        symbols [m, commit] int32, errors x - v [m, commit] float32 and the state [m] int64 after
        column `commit`; of a single problem the former are transposed views of contiguous memory.

    Raises:
        ValueError: an argument's value, shape, type or device does not fit.
    """
    problem.check_trellis(states, start, commit)
    (rows, width), batch = problem.x.shape, problem.batch
    symbols = torch.empty((batch, commit, rows // batch), dtype=torch.int32)
    errors = torch.empty((batch, commit, rows // batch), dtype=torch.float32)
    end = torch.empty(rows, dtype=torch.int64)
    fields = (
        problem.x,
        problem.factor.reshape(batch, width, width),
        problem.row_class,
        problem.column_class.reshape(batch, width),
        problem.lmbda,
        problem.importance.reshape(batch, width),
        problem.curvature.reshape(batch, width),
        start,
        symbols,
        errors,
        end,
        problem.alphabet.rates,
    )
    _search_batch(
        *(field.contiguous().numpy() for field in fields),
        problem.alphabet.lowest,
        problem.alphabet.size,
        *_machine(states),
    )
    if batch == 1:
        return symbols[0].t(), errors[0].t(), end
    return symbols.mT.flatten(0, 1), errors.mT.flatten(0, 1), end


def _machine(states: int) -> tuple[Any, Any, Any]:
    """Return the quantizer [S] float32 of each state, and [2, S] int64 the states that lead to each
    state and the parities of the symbols on the way."""
    ways: list[list[tuple[int, int]]] = [[] for _ in range(states)]
    for state, follow in enumerate(TRELLIS_NEXT[states]):
        for parity in (0, 1):
            ways[follow[parity]].append((state, parity))
    pairs = np.array(ways, dtype=np.int64).transpose(2, 1, 0)
    quantizer = np.array(TRELLIS_QUANTIZER[states], dtype=np.float32)
    return quantizer, np.ascontiguousarray(pairs[0]), np.ascontiguousarray(pairs[1])


@njit(**OPTIONS)
def _as_integer(x):
    """Return x as int32, as a CPU converts it: the least one where it does not fit."""
    return i32(x) if abs(x) < f32(2147483648) else i32(-2147483648)


@njit(**OPTIONS)
def _nearest(magnitude, offset, parity):
    """Return the symbol >= 0 of a parity whose level is nearest, and the next toward zero."""
    quarter = (magnitude + (offset - f32(2) * parity)) * f32(0.25)
    outer = f32(2) * max(np.rint(quarter), f32(0)) + parity
    return outer, max(outer - f32(2), parity)


@njit(**OPTIONS)
def _place(symbol, lowest, size):
    """Return the column of a symbol in the rates; outside, and for nan, that of the escape."""
    place = symbol - lowest
    return i32(place if (place >= f32(0)) & (place < size) else size)


@njit(**OPTIONS)
def _places(v, offset, base, parity, lowest, size, places):
    """Find where the rates of the candidates [2, survivors] of one parity are."""
    for i in range(len(v)):
        sign = f32(-1) if v[i] < 0 else f32(1)
        outer, inner = _nearest(abs(v[i]), offset[i], parity)
        places[0, i] = base[i] + _place(outer * sign, lowest, size)
        places[1, i] = base[i] + _place(inner * sign, lowest, size)


@njit(**OPTIONS)
def _cost(magnitude, symbol, offset, omega, beta):
    """Return the cost of the level of a symbol >= 0, without its bits."""
    level = f32(2) * symbol - (offset if symbol > 0 else f32(0))
    distance = magnitude - level
    return (distance * distance - beta * (level * level)) * omega


@njit(**OPTIONS)
def _decide(v, offset, price, bits, parity, omega, beta, decided):
    """Choose the better candidate of one parity; `decided` gets cost and symbol [2, survivors]."""
    for i in range(len(v)):
        magnitude, sign = abs(v[i]), f32(-1) if v[i] < 0 else f32(1)
        outer, inner = _nearest(magnitude, offset[i], parity)
        first = _cost(magnitude, outer, offset[i], omega, beta) + price[i] * bits[0, i]
        second = _cost(magnitude, inner, offset[i], omega, beta) + price[i] * bits[1, i]
        better = second < first
        decided[0, i] = second if better else first
        decided[1, i] = (inner if better else outer) * sign


@njit(**OPTIONS)
def _arrive(total, v, even, odd, state_a, state_b, offset_a, offset_b, arrived):
    """Choose the better of two ways into a state: [4, ROWS] cost, symbol, error, ancestor.

    `even` and `odd` are the decisions [2, ROWS] of survivors state_a and state_b on the way there.
    """
    for r in range(ROWS):
        way_a, way_b = total[state_a, r] + even[0, r], total[state_b, r] + odd[0, r]
        second = way_b < way_a
        symbol = odd[1, r] if second else even[1, r]
        sign = f32(1) if symbol > 0 else (f32(-1) if symbol < 0 else f32(0))
        level = f32(2) * symbol - (offset_b if second else offset_a) * sign
        arrived[0, r] = way_b if second else way_a
        arrived[1, r] = symbol
        arrived[2, r] = (v[state_b, r] if second else v[state_a, r]) - level
        arrived[3, r] = f32(state_b if second else state_a)


@njit(**OPTIONS)
def _less_effect(source, error, effect, target):
    """Set target = source - error * effect, all [k]."""
    for k in range(len(target)):
        target[k] = source[k] - error * effect[k]


@njit(cache=True, **OPTIONS)
def _search(
    x,
    factor,
    row_class,
    column_class,
    lmbda,
    importance,
    curvature,
    start,
    symbols,
    errors,
    end,
    rates,
    lowest,
    size,
    quantizer,
    before,
    parity,
):
    """Extend the survivors of all rows over the columns, and trace the best ones back."""
    rows, columns = x.shape
    commit, states = len(symbols), len(quantizer)
    stride, flat = rates.shape[1], rates.reshape(-1)
    low, extent = f32(lowest), f32(size)
    survivors = states * ROWS
    residual = np.empty((2, ROWS, states, columns), np.float32)
    v, offset = np.empty((states, ROWS), np.float32), np.empty((states, ROWS), np.float32)
    base, price = np.empty((states, ROWS), np.int32), np.empty((states, ROWS), np.float32)
    total = np.empty((states, ROWS), np.float32)
    places, bits = np.empty((2, survivors), np.int32), np.empty((2, survivors), np.float32)
    decided = np.empty((2, 2, states, ROWS), np.float32)
    path = np.empty((columns, states, 4, ROWS), np.float32)
    for s in range(states):
        offset[s] = quantizer[s]
    for first in range(0, rows, ROWS):
        count = min(ROWS, rows - first)
        for r in range(ROWS):
            row = first + min(r, count - 1)  # the last row is repeated, and dropped
            for s in range(states):
                residual[0, r, s] = x[row]
                total[s, r] = f32(0) if start[row] == s else f32(np.inf)
                price[s, r] = lmbda[row]
        now = 0
        for j in range(columns):
            for r in range(ROWS):
                table = 2 * (row_class[first + min(r, count - 1)] + column_class[j])
                for s in range(states):
                    v[s, r] = residual[now, r, s, j]
                    base[s, r] = (table + i32(quantizer[s])) * stride
            omega, beta = importance[j] * f32(0.5), curvature[j]
            for p in range(2):
                odd = f32(p)
                _places(
                    v.reshape(-1), offset.reshape(-1), base.reshape(-1), odd, low, extent, places
                )
                for candidate in range(2):
                    for i in range(survivors):
                        bits[candidate, i] = flat[places[candidate, i]]
                _decide(
                    v.reshape(-1),
                    offset.reshape(-1),
                    price.reshape(-1),
                    bits,
                    odd,
                    omega,
                    beta,
                    decided[p].reshape(2, -1),
                )
            for s in range(states):
                a, b = before[0, s], before[1, s]
                _arrive(
                    total,
                    v,
                    decided[parity[0, s], :, a],
                    decided[parity[1, s], :, b],
                    a,
                    b,
                    quantizer[a],
                    quantizer[b],
                    path[j, s],
                )
            for s in range(states):
                total[s] = path[j, s, 0]
                for r in range(ROWS):
                    _less_effect(
                        residual[now, r, int(path[j, s, 3, r]), j + 1 :],
                        path[j, s, 2, r],
                        factor[j, j + 1 :],
                        residual[1 - now, r, s, j + 1 :],
                    )
            now = 1 - now
        for r in range(count):
            state = 0
            for s in range(1, states):
                if total[s, r] < total[state, r]:
                    state = s
            for j in range(columns - 1, -1, -1):
                if j == commit - 1:
                    end[first + r] = state
                if j < commit:
                    symbols[j, first + r] = _as_integer(path[j, state, 1, r])
                    errors[j, first + r] = path[j, state, 2, r]
                state = int(path[j, state, 3, r])


@njit(cache=True, **OPTIONS)
def _search_batch(
    x,
    factor,
    row_class,
    column_class,
    lmbda,
    importance,
    curvature,
    start,
    symbols,
    errors,
    end,
    rates,
    lowest,
    size,
    quantizer,
    before,
    parity,
):
    """Do `_search` for each problem of a batch: its rows stand below those of the one before."""
    height = len(x) // len(factor)
    for b in range(len(factor)):
        first, last = b * height, (b + 1) * height
        _search(
            x[first:last],
            factor[b],
            row_class[first:last],
            column_class[b],
            lmbda[first:last],
            importance[b],
            curvature[b],
            start[first:last],
            symbols[b],
            errors[b],
            end[first:last],
            rates,
            lowest,
            size,
            quantizer,
            before,
            parity,
        )
