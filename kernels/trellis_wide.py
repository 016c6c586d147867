r"""Trellis quantization with more survivors than registers can be named for: 16 or 32 states.

The arguments, the groups of columns and the paths in global scratch are those of
quantize_block_trellis_kernel in trellis.py. Here the survivors are one axis: residuals and symbols
are tiles [BR, S, BC], and every state gathers those of the survivor that it descends from.

The machine is a shift register (spec.TRELLIS_REGISTER). State t of S = 2^n is reached from states
whose quantizer u is the highest bit of t: by parity p from

    s_p = 2 (t ^ (f if u) ^ (e if p)) + u,   f = FEEDBACK, e = ENTER.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from cerwu_gpu.kernels.trellis_steps import group_columns, residuals, step

SURVIVORS = 128
"""Survivors of a program, of all its rows together: their tiles take 32 registers of a thread."""
WARPS = 4
STAGES = 1


@triton.jit
def _gathered(b_tile, b_from):
    """Return [BR, S, BC] with the tile of survivor b_from [BR, S] in the place of each state."""
    o_from = tl.broadcast_to(b_from[:, :, None], b_tile.shape)
    return tl.gather(b_tile, o_from, axis=1)


@triton.jit
def _arrive(
    b_total, b_now, omega, beta, b_lmbda, p_table, lowest, size, b_offset, o_even, o_odd, b_arrived
):
    """Choose the better of two ways into each state.

    o_even and o_odd [BR, S] are the states that lead there by an even and by an odd symbol,
    b_arrived [S] the quantizer that both have. Returns, all [BR, S], the state's cost, its symbol,
    the error of that symbol and the state that it came from.
    """
    b_cost, b_k = step(b_now, omega, beta, b_lmbda, p_table, lowest, size, b_offset, 0)
    b_even, b_even_k = tl.gather(b_total + b_cost, o_even, 1), tl.gather(b_k, o_even, 1)
    b_cost, b_k = step(b_now, omega, beta, b_lmbda, p_table, lowest, size, b_offset, 1)
    b_odd, b_odd_k = tl.gather(b_total + b_cost, o_odd, 1), tl.gather(b_k, o_odd, 1)
    # Of equal ways the one from the lower state wins.
    m_odd = ((o_even < o_odd) & (b_odd < b_even)) | ((o_odd < o_even) & ~(b_even < b_odd))
    b_k = tl.where(m_odd, b_odd_k, b_even_k)
    o_from = tl.where(m_odd, o_odd, o_even)
    b_level = 2 * b_k - b_arrived[None, :] * tl.where(b_k > 0, 1.0, tl.where(b_k < 0, -1.0, 0.0))
    return tl.where(m_odd, b_odd, b_even), b_k, tl.gather(b_now, o_from, 1) - b_level, o_from


@triton.jit(
    do_not_specialize=["rows", "stride_problem", "stride_rates", "lowest", "size", "commit"]
)
def quantize_block_trellis_wide_kernel(
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
    FEEDBACK: tl.constexpr,
    ENTER: tl.constexpr,
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
    o_s = tl.arange(0, STATES)  # [S]
    o_b = tl.arange(0, BC)  # [BC]
    m_r = o_r < rows
    b_class = tl.load(p_row_class + o_r, mask=m_r, other=0)  # [BR]
    b_lmbda = tl.load(p_lmbda + o_r, mask=m_r, other=0.0)[:, None]  # [BR, 1]
    b_start = tl.load(p_start + o_r, mask=m_r, other=0)  # [BR]
    b_total = tl.where(b_start[:, None] == o_s[None, :], 0.0, float("inf"))  # [BR, S] costs

    b_arrived = 2 * o_s // STATES  # [S] the quantizer before each state
    o_even = (o_s ^ (FEEDBACK * b_arrived)) * 2 + b_arrived
    o_odd = o_even ^ (2 * ENTER)
    o_even = tl.broadcast_to(o_even[None, :], (BR, STATES))
    o_odd = tl.broadcast_to(o_odd[None, :], (BR, STATES))
    b_arrived = b_arrived.to(tl.float32)
    b_offset = (o_s & 1).to(tl.float32)[None, :]  # [1, S] the quantizer of each state

    m_path = m_r[:, None]
    m_tile = m_path[:, :, None]
    p_row = p_factor  # row j of the factor
    for i_group in range(0, groups):
        first, last = group_columns(i_group, committed, commit, columns, BC)
        o_c = first + o_b  # [BC]
        residuals(
            p_x, p_factor, p_path_error, p_origin, i_tile, i_group, committed, commit, rows,
            columns, stride_x, stride_factor, STATES, BR, BC,
        )  # fmt: skip
        tl.debug_barrier()  # other threads of the program wrote the residuals
        o_path = ((i_group * rows.to(tl.int64) + o_r) * STATES)[:, None] + o_s[None, :]  # [BR, S]
        o_tile = o_path[:, :, None] * BC + o_b[None, None, :]  # [BR, S, BC]
        b_x = tl.load(p_path_error + o_tile, mask=m_tile, other=0.0)  # residuals and then errors
        b_q = tl.zeros([BR, STATES, BC], tl.int32)  # symbols
        b_o = tl.broadcast_to(o_s[None, :], (BR, STATES))  # survivors at the group's start
        for j in range(first, last):
            m_now = (o_c == j)[None, None, :]
            b_v = tl.load(p_row + o_c, mask=(o_c > j) & (o_c < last), other=0.0)  # [BC]
            omega = tl.load(p_importance + j)
            beta = tl.load(p_curvature + j)
            table = (b_class + tl.load(p_column_class + j)) * 2  # [BR]
            p_table = p_rates + (table[:, None] + (o_s & 1)[None, :]) * stride_rates  # [BR, S]
            b_now = tl.sum(tl.where(m_now, b_x, 0.0), axis=2)  # [BR, S] column j
            b_total, b_k, b_e, o_from = _arrive(
                b_total, b_now, omega, beta, b_lmbda, p_table, lowest, size, b_offset, o_even,
                o_odd, b_arrived,
            )  # fmt: skip
            b_x = _gathered(b_x, o_from) - b_e[:, :, None] * b_v[None, None, :]
            b_x = tl.where(m_now, b_e[:, :, None], b_x)
            b_q = tl.where(m_now, b_k.to(tl.int32)[:, :, None], _gathered(b_q, o_from))
            b_o = tl.gather(b_o, o_from, 1)
            p_row += stride_factor
        tl.debug_barrier()  # every thread has read its residuals: errors may take their place
        tl.store(p_path_error + o_tile, b_x, mask=m_tile)
        tl.store(p_path_symbol + o_tile, b_q, mask=m_tile)
        tl.store(p_origin + o_path, b_o, mask=m_path)
        tl.debug_barrier()  # other threads of the program read the paths
    tl.store(p_best + o_r, tl.argmin(b_total, axis=1).to(tl.int64), mask=m_r)
