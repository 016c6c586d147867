r"""Rate-aware Optimal Brain Surgeon rounding of one block of columns, on one core.

`reference.obs.quantize_block` defines the result. Rows are independent: ROWS of them stand side by
side in the innermost loops, which LLVM turns into vector instructions, and their weights
[columns, ROWS] stay in the core's first two caches while the columns are rounded one by one.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from cerwu_gpu.block_problem import BlockProblem

ROWS = 64
"""Rows side by side: a multiple of every vector length; a block of 128 columns takes 32 KB."""
f32, i32 = np.float32, np.int32
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
"""The interpreter lock is let go; a product and a sum may be rounded once, as on a GPU."""


def quantize_block(problem: BlockProblem, *, exhaustive: bool) -> tuple[Tensor, Tensor]:
    """Quantize the columns of one block.

    Args:
        problem: on the CPU; its weights [m, B] are left as they are.
        exhaustive: scan the whole alphabet instead of the integers near the target.

    Returns:
        symbols [m, B] int32 (integers, or positions in the list of levels) and errors x - value
        [m, B] float32; of a single problem both are transposed views of contiguous memory.

    Raises:
        ValueError: a field's shape, type or device does not fit.
    """
    problem.check()
    alphabet, batch, width = problem.alphabet, problem.batch, problem.x.shape[1]
    columns = problem.x.reshape(batch, -1, width).mT.contiguous()
    symbols, errors = torch.empty_like(columns, dtype=torch.int32), torch.empty_like(columns)
    shared = tuple(
        tensor.contiguous().numpy()
        for tensor in (
            columns,
            problem.factor.reshape(batch, width, width),
            problem.row_class,
            problem.column_class.reshape(batch, width),
            problem.lmbda,
            problem.importance.reshape(batch, width),
            problem.curvature.reshape(batch, width),
            symbols,
            errors,
        )
    )
    if exhaustive or alphabet.levels is not None:
        levels = alphabet.levels
        if levels is None:
            levels = torch.arange(alphabet.size, dtype=torch.float32) + alphabet.lowest
        rates = alphabet.rates[:, : alphabet.size].t().contiguous()
        _scan_all_batch(*shared, rates.numpy(), levels.contiguous().numpy(), alphabet.lowest)
    else:
        rates = alphabet.rates.contiguous()
        _scan_near_batch(*shared, rates.numpy(), alphabet.lowest, alphabet.size, alphabet.escapes)
    if batch == 1:
        return symbols[0].t(), errors[0].t()
    return symbols.mT.flatten(0, 1), errors.mT.flatten(0, 1)


@njit(**OPTIONS)
def _as_integer(x):
    """Return x as int32, as a CPU converts it: the least one where it does not fit."""
    return i32(x) if abs(x) < f32(2147483648) else i32(-2147483648)


@njit(**OPTIONS)
def _sign(x):
    """Return -1, 0 or 1 as float32."""
    return f32(1) if x > 0 else (f32(-1) if x < 0 else f32(0))


@njit(**OPTIONS)
def _near(v, least, most):
    """Return the candidates beside zero: round(v), the next outwards, the next two toward zero."""
    nearest = min(max(np.rint(v), least), most)
    inward = _sign(nearest)
    outer = nearest + (inward if nearest != 0 else _sign(v))
    inner = min(max(nearest - inward, least), most)
    inmost = min(max(inner - _sign(inner), least), most)
    return nearest, min(max(outer, least), most), inner, inmost


@njit(**OPTIONS)
def _place(integer, lowest, size, escape):
    """Return the column of an integer in the rates; outside, and for nan, `escape`."""
    place = integer - lowest
    return i32(place if (place >= f32(0)) & (place < size) else escape)


@njit(**OPTIONS)
def _places(column, base, limits, places):
    """Find where the rates of all candidates [5, ROWS] of a column are."""
    least, most, lowest, size, escape = limits
    zero = _place(min(max(f32(0), least), most), lowest, size, escape)
    for r in range(ROWS):
        nearest, outer, inner, inmost = _near(column[r], least, most)
        places[0, r] = base[r] + zero
        places[1, r] = base[r] + _place(nearest, lowest, size, escape)
        places[2, r] = base[r] + _place(outer, lowest, size, escape)
        places[3, r] = base[r] + _place(inner, lowest, size, escape)
        places[4, r] = base[r] + _place(inmost, lowest, size, escape)


@njit(**OPTIONS)
def _better(v, candidate, best, least_cost, omega, beta, price, bits):
    """Return the candidate and its cost if that is lower, else the best before."""
    distance = v - candidate
    cost = (distance * distance - candidate * candidate * beta) * omega + price * bits
    better = cost < least_cost
    return candidate if better else best, cost if better else least_cost


@njit(**OPTIONS)
def _decide(column, price, bits, limits, omega, beta, decided):
    """Choose the best candidate of a column; `decided` gets it and its error, [2, ROWS]."""
    least, most, _, _, _ = limits
    zero = min(max(f32(0), least), most)
    for r in range(ROWS):
        v, lm = column[r], price[r]
        nearest, outer, inner, inmost = _near(v, least, most)
        best, cost = _better(v, zero, zero, f32(np.inf), omega, beta, lm, bits[0, r])
        best, cost = _better(v, nearest, best, cost, omega, beta, lm, bits[1, r])
        best, cost = _better(v, outer, best, cost, omega, beta, lm, bits[2, r])
        best, cost = _better(v, inner, best, cost, omega, beta, lm, bits[3, r])
        best, cost = _better(v, inmost, best, cost, omega, beta, lm, bits[4, r])
        decided[0, r] = best
        decided[1, r] = v - best


@njit(**OPTIONS)
def _load(source, first, count, target):
    """Copy rows first ... first + count - 1 side by side; fill the rest of ROWS with 0."""
    for r in range(count):
        target[r] = source[first + r]
    for r in range(count, ROWS):
        target[r] = 0


@njit(**OPTIONS)
def _remove_effect(error, effect, rest):
    """Take the effect of a column's errors [ROWS] from the weights of a later one."""
    for r in range(ROWS):
        rest[r] -= error[r] * effect


