r"""Rate-aware Optimal Brain Surgeon rounding of one block of columns, on one core.

`reference.obs.quantize_block` defines the result. Rows are independent: ROWS of them stand side by
side in the innermost loops, which LLVM turns into vector instructions, and their weights
[columns, ROWS] stay in the core's first two caches while the columns are rounded one by one. Near
columns see an error at once, the others GROUP errors at a time.
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
GROUP = 8
"""Columns whose errors the columns after them see together; `_remove_effects` names each."""
LEVELS = 4
"""Levels that are tried together; `_try_levels` names each."""
f32, i32, u32 = np.float32, np.int32, np.uint32
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
    columns = problem.x.reshape(batch, len(problem.x) // batch, width).mT.contiguous()
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
        rates = alphabet.rates[:, : alphabet.size]
        # Levels that are there twice cost the same, and of equal costs the first wins.
        whole = torch.arange(-(-alphabet.size // LEVELS) * LEVELS).clamp_max(alphabet.size - 1)
        order = problem.row_class.reshape(batch, -1).argsort(dim=1)
        args = order.numpy(), rates[:, whole].numpy(), levels[whole].numpy()
        _scan_all_batch(*shared, *args, alphabet.lowest)
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
    return u32(place if (place >= f32(0)) & (place < size) else escape)


@njit(**OPTIONS)
def _places(column, row_base, column_base, limits, places):
    """Find where the rates of all candidates [5, ROWS] of a column are."""
    least, most, lowest, size, escape = limits
    zero = column_base + _place(min(max(f32(0), least), most), lowest, size, escape)
    for r in range(ROWS):
        nearest, outer, inner, inmost = _near(column[r], least, most)
        base = row_base[r] + column_base
        places[0, r] = row_base[r] + zero
        places[1, r] = base + _place(nearest, lowest, size, escape)
        places[2, r] = base + _place(outer, lowest, size, escape)
        places[3, r] = base + _place(inner, lowest, size, escape)
        places[4, r] = base + _place(inmost, lowest, size, escape)


@njit(**OPTIONS)
def _better(v, candidate, best, least_cost, omega, beta, price, bits):
    """Return the candidate and its cost if that is lower, else the best before."""
    distance = v - candidate
    cost = (distance * distance - candidate * candidate * beta) * omega + price * bits
    better = cost < least_cost
    return candidate if better else best, cost if better else least_cost


@njit(**OPTIONS)
def _decide(column, price, bits, limits, omega, beta, decided, error):
    """Choose the best candidate [ROWS] of a column, and its error."""
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
        decided[r] = best
        error[r] = v - best


@njit(**OPTIONS)
def _load(source, first, count, target):
    """Copy rows first ... first + count - 1 side by side; fill the rest of ROWS with 0."""
    for r in range(count):
        target[r] = source[first + r]
    for r in range(count, ROWS):
        target[r] = 0


@njit(**OPTIONS)
def _gather(source, rows, target):
    """Copy rows side by side; fill the rest of ROWS with 0."""
    for r in range(len(rows)):
        target[r] = source[rows[r]]
    for r in range(len(rows), ROWS):
        target[r] = 0


@njit(**OPTIONS)
def _remove_effect(error, member, effect, work, k):
    """Take the effect of a column's errors, row `member` of [GROUP, ROWS], from column k."""
    for r in range(ROWS):
        work[k, r] -= error[member, r] * effect


@njit(**OPTIONS)
def _remove_effects(error, factor, j, work, k):
    """Do the same with the errors [GROUP, ROWS] of columns j, j + 1 ..., one after the other."""
    a, b, c, d = factor[j, k], factor[j + 1, k], factor[j + 2, k], factor[j + 3, k]
    e, f, g, h = factor[j + 4, k], factor[j + 5, k], factor[j + 6, k], factor[j + 7, k]
    for r in range(ROWS):
        near = work[k, r] - error[0, r] * a - error[1, r] * b - error[2, r] * c - error[3, r] * d
        work[k, r] = near - error[4, r] * e - error[5, r] * f - error[6, r] * g - error[7, r] * h


