r"""Trellis (dependent) quantization of one block of columns, on the GPU.

Symbol k stands for the level v = 2k - [quantizer 1] sgn(k); which quantizer rounds a weight
follows from a machine with S states that the parity of k drives along the row (spec.py).
Over whole paths a Viterbi search minimises (reference/trellis.py)

    sum_j omega_j (1/2 (x_ij - v_ij)^2 - 1/2 beta_j v_ij^2) + lmbda_i r_ij(k_ij),

with one survivor per state, each with its own residual x_ik <- x_ik - (x_ij - v_ij) V_jk, k > j.
The kernel of this file has 4 or 8 states, that of trellis_wide.py 16 or 32.

Rows are independent: a program owns BR of them. It takes BC columns at a time into registers, one
tile [BR, BC] of residuals and one of symbols for every survivor. A survivor takes its tiles along
when it is chosen, so that at the end of a group every survivor holds its own path; the paths and
the survivors that they started from go to global scratch. The next group starts from x less the
errors of those paths, one product per earlier group. At the end a second kernel follows the
cheapest survivor back from group to group.

Two states a < b always lead to the same two states, by opposite parities, and share their
quantizer: a column is S / 2 butterflies, each from two survivors to two. From state s with cost c
and column x_j, the way by parity p costs

    c + min over symbols k of parity p of  omega_j (1/2 (x_j - v)^2 - 1/2 beta_j v^2) + lmbda r(k).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerwu_gpu.block_problem import BlockProblem
from cerwu_gpu.kernels.obs import contiguous_rows
from cerwu_gpu.kernels.trellis_steps import group_columns, residuals, step
from cerwu_gpu.kernels.trellis_wide import STAGES as WIDE_STAGES
from cerwu_gpu.kernels.trellis_wide import (
    SURVIVORS,
    quantize_block_trellis_wide_kernel,
)
from cerwu_gpu.kernels.trellis_wide import WARPS as WIDE_WARPS
from cerwu_gpu.spec import TRELLIS_REGISTER

BLOCK_ROWS = 16
"""Rows of a program: the fewest that a product takes."""
BLOCK_COLUMNS = 16
"""Columns in registers at a time: the fewest that a product takes."""
WARPS = 4
STAGES = 1
REGISTERS = 255
"""Most registers of a thread: left alone, ptxas spills a few to fit in more programs."""
LAUNCH_ROWS = 16384
"""Rows of a launch with 8 states, fewer with more: its scratch takes 8 bytes a row, survivor and
column, 168 MB at 160 columns."""


@triton.jit
def _arrive(
    b_xa, b_qa, b_ca, b_oa, b_na, b_ka, b_xb, b_qb, b_cb, b_ob, b_nb, b_kb, b_v, m_now,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """Choose the better of two ways into one state: survivor a with symbol ka, or b with kb."""
    m_b = b_cb < b_ca  # [BR]
    b_k = tl.where(m_b, b_kb, b_ka)
    b_level = 2 * b_k - OFFSET * tl.where(b_k > 0, 1.0, tl.where(b_k < 0, -1.0, 0.0))
    b_e = tl.where(m_b, b_nb, b_na) - b_level  # [BR]
    b_x = tl.where(m_b[:, None], b_xb, b_xa) - b_e[:, None] * b_v[None, :]  # [BR, BC]
    b_q = tl.where(m_b[:, None], b_qb, b_qa)  # [BR, BC]
    b_x = tl.where(m_now[None, :], b_e[:, None], b_x)
    b_q = tl.where(m_now[None, :], b_k.to(tl.int32)[:, None], b_q)
    return b_x, b_q, tl.where(m_b, b_cb, b_ca), tl.where(m_b, b_ob, b_oa)


@triton.jit
def _butterfly(
    b_xa, b_qa, b_ca, b_oa, b_xb, b_qb, b_cb, b_ob, b_v, m_now, omega, beta, b_lmbda, p_table,
    lowest, size, OFFSET: tl.constexpr,
):  # fmt: skip
    """Extend survivors a and b by one column: return that of the state which a reaches by an even
    symbol and b by an odd one, and that of the other state.

    A survivor is residuals x, symbols q, cost c, and origin o.
    """
    b_na = tl.sum(tl.where(m_now[None, :], b_xa, 0.0), axis=1)  # [BR] column j
    b_nb = tl.sum(tl.where(m_now[None, :], b_xb, 0.0), axis=1)  # [BR]
    b_a0, b_ka0 = step(b_na, omega, beta, b_lmbda, p_table, lowest, size, OFFSET, 0)
    b_a1, b_ka1 = step(b_na, omega, beta, b_lmbda, p_table, lowest, size, OFFSET, 1)
    b_b0, b_kb0 = step(b_nb, omega, beta, b_lmbda, p_table, lowest, size, OFFSET, 0)
    b_b1, b_kb1 = step(b_nb, omega, beta, b_lmbda, p_table, lowest, size, OFFSET, 1)
    b_xe, b_qe, b_ce, b_oe = _arrive(
        b_xa, b_qa, b_ca + b_a0, b_oa, b_na, b_ka0,
        b_xb, b_qb, b_cb + b_b1, b_ob, b_nb, b_kb1, b_v, m_now, OFFSET,
    )  # fmt: skip
    b_xo, b_qo, b_co, b_oo = _arrive(
        b_xa, b_qa, b_ca + b_a1, b_oa, b_na, b_ka1,
        b_xb, b_qb, b_cb + b_b0, b_ob, b_nb, b_kb0, b_v, m_now, OFFSET,
    )  # fmt: skip
    return b_xe, b_qe, b_ce, b_oe, b_xo, b_qo, b_co, b_oo


@triton.jit
def advance_4(
    x0, q0, c0, o0, x1, q1, c1, o1, x2, q2, c2, o2, x3, q3, c3, o3, b_v, m_now, omega, beta,
    b_lmbda, p_even, p_odd, lowest, size,
):  # fmt: skip
    """Extend 4 survivors by one column, wired as TRELLIS_NEXT[4]; p_odd: quantizer 1's table."""
    y0, r0, d0, u0, y2, r2, d2, u2 = _butterfly(
        x0, q0, c0, o0, x1, q1, c1, o1, b_v, m_now, omega, beta, b_lmbda, p_even, lowest, size, 0
    )
    y1, r1, d1, u1, y3, r3, d3, u3 = _butterfly(
        x2, q2, c2, o2, x3, q3, c3, o3, b_v, m_now, omega, beta, b_lmbda, p_odd, lowest, size, 1
    )
    return y0, r0, d0, u0, y1, r1, d1, u1, y2, r2, d2, u2, y3, r3, d3, u3