@njit(cache=True, **OPTIONS)
def _scan_near(
    x,
    factor,
    row_class,
    column_class,
    lmbda,
    importance,
    curvature,
    symbols,
    errors,
    rates,
    lowest,
    size,
    escapes,
):
    """Round to zero or to an integer near the target."""
    columns, rows = x.shape
    stride, flat = rates.shape[1], rates.reshape(-1)
    least = f32(-np.inf) if escapes else f32(lowest)
    most = f32(np.inf) if escapes else f32(lowest + size - 1)
    limits = (least, most, f32(lowest), f32(size), f32(size if escapes else 0))
    work, price = np.empty((columns, ROWS), np.float32), np.empty(ROWS, np.float32)
    table, base = np.empty(ROWS, np.int64), np.empty(ROWS, np.int32)
    places, bits = np.empty((5, ROWS), np.int32), np.empty((5, ROWS), np.float32)
    decided = np.empty((2, ROWS), np.float32)
    for first in range(0, rows, ROWS):
        count = min(ROWS, rows - first)
        for j in range(columns):
            _load(x[j], first, count, work[j])
        _load(lmbda, first, count, price)
        _load(row_class, first, count, table)
        for j in range(columns):
            for r in range(ROWS):
                base[r] = (table[r] + column_class[j]) * stride
            _places(work[j], base, limits, places)
            for candidate in range(5):
                for r in range(ROWS):
                    bits[candidate, r] = flat[places[candidate, r]]
            omega, beta = importance[j] * f32(0.5), curvature[j]
            _decide(work[j], price, bits, limits, omega, beta, decided)
            for r in range(count):
                symbols[j, first + r] = _as_integer(decided[0, r])
                errors[j, first + r] = decided[1, r]
            for k in range(j + 1, columns):
                _remove_effect(decided[1], factor[j, k], work[k])


