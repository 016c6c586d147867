r"""One column of the trellis search, on the GPU: from S survivors to the S after them.

Two states a < b always lead to the same two states, by opposite parities, and share their
quantizer: a column is S / 2 butterflies, each from two survivors to two. From state s with cost c
and column x_j, the way by parity p costs

    c + min over symbols k of parity p of  omega (1/2 (x_j - v)^2 - 1/2 beta v^2) + lmbda r(k),

v = 2k - [quantizer 1] sgn(k), and takes the residuals along: x_k <- x_k - (x_j - v) V_jk, k > j.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from cerwu_gpu.kernels.obs import round_half_even


@triton.jit
def _cost(b_magnitude, b_sign, b_k, omega, beta, b_lmbda, p_table, lowest, size, OFFSET):
    """What the symbol b_sign * b_k costs; b_k >= 0."""
    b_level = 2 * b_k - tl.where(b_k > 0, OFFSET * 1.0, 0.0)  # [BR]
    o_k = (b_k * b_sign).to(tl.int32) - lowest  # [BR]
    o_k = tl.where((o_k < 0) | (o_k >= size), size, o_k)  # the escape
    b_square = (b_magnitude - b_level) * (b_magnitude - b_level) - beta * (b_level * b_level)
    return b_square * (omega * 0.5) + b_lmbda * tl.load(p_table + o_k)


@triton.jit
def _step(
    b_now, omega, beta, b_lmbda, p_table, lowest, size, OFFSET: tl.constexpr, PARITY: tl.constexpr
):
    """The best symbol of one parity, and its cost: the nearest level or the next toward zero."""
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
def _arrive(
    b_xa, b_qa, b_ca, b_oa, b_na, b_ka, b_xb, b_qb, b_cb, b_ob, b_nb, b_kb, b_v, m_now,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """The better of two ways into one state: survivor a with symbol ka, or b with kb."""
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
    """One column for survivors a and b: those of the state that a reaches by an even symbol and b
    by an odd one, and of the other. A survivor is residuals x, symbols q, cost c, and origin o."""
    b_na = tl.sum(tl.where(m_now[None, :], b_xa, 0.0), axis=1)  # [BR] column j
    b_nb = tl.sum(tl.where(m_now[None, :], b_xb, 0.0), axis=1)  # [BR]
    b_a0, b_ka0 = _step(b_na, omega, beta, b_lmbda, p_table, lowest, size, OFFSET, 0)
    b_a1, b_ka1 = _step(b_na, omega, beta, b_lmbda, p_table, lowest, size, OFFSET, 1)
    b_b0, b_kb0 = _step(b_nb, omega, beta, b_lmbda, p_table, lowest, size, OFFSET, 0)
    b_b1, b_kb1 = _step(b_nb, omega, beta, b_lmbda, p_table, lowest, size, OFFSET, 1)
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
    """One column for 4 survivors; the wiring is spec.TRELLIS_NEXT[4], p_odd quantizer 1's table."""
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
    """One column for 8 survivors; the wiring is spec.TRELLIS_NEXT[8], p_odd quantizer 1's table."""
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