@triton.jit
def advance_8(
    x0, q0, c0, o0, x1, q1, c1, o1, x2, q2, c2, o2, x3, q3, c3, o3,
    x4, q4, c4, o4, x5, q5, c5, o5, x6, q6, c6, o6, x7, q7, c7, o7, b_v, m_now, omega, beta,
    b_lmbda, p_even, p_odd, lowest, size,
):  # fmt: skip
    """Extend 8 survivors by one column, wired as TRELLIS_NEXT[8]; p_odd: quantizer 1's table."""
    y0, r0, d0, u0, y2, r2, d2, u2 = _butterfly(
        x0, q0, c0, o0, x4, q4, c4, o4, b_v, m_now, omega, beta, b_lmbda, p_even, lowest, size, 0
    )
    y5, r5, d5, u5, y7, r7, d7, u7 = _butterfly(
        x1, q1, c1, o1, x7, q7, c7, o7, b_v, m_now, omega, beta, b_lmbda, p_odd, lowest, size, 1
    )
    y1, r1, d1, u1, y3, r3, d3, u3 = _butterfly(
        x2, q2, c2, o2, x6, q6, c6, o6, b_v, m_now, omega, beta, b_lmbda, p_even, lowest, size, 0
    )
    y6, r6, d6, u6, y4, r4, d4, u4 = _butterfly(
        x3, q3, c3, o3, x5, q5, c5, o5, b_v, m_now, omega, beta, b_lmbda, p_odd, lowest, size, 1
    )
    return (
        y0, r0, d0, u0, y1, r1, d1, u1, y2, r2, d2, u2, y3, r3, d3, u3,
        y4, r4, d4, u4, y5, r5, d5, u5, y6, r6, d6, u6, y7, r7, d7, u7,
    )  # fmt: skip