@njit(**OPTIONS)
def _try_level(column, price, bits, level, number, omega, beta, least_cost, place):
    """Take a level for the rows [ROWS] in which it costs less than all before it."""
    for r in range(ROWS):
        distance = column[r] - level
        cost = (distance * distance - level * level * beta) * omega + price[r] * bits[r]
        better = cost < least_cost[r]
        least_cost[r] = cost if better else least_cost[r]
        place[r] = number if better else place[r]


@njit(**OPTIONS)
def _try_level_of_one_table(column, price, bits, level, number, omega, beta, least_cost, place):
    """Do the same where the level costs the same `bits` in each row."""
    for r in range(ROWS):
        distance = column[r] - level
        cost = (distance * distance - level * level * beta) * omega + price[r] * bits
        better = cost < least_cost[r]
        least_cost[r] = cost if better else least_cost[r]
        place[r] = number if better else place[r]


@njit(cache=True, **OPTIONS)
def _scan_all(
    x,
    factor,
    row_class,
    column_class,
    lmbda,
    importance,
    curvature,
    symbols,
    errors,
    rates,
    levels,
    lowest,
):
    """Round to the best of all levels; of equal costs the first. `rates` are [K, T]."""
    columns, rows = x.shape
    work, price = np.empty((columns, ROWS), np.float32), np.empty(ROWS, np.float32)
    row_table, table = np.empty(ROWS, np.int64), np.empty(ROWS, np.int64)
    bits, error = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    least_cost, place = np.empty(ROWS, np.float32), np.empty(ROWS, np.int32)
    for first in range(0, rows, ROWS):
        count = min(ROWS, rows - first)
        for j in range(columns):
            _load(x[j], first, count, work[j])
        _load(lmbda, first, count, price)
        _load(row_class, first, count, row_table)
        one_table = (row_table[:count] == row_table[0]).all()
        for j in range(columns):
            omega, beta = importance[j] * f32(0.5), curvature[j]
            for r in range(ROWS):
                table[r] = row_table[r] + column_class[j]
                least_cost[r], place[r] = f32(np.inf), i32(0)
            for k in range(len(levels)):
                args = (levels[k], i32(k), omega, beta, least_cost, place)
                if one_table:
                    _try_level_of_one_table(work[j], price, rates[k, table[0]], *args)
                    continue
                for r in range(ROWS):
                    bits[r] = rates[k, table[r]]
                _try_level(work[j], price, bits, *args)
            for r in range(ROWS):
                error[r] = work[j, r] - levels[place[r]]
            for r in range(count):
                symbols[j, first + r] = place[r] + lowest
                errors[j, first + r] = error[r]
            for k in range(j + 1, columns):
                _remove_effect(error, factor[j, k], work[k])


@njit(cache=True, **OPTIONS)
def _scan_near_batch(
    x,
    factor,
    row_class,
    column_class,
    lmbda,
    importance,
    curvature,
    symbols,
    errors,
    rates,
    lowest,
    size,
    escapes,
):
    """Do `_scan_near` for each problem of a batch, x [batch, columns, rows]."""
    height = x.shape[2]
    for b in range(len(x)):
        first, last = b * height, (b + 1) * height
        _scan_near(
            x[b],
            factor[b],
            row_class[first:last],
            column_class[b],
            lmbda[first:last],
            importance[b],
            curvature[b],
            symbols[b],
            errors[b],
            rates,
            lowest,
            size,
            escapes,
        )


@njit(cache=True, **OPTIONS)
def _scan_all_batch(
    x,
    factor,
    row_class,
    column_class,
    lmbda,
    importance,
    curvature,
    symbols,
    errors,
    rates,
    levels,
    lowest,
):
    """Do `_scan_all` for each problem of a batch, x [batch, columns, rows]."""
    height = x.shape[2]
    for b in range(len(x)):
        first, last = b * height, (b + 1) * height
        _scan_all(
            x[b],
            factor[b],
            row_class[first:last],
            column_class[b],
            lmbda[first:last],
            importance[b],
            curvature[b],
            symbols[b],
            errors[b],
            rates,
            levels,
            lowest,
        )