@njit(**OPTIONS)
def _move_on(j, error, factor, work):
    """Take the errors [GROUP, ROWS] of the group of column j, so far, from later columns."""
    columns, member = len(work), j % GROUP
    first = j - member
    for k in range(j + 1, min(first + GROUP, columns)):
        _remove_effect(error, member, factor[j, k], work, k)
    if member == GROUP - 1:
        for k in range(first + GROUP, columns):
            _remove_effects(error, factor, first, work, k)


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
    base = np.empty(ROWS, np.uint32)
    places, bits = np.empty((5, ROWS), np.uint32), np.empty((5, ROWS), np.float32)
    decided, error = np.empty(ROWS, np.float32), np.empty((GROUP, ROWS), np.float32)
    for first in range(0, rows, ROWS):
        count = min(ROWS, rows - first)
        for j in range(columns):
            _load(x[j], first, count, work[j])
        _load(lmbda, first, count, price)
        _load(row_class, first, count, base)
        for r in range(ROWS):
            base[r] *= u32(stride)
        for j in range(columns):
            _places(work[j], base, u32(column_class[j] * stride), limits, places)
            for candidate in range(5):
                for r in range(ROWS):
                    bits[candidate, r] = flat[places[candidate, r]]
            omega, beta, mine = importance[j] * f32(0.5), curvature[j], error[j % GROUP]
            _decide(work[j], price, bits, limits, omega, beta, decided, mine)
            for r in range(count):
                symbols[j, first + r] = _as_integer(decided[r])
                errors[j, first + r] = mine[r]
            _move_on(j, error, factor, work)


@njit(**OPTIONS)
def _cheaper(v, price, level, bonus, bits, number, omega, least_cost, place):
    """Return the cost and the place of a level if it costs less, else those before."""
    distance = v - level
    cost = (distance * distance - bonus) * omega + price * bits
    better = cost < least_cost
    return cost if better else least_cost, i32(number) if better else place


@njit(**OPTIONS)
def _try_levels(work, j, price, levels, rates, table, number, omega, beta, least_cost, place):
    """Take LEVELS levels, from `number` on, for the rows [ROWS] in which they cost less."""
    a, b, c, d = levels[number], levels[number + 1], levels[number + 2], levels[number + 3]
    bits_a, bits_b = rates[table, number], rates[table, number + 1]
    bits_c, bits_d = rates[table, number + 2], rates[table, number + 3]
    bonus_a, bonus_b, bonus_c, bonus_d = a * a * beta, b * b * beta, c * c * beta, d * d * beta
    for r in range(ROWS):
        v, lm, cost, at = work[j, r], price[r], least_cost[r], place[r]
        cost, at = _cheaper(v, lm, a, bonus_a, bits_a, number, omega, cost, at)
        cost, at = _cheaper(v, lm, b, bonus_b, bits_b, number + 1, omega, cost, at)
        cost, at = _cheaper(v, lm, c, bonus_c, bits_c, number + 2, omega, cost, at)
        cost, at = _cheaper(v, lm, d, bonus_d, bits_d, number + 3, omega, cost, at)
        least_cost[r], place[r] = cost, at


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
    order,
    rates,
    levels,
    lowest,
):
    """Round to the best of all levels; of equal costs the first.

    `order` has the rows by their class: rows side by side are of one, so that a level costs the
    same bits in each.
    """
    columns, rows = x.shape
    work, price = np.empty((columns, ROWS), np.float32), np.empty(ROWS, np.float32)
    error = np.empty((GROUP, ROWS), np.float32)
    least_cost, place = np.empty(ROWS, np.float32), np.empty(ROWS, np.int32)
    first = 0
    while first < rows:
        row_table, last = row_class[order[first]], first + 1
        while last < min(first + ROWS, rows) and row_class[order[last]] == row_table:
            last += 1
        members = order[first:last]
        for j in range(columns):
            _gather(x[j], members, work[j])
        _gather(lmbda, members, price)
        for j in range(columns):
            omega, beta, mine = importance[j] * f32(0.5), curvature[j], error[j % GROUP]
            least_cost[:], place[:] = f32(np.inf), i32(0)
            table = row_table + column_class[j]
            for k in range(0, len(levels), LEVELS):
                _try_levels(work, j, price, levels, rates, table, k, omega, beta, least_cost, place)
            for r in range(ROWS):
                mine[r] = work[j, r] - levels[place[r]]
            for r in range(len(members)):
                symbols[j, members[r]] = place[r] + lowest
                errors[j, members[r]] = mine[r]
            _move_on(j, error, factor, work)
        first = last


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
    order,
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
            order[b],
            rates,
            levels,
            lowest,
        )
