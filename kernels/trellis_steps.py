"""Parts of the trellis kernels: the cost of a step, groups of columns and their residuals."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from cerwu_gpu.kernels.obs import round_half_even


@triton.jit
def _cost(b_magnitude, b_sign, b_k, omega, beta, b_lmbda, p_table, lowest, size, OFFSET):
    """Return the cost of the symbol b_sign * b_k; b_k >= 0."""
    b_level = 2 * b_k - tl.where(b_k > 0, OFFSET * 1.0, 0.0)  # [BR]
    o_k = (b_k * b_sign).to(tl.int32) - lowest  # [BR]
    o_k = tl.where((o_k < 0) | (o_k >= size), size, o_k)  # the escape
    b_square = (b_magnitude - b_level) * (b_magnitude - b_level) - beta * (b_level * b_level)
    return b_square * (omega * 0.5) + b_lmbda * tl.load(p_table + o_k)


@triton.jit
def step(b_now, omega, beta, b_lmbda, p_table, lowest, size, OFFSET, PARITY: tl.constexpr):
    """Return the lower cost of one parity and its symbol: the nearest level or the next inward."""
    b_magnitude = tl.abs(b_now)  # [BR]
    b_sign = tl.where(b_now < 0, -1.0, 1.0)
    b_quarter = (b_magnitude + (OFFSET - 2 * PARITY)) * 0.25
    b_outer = 2 * tl.maximum(round_half_even(b_quarter), 0.0) + PARITY
    b_inner = tl.maximum(b_outer - 2, PARITY * 1.0)
    b_cost = _cost(
        b_magnitude, b_sign, b_outer, omega, beta, b_lmbda, p_table, lowest, size, OFFSET
    )
    b_less = _cost(
        b_magnitude, b_sign, b_inner, omega, beta, b_lmbda, p_table, lowest, size, OFFSET
    )
    b_k = tl.where(b_less < b_cost, b_inner, b_outer) * b_sign
    return tl.where(b_less < b_cost, b_less, b_cost), b_k


@triton.jit
def group_columns(i_group, committed, commit, columns, BC: tl.constexpr):
    """Return the first column of a group and its end; no group reaches across column `commit`."""
    inside = i_group < committed  # groups before the commitment's end
    first = tl.where(inside, i_group * BC, commit + (i_group - committed) * BC)
    return first, tl.minimum(first + BC, tl.where(inside, commit, columns))


@triton.jit
def residuals(
    p_x, p_factor, p_path_error, p_origin, i_tile, i_group, committed, commit, rows, columns,
    stride_x, stride_factor, STATES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write x less the errors of each survivor's path to the group's part of p_path_error.

    Survivors stand below each other here, row by row: SR = BR * STATES of them.
    """
    o_sr = i_tile * BR * STATES + tl.arange(0, BR * STATES)  # [SR]
    o_r = o_sr // STATES  # [SR]
    m_r = o_r < rows
    o_b = tl.arange(0, BC)  # [BC]
    first, last = group_columns(i_group, committed, commit, columns, BC)
    o_c = first + o_b
    m_c = o_c < last
    survivors = rows.to(tl.int64) * STATES
    b_origin = o_sr % STATES  # [SR] the survivor at the end of an earlier group
    b_sum = tl.zeros([BR * STATES, BC], tl.float32)  # [SR, BC]
    for i_back in range(0, i_group):
        i_before = i_group - 1 - i_back
        start, stop = group_columns(i_before, committed, commit, columns, BC)
        o_k = start + o_b
        m_k = o_k < stop
        o_path = i_before * survivors + o_r * STATES + b_origin  # [SR]
        p_e = p_path_error + o_path[:, None] * BC + o_b[None, :]
        p_v = p_factor + o_k.to(tl.int64)[:, None] * stride_factor + o_c[None, :]
        b_e = tl.load(p_e, mask=m_r[:, None] & m_k[None, :], other=0.0)  # [SR, BC]
        b_v = tl.load(p_v, mask=m_k[:, None] & m_c[None, :], other=0.0)  # [BC, BC]
        b_sum = tl.dot(b_e, b_v, b_sum, input_precision="ieee")
        b_origin = tl.load(p_origin + o_path, mask=m_r, other=0).to(tl.int64)
    m_tile = m_r[:, None] & m_c[None, :]
    b_x = tl.load(p_x + o_r[:, None] * stride_x + o_c[None, :], mask=m_tile, other=0.0)  # [SR, BC]
    o_out = (i_group * survivors + o_sr)[:, None] * BC + o_b[None, :]
    tl.store(p_path_error + o_out, b_x - b_sum, mask=m_r[:, None])
