r"""Trellis quantization of one block of columns, on one core.

`reference.trellis.quantize_block_trellis` defines the result. ROWS rows stand side by side in the
innermost loops, which LLVM turns into vector instructions; a survivor chooses row by row between
the residuals of its two possible ancestors.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from cerwu_gpu.block_problem import BlockProblem
from cerwu_gpu.spec import TRELLIS_NEXT, TRELLIS_QUANTIZER

ROWS = 32
"""Rows side by side; fewer are not vectorised, and more leave the second cache: 8 states' residuals
of 160 columns take 160 KB, twice."""
AHEAD = 4
"""Columns whose residuals are updated together; `_take_over` names each."""
f32, i32, u32, u64 = np.float32, np.int32, np.uint32, np.uint64
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
"""The interpreter lock is let go; a product and a sum may be rounded once, as on a GPU."""


def quantize_block_trellis(
    problem: BlockProblem, *, states: int, start: Tensor, commit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the first `commit` columns of a block, looking at all of its columns.

    Args:
        problem: on the CPU; rates [T * 2, K + 1], row 2c + quantizer, the last column an escape.
        states: 4, 8, 16 or 32.
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
        problem.x.reshape(batch, len(problem.x) // batch, width).mT,
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
    return u32(place if (place >= f32(0)) & (place < size) else size)


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
def _decide(v, offset, price, bits, parity, omega, beta, cost, symbol):
    """Choose the better candidate of one parity: its cost and symbol, [2, survivors]."""
    odd = f32(parity)
    for i in range(len(v)):
        magnitude, sign = abs(v[i]), f32(-1) if v[i] < 0 else f32(1)
        outer, inner = _nearest(magnitude, offset[i], odd)
        first = _cost(magnitude, outer, offset[i], omega, beta) + price[i] * bits[0, i]
        second = _cost(magnitude, inner, offset[i], omega, beta) + price[i] * bits[1, i]
        better = second < first
        cost[parity, i] = second if better else first
        symbol[parity, i] = (inner if better else outer) * sign


@njit(**OPTIONS)
def _error(v, symbol, offset):
    """Return v less the level of a symbol."""
    sign = f32(symbol > 0) - f32(symbol < 0)
    return v - (f32(2) * symbol - offset * sign)


@njit(**OPTIONS)
def _arrive(total, v, cost, symbol, ways, offset_a, offset_b, came, path, j, s):
    """Choose the better of two ways into state s: [4, ROWS] cost, symbol, error, ancestor; `came`
    says where it is the second. `ways` has both ancestors, and the parities on the way."""
    state_a, state_b, odd_a, odd_b = ways
    a, b = u64(state_a * ROWS), u64(state_b * ROWS)
    for row in range(ROWS):
        r = u64(row)
        way_a = total[a + r] + cost[odd_a, a + r]
        way_b = total[b + r] + cost[odd_b, b + r]
        symbol_a, symbol_b = symbol[odd_a, a + r], symbol[odd_b, b + r]
        error_a, error_b = (
            _error(v[a + r], symbol_a, offset_a),
            _error(v[b + r], symbol_b, offset_b),
        )
        second = way_b < way_a
        came[r] = second
        path[j, s, 0, r] = way_b if second else way_a
        path[j, s, 1, r] = symbol_b if second else symbol_a
        path[j, s, 2, r] = error_b if second else error_a
        path[j, s, 3, r] = f32(state_b if second else state_a)


@njit(**OPTIONS)
def _take_over(old, new, a, b, came, path, j, s, effect):
    """Set the residuals of state s after column j: those of the ancestor, state b where `came` says
    so and else a, less the effect [columns + AHEAD] of its error."""
    columns = u64(len(old) // (ROWS * path.shape[1]))
    start_a, start_b, start = u64(a) * columns, u64(b) * columns, u64(s) * columns
    for k in range(j + 1, len(path), AHEAD):
        w, x, y, z = effect[k], effect[k + 1], effect[k + 2], effect[k + 3]
        at_a, at_b = u64(ROWS) * (start_a + u64(k)), u64(ROWS) * (start_b + u64(k))
        at = u64(ROWS) * (start + u64(k))
        for row in range(ROWS):
            r = u64(row)
            error, second = path[j, s, 2, r], came[r]
            # Loads without a condition: LLVM makes vectors of no others.
            a_w, a_x = old[at_a + r], old[at_a + r + u64(ROWS)]
            a_y, a_z = old[at_a + r + u64(2 * ROWS)], old[at_a + r + u64(3 * ROWS)]
            b_w, b_x = old[at_b + r], old[at_b + r + u64(ROWS)]
            b_y, b_z = old[at_b + r + u64(2 * ROWS)], old[at_b + r + u64(3 * ROWS)]
            new[at + r] = (b_w if second else a_w) - error * w
            new[at + r + u64(ROWS)] = (b_x if second else a_x) - error * x
            new[at + r + u64(2 * ROWS)] = (b_y if second else a_y) - error * y
            new[at + r + u64(3 * ROWS)] = (b_z if second else a_z) - error * z


@njit(**OPTIONS)
def _load(source, first, count, target):
    """Copy rows first ... first + count - 1 side by side; fill the rest of ROWS with 0."""
    for r in range(count):
        target[r] = source[first + r]
    for r in range(count, ROWS):
        target[r] = 0


@njit(**OPTIONS)
def _trace_back(path, state, first, count, symbols, errors, end):
    """Follow the paths that end in the states [ROWS], and keep what is committed of them."""
    for j in range(len(path) - 1, -1, -1):
        if j == len(symbols) - 1:
            end[first : first + count] = state[:count]
        for r in range(count):
            s = state[r]
            if j < len(symbols):
                symbols[j, first + r] = _as_integer(path[j, s, 1, r])
                errors[j, first + r] = path[j, s, 2, r]
            state[r] = np.int64(path[j, s, 3, r])


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
    columns, rows = x.shape
    states = len(quantizer)
    stride, flat = rates.shape[1], rates.reshape(-1)
    low, extent = f32(lowest), f32(size)
    survivors = states * ROWS
    # Residuals before and after a column, state by state and column by column.
    old = np.zeros(states * (columns + AHEAD) * ROWS, np.float32)
    new, effect = np.zeros_like(old), np.zeros(columns + AHEAD, np.float32)
    v, offset = np.empty(survivors, np.float32), np.empty(survivors, np.float32)
    base, price = np.empty(survivors, np.uint32), np.empty(survivors, np.float32)
    row_base, came = np.empty(ROWS, np.uint32), np.empty(ROWS, np.bool_)
    total, state = np.empty(survivors, np.float32), np.empty(ROWS, np.int64)
    places, bits = np.empty((2, survivors), np.uint32), np.empty((2, survivors), np.float32)
    cost, symbol = np.empty((2, survivors), np.float32), np.empty((2, survivors), np.float32)
    path = np.empty((columns, states, 4, ROWS), np.float32)
    for i in range(survivors):
        offset[i] = quantizer[i // ROWS]
    for first in range(0, rows, ROWS):
        count = min(ROWS, rows - first)
        _load(row_class, first, count, row_base)
        _load(start, first, count, state)
        _load(lmbda, first, count, price)
        residual = old.reshape(states, columns + AHEAD, ROWS)
        for j in range(columns):
            _load(x[j], first, count, residual[0, j])
        for s in range(states):
            residual[s] = residual[0]
            for r in range(ROWS):
                total[s * ROWS + r] = f32(0) if state[r] == s else f32(np.inf)
                price[s * ROWS + r] = price[r]
        for j in range(columns):
            effect[:columns] = factor[j]
            for s in range(states):
                column_base = u32((2 * column_class[j] + i32(quantizer[s])) * stride)
                at, here = u64((s * (columns + AHEAD) + j) * ROWS), u64(s * ROWS)
                for row in range(ROWS):
                    v[here + u64(row)] = old[at + u64(row)]
                    base[here + u64(row)] = row_base[u64(row)] * u32(2 * stride) + column_base
            omega, beta = importance[j] * f32(0.5), curvature[j]
            for p in range(2):
                _places(v, offset, base, f32(p), low, extent, places)
                for candidate in range(2):
                    for i in range(survivors):
                        bits[candidate, i] = flat[places[candidate, i]]
                _decide(v, offset, price, bits, p, omega, beta, cost, symbol)
            for s in range(states):
                a, b = before[0, s], before[1, s]
                ways = (a, b, parity[0, s], parity[1, s])
                offsets = quantizer[a], quantizer[b]
                _arrive(total, v, cost, symbol, ways, offsets[0], offsets[1], came, path, j, s)
                _take_over(old, new, a, b, came, path, j, s, effect)
            for i in range(survivors):
                total[i] = path[j, i // ROWS, 0, i % ROWS]
            old, new = new, old
        for r in range(ROWS):
            state[r] = 0
            for s in range(1, states):
                if total[s * ROWS + r] < total[state[r] * ROWS + r]:
                    state[r] = s
        _trace_back(path, state, first, count, symbols, errors, end)


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
    """Do `_search` for each problem of a batch, x [batch, columns, rows]."""
    height = x.shape[2]
    for b in range(len(x)):
        first, last = b * height, (b + 1) * height
        _search(
            x[b],
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