@triton.jit
def _less(b_cost, b_best, b_new, STATE: tl.constexpr):
    """Return the lower cost and its state; of equal ones the earlier state."""
    return tl.minimum(b_cost, b_new), tl.where(b_new < b_cost, STATE, b_best)


@triton.jit
def _keep(
    p_tile, p_symbol, p_origin, b_x, b_q, b_o, m_tile, m_r, STATE: tl.constexpr, BC: tl.constexpr
):
    """Store the path of one survivor at the end of a group."""
    tl.store(p_tile + STATE * BC, b_x, mask=m_tile)
    tl.store(p_symbol + STATE * BC, b_q, mask=m_tile)
    tl.store(p_origin + STATE, b_o, mask=m_r)


@triton.jit(
    do_not_specialize=["rows", "stride_problem", "stride_rates", "lowest", "size", "commit"]
)
def quantize_block_trellis_kernel(
    # Of each problem of the launch, one after the other but for p_rates:
    p_x,  # [rows, columns] float32, row stride stride_x
    p_factor,  # [columns, columns] float32, row stride stride_factor, stride_problem between them
    p_rates,  # [T * 2, stride_rates] float32
    p_row_class,  # [rows] int64
    p_column_class,  # [columns] int64
    p_lmbda,  # [rows] float32
    p_importance,  # [columns] float32
    p_curvature,  # [columns] float32
    p_start,  # [rows] int64
    p_path_error,  # [groups, rows, STATES, BC] float32, out
    p_path_symbol,  # [groups, rows, STATES, BC] int32, out
    p_origin,  # [groups, rows, STATES] int32, out: the survivor at its start that each path is from
    p_best,  # [rows] int64, out: the cheapest survivor
    rows,
    columns,
    commit,
    stride_x,
    stride_factor,
    stride_problem,
    stride_rates,
    lowest,
    size,
    STATES: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    i_tile = tl.program_id(0).to(tl.int64)
    i_problem = tl.program_id(1).to(tl.int64)
    committed = tl.cdiv(commit, BC)
    groups = committed + tl.cdiv(columns - commit, BC)
    p_factor += i_problem * stride_problem
    p_column_class += i_problem * columns
    p_importance += i_problem * columns
    p_curvature += i_problem * columns
    p_x += i_problem * rows * stride_x
    p_row_class += i_problem * rows
    p_lmbda += i_problem * rows
    p_start += i_problem * rows
    p_best += i_problem * rows
    paths = i_problem * groups * rows * STATES
    p_path_error += paths * BC
    p_path_symbol += paths * BC
    p_origin += paths
    o_r = i_tile * BR + tl.arange(0, BR)  # [BR]
    o_b = tl.arange(0, BC)  # [BC]
    m_r = o_r < rows
    b_class = tl.load(p_row_class + o_r, mask=m_r, other=0)  # [BR]
    b_lmbda = tl.load(p_lmbda + o_r, mask=m_r, other=0.0)  # [BR]
    b_start = tl.load(p_start + o_r, mask=m_r, other=0)  # [BR]
    far = float("inf")
    # Survivor s is xs [BR, BC], residuals and then errors; qs [BR, BC], symbols; cs [BR], its cost;
    # os [BR], the survivor at the group's start that it descends from.
    c0 = tl.where(b_start == 0, 0.0, far)  # [BR]
    c1 = tl.where(b_start == 1, 0.0, far)  # [BR]
    c2 = tl.where(b_start == 2, 0.0, far)  # [BR]
    c3 = tl.where(b_start == 3, 0.0, far)  # [BR]
    if STATES == 8:
        c4 = tl.where(b_start == 4, 0.0, far)  # [BR]
        c5 = tl.where(b_start == 5, 0.0, far)  # [BR]
        c6 = tl.where(b_start == 6, 0.0, far)  # [BR]
        c7 = tl.where(b_start == 7, 0.0, far)  # [BR]
    b_zero = tl.zeros([BR], tl.int32)
    b_none = tl.zeros([BR, BC], tl.int32)
    p_row = p_factor  # row j of the factor
    for i_group in range(0, groups):
        first, last = group_columns(i_group, committed, commit, columns, BC)
        o_c = first + o_b  # [BC]
        residuals(
            p_x, p_factor, p_path_error, p_origin, i_tile, i_group, committed, commit, rows,
            columns, stride_x, stride_factor, STATES, BR, BC,
        )  # fmt: skip
        tl.debug_barrier()  # other threads of the program wrote the residuals
        o_path = (i_group * rows.to(tl.int64) + o_r) * STATES  # [BR]
        o_tile = o_path[:, None] * BC + o_b[None, :]  # [BR, BC]
        p_tile = p_path_error + o_tile
        m_tile = m_r[:, None]
        x0, q0, o0 = tl.load(p_tile, mask=m_tile, other=0.0), b_none, b_zero
        x1, q1, o1 = tl.load(p_tile + BC, mask=m_tile, other=0.0), b_none, b_zero + 1
        x2, q2, o2 = tl.load(p_tile + 2 * BC, mask=m_tile, other=0.0), b_none, b_zero + 2
        x3, q3, o3 = tl.load(p_tile + 3 * BC, mask=m_tile, other=0.0), b_none, b_zero + 3
        if STATES == 8:
            x4, q4, o4 = tl.load(p_tile + 4 * BC, mask=m_tile, other=0.0), b_none, b_zero + 4
            x5, q5, o5 = tl.load(p_tile + 5 * BC, mask=m_tile, other=0.0), b_none, b_zero + 5
            x6, q6, o6 = tl.load(p_tile + 6 * BC, mask=m_tile, other=0.0), b_none, b_zero + 6
            x7, q7, o7 = tl.load(p_tile + 7 * BC, mask=m_tile, other=0.0), b_none, b_zero + 7
        for j in range(first, last):
            m_now = o_c == j
            b_v = tl.load(p_row + o_c, mask=(o_c > j) & (o_c < last), other=0.0)  # [BC]
            omega = tl.load(p_importance + j)
            beta = tl.load(p_curvature + j)
            table = (b_class + tl.load(p_column_class + j)) * 2  # [BR]
            p_even = p_rates + table * stride_rates  # [BR]
            p_odd = p_even + stride_rates
            if STATES == 4:
                (
                    x0, q0, c0, o0, x1, q1, c1, o1, x2, q2, c2, o2, x3, q3, c3, o3,
                ) = advance_4(
                    x0, q0, c0, o0, x1, q1, c1, o1, x2, q2, c2, o2, x3, q3, c3, o3,
                    b_v, m_now, omega, beta, b_lmbda, p_even, p_odd, lowest, size,
                )  # fmt: skip
            else:
                (
                    x0, q0, c0, o0, x1, q1, c1, o1, x2, q2, c2, o2, x3, q3, c3, o3,
                    x4, q4, c4, o4, x5, q5, c5, o5, x6, q6, c6, o6, x7, q7, c7, o7,
                ) = advance_8(
                    x0, q0, c0, o0, x1, q1, c1, o1, x2, q2, c2, o2, x3, q3, c3, o3,
                    x4, q4, c4, o4, x5, q5, c5, o5, x6, q6, c6, o6, x7, q7, c7, o7,
                    b_v, m_now, omega, beta, b_lmbda, p_even, p_odd, lowest, size,
                )  # fmt: skip
            p_row += stride_factor
        tl.debug_barrier()  # every thread has read its residuals: errors may take their place
        p_symbol = p_path_symbol + o_tile
        _keep(p_tile, p_symbol, p_origin + o_path, x0, q0, o0, m_tile, m_r, 0, BC)
        _keep(p_tile, p_symbol, p_origin + o_path, x1, q1, o1, m_tile, m_r, 1, BC)
        _keep(p_tile, p_symbol, p_origin + o_path, x2, q2, o2, m_tile, m_r, 2, BC)
        _keep(p_tile, p_symbol, p_origin + o_path, x3, q3, o3, m_tile, m_r, 3, BC)
        if STATES == 8:
            _keep(p_tile, p_symbol, p_origin + o_path, x4, q4, o4, m_tile, m_r, 4, BC)
            _keep(p_tile, p_symbol, p_origin + o_path, x5, q5, o5, m_tile, m_r, 5, BC)
            _keep(p_tile, p_symbol, p_origin + o_path, x6, q6, o6, m_tile, m_r, 6, BC)
            _keep(p_tile, p_symbol, p_origin + o_path, x7, q7, o7, m_tile, m_r, 7, BC)
        tl.debug_barrier()  # other threads of the program read the paths
    b_cost, b_best = _less(c0, b_zero, c1, 1)
    b_cost, b_best = _less(b_cost, b_best, c2, 2)
    b_cost, b_best = _less(b_cost, b_best, c3, 3)
    if STATES == 8:
        b_cost, b_best = _less(b_cost, b_best, c4, 4)
        b_cost, b_best = _less(b_cost, b_best, c5, 5)
        b_cost, b_best = _less(b_cost, b_best, c6, 6)
        b_cost, b_best = _less(b_cost, b_best, c7, 7)
    tl.store(p_best + o_r, b_best.to(tl.int64), mask=m_r)


@triton.jit(do_not_specialize=["rows", "columns", "commit"])
def trace_back_kernel(
    # Of each problem of the launch, one after the other:
    p_path_error,  # [groups, rows, STATES, BC] float32
    p_path_symbol,  # [groups, rows, STATES, BC] int32
    p_origin,  # [groups, rows, STATES] int32
    p_symbols,  # [rows, commit] int32, out
    p_error,  # [rows, commit] float32, out
    p_state,  # [rows] int64: the cheapest survivor, in; the state after column `commit`, out
    rows,
    columns,
    commit,
    STATES: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    i_tile = tl.program_id(0).to(tl.int64)
    i_problem = tl.program_id(1).to(tl.int64)
    committed = tl.cdiv(commit, BC)
    groups = committed + tl.cdiv(columns - commit, BC)
    p_state += i_problem * rows
    p_symbols += i_problem * rows * commit
    p_error += i_problem * rows * commit
    paths = i_problem * groups * rows * STATES
    p_path_error += paths * BC
    p_path_symbol += paths * BC
    p_origin += paths
    o_r = i_tile * BR + tl.arange(0, BR)  # [BR]
    o_b = tl.arange(0, BC)  # [BC]
    m_r = o_r < rows
    b_state = tl.load(p_state + o_r, mask=m_r, other=0)  # [BR]
    for i_back in range(0, groups):
        i_group = groups - 1 - i_back
        first, last = group_columns(i_group, committed, commit, columns, BC)
        if i_group == committed - 1:
            tl.store(p_state + o_r, b_state, mask=m_r)
        o_path = (i_group * rows.to(tl.int64) + o_r) * STATES + b_state  # [BR]
        o_tile = o_path[:, None] * BC + o_b[None, :]  # [BR, BC]
        # Beyond the commitment nothing is written, there is only the way back to follow.
        m_tile = m_r[:, None] & (first + o_b < tl.minimum(last, commit))[None, :]
        o_out = o_r[:, None] * commit + (first + o_b)[None, :]  # [BR, BC]
        b_symbol = tl.load(p_path_symbol + o_tile, mask=m_tile, other=0)  # [BR, BC]
        b_error = tl.load(p_path_error + o_tile, mask=m_tile, other=0.0)  # [BR, BC]
        tl.store(p_symbols + o_out, b_symbol, mask=m_tile)
        tl.store(p_error + o_out, b_error, mask=m_tile)
        b_state = tl.load(p_origin + o_path, mask=m_r, other=0).to(tl.int64)


def quantize_block_trellis(
    problem: BlockProblem, *, states: int, start: Tensor, commit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the first `commit` columns of a block, looking at all of its columns.

    Args:
        problem: rates [T * 2, K + 1], row 2c + quantizer; the last column is an escape.
        states: 4, 8, 16 or 32.
        start: [m] int64, the state in which each row enters the block.
        commit: the decisions of later columns are dropped; they only decide which path is best.

    Returns:
        symbols [m, commit] int32, errors x - v [m, commit] float32, and the state [m] int64 after
        column `commit`.

    Raises:
        ValueError: an argument's value, shape, type or device does not fit.
    """
    problem.check_trellis(states, start, commit)
    rows, columns = problem.x.shape
    alphabet, height = problem.alphabet, rows // problem.batch
    x, factor = contiguous_rows(problem.x), contiguous_rows(problem.factor)
    rates = alphabet.rates.contiguous()
    problem = replace(problem, x=x, factor=factor, alphabet=replace(alphabet, rates=rates))
    symbols = torch.empty((rows, commit), dtype=torch.int32, device=x.device)
    error = torch.empty((rows, commit), dtype=torch.float32, device=x.device)
    end = torch.empty(rows, dtype=torch.int64, device=x.device)
    groups = triton.cdiv(commit, BLOCK_COLUMNS) + triton.cdiv(columns - commit, BLOCK_COLUMNS)
    launch_rows = LAUNCH_ROWS * 8 // max(8, states)
    several = min(problem.batch, max(1, launch_rows // max(1, height)))
    shape = (several, groups, min(height, launch_rows), states)
    paths = (
        torch.empty((*shape, BLOCK_COLUMNS), dtype=torch.float32, device=x.device),
        torch.empty((*shape, BLOCK_COLUMNS), dtype=torch.int32, device=x.device),
        torch.empty(shape, dtype=torch.int32, device=x.device),
    )
    for own, part in _launches(problem, several, launch_rows):
        count = len(part.x) // part.batch
        _extend(
            (count, part.batch),
            states,
            part.x,
            part.factor,
            rates,
            part.row_class.contiguous(),
            part.column_class.contiguous(),
            part.lmbda.contiguous(),
            part.importance.contiguous(),
            part.curvature.contiguous(),
            start[own].contiguous(),
            *paths,
            end[own],
            count,
            columns,
            commit,
            x.stride(0),
            factor.stride(-2),
            factor.stride(0) if factor.ndim == 3 else 0,
            rates.stride(0),
            alphabet.lowest,
            alphabet.size,
        )
        trace_back_kernel[(triton.cdiv(count, BLOCK_ROWS), part.batch)](
            *paths,
            symbols[own],
            error[own],
            end[own],
            count,
            columns,
            commit,
            STATES=states,
            BR=BLOCK_ROWS,
            BC=BLOCK_COLUMNS,
            num_warps=WARPS,
        )
    return symbols, error, end


def _launches(
    problem: BlockProblem, several: int, launch_rows: int
) -> Iterator[tuple[slice, BlockProblem]]:
    """Yield rows and problem of each launch: many small problems, or some rows of a large one."""
    height = len(problem.x) // problem.batch
    for first in range(0, problem.batch, several):
        part = problem.some(slice(first, first + several))
        for top in range(0, len(part.x), launch_rows):
            rows = slice(top, min(top + launch_rows, len(part.x)))
            yield slice(first * height + rows.start, first * height + rows.stop), part.of_rows(rows)


def _extend(extent: tuple[int, int], states: int, *arguments: Any) -> None:
    """Extend the survivors of all rows over the columns, by the kernel for so many states; `extent`
    is the number of rows of a problem, and of problems."""
    rows, problems = extent
    if states <= 8:
        quantize_block_trellis_kernel[(triton.cdiv(rows, BLOCK_ROWS), problems)](
            *arguments,
            STATES=states,
            BR=BLOCK_ROWS,
            BC=BLOCK_COLUMNS,
            num_warps=WARPS,
            num_stages=STAGES,
            maxnreg=REGISTERS,
        )
        return
    feedback, enter = TRELLIS_REGISTER[states]
    quantize_block_trellis_wide_kernel[(triton.cdiv(rows, SURVIVORS // states), problems)](
        *arguments,
        STATES=states,
        FEEDBACK=feedback,
        ENTER=enter,
        BR=SURVIVORS // states,
        BC=BLOCK_COLUMNS,
        num_warps=WIDE_WARPS,
        num_stages=WIDE_STAGES,
    )
