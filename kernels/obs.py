r"""Rate-aware Optimal Brain Surgeon rounding of one block of columns, on the GPU.

For columns j = 1 ... B in order, all rows i at once (block_problem.py has the notation),

    q_ij = argmin_g  omega_j (1/2 (x_ij - g)^2 - 1/2 beta_j g^2) + lmbda_i r_ij(g)
    e_ij = x_ij - q_ij
    x_ik <- x_ik - e_ij V_jk                    for every k > j.

Rows are independent: a program owns BR of them and all of their columns. It takes BC columns at a
time into registers, brings them up to date with one product per earlier group,

    x_ik - sum_{j before the group} e_ij V_jk,

and solves the group there, column by column, with rank-1 updates. A column that is done makes room
for its errors in the same tile, so that x and e share their registers. The error matrix in global
memory is the only thing that a program reads back.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerwu_gpu.block_problem import BlockProblem

BLOCK_ROWS = 16
"""Rows of a program: the fewest that a product takes, and 4096 rows still fill 132 processors."""
BLOCK_COLUMNS = 16
"""Columns in registers at a time: the fewest that a product takes."""
BLOCK_LEVELS = 16
"""Levels of an alphabet tried at a time in a full scan."""
WARPS = 4
STAGES = 2
REGISTERS = 128
"""Most registers of a thread: left alone, ptxas spills a few to fit in more programs."""


@triton.jit
def round_half_even(b_x):
    """Return the nearest integer, ties to even, as a float: from 2^23 on floats are integers."""
    b_magnitude = tl.abs(b_x)
    b_whole = (b_magnitude + 8388608.0) - 8388608.0
    b_whole = tl.where(b_magnitude < 8388608.0, b_whole, b_magnitude)
    return tl.where(b_x < 0, -b_whole, b_whole)


@triton.jit
def _sign(b_x):
    return tl.where(b_x > 0, 1.0, tl.where(b_x < 0, -1.0, 0.0))


@triton.jit
def _cost(b_x, b_g, omega, beta, b_lmbda, b_rate):
    """Return the cost of level g: its square, less what the curvature gives back, plus its bits."""
    b_difference = b_x - b_g
    b_square = b_difference * b_difference - b_g * b_g * beta
    return b_square * (omega * 0.5) + b_lmbda * b_rate


@triton.jit
def _cost_of_integer(b_x, b_g, omega, beta, b_lmbda, p_table, lowest, size, ESCAPES: tl.constexpr):
    """Return the cost of integer g under the tables that start at p_table, and g clamped."""
    if not ESCAPES:
        # lowest + size - 1 may lie beyond 2^24 only where the table itself would fill the memory.
        b_g = tl.minimum(tl.maximum(b_g, lowest * 1.0), (lowest + size - 1) * 1.0)
    o_g = b_g.to(tl.int32) - lowest  # [BR]
    m_outside = (o_g < 0) | (o_g >= size)
    # Without escapes only NaN is outside; it must not read out of range.
    o_g = tl.where(m_outside, size if ESCAPES else 0, o_g)
    return _cost(b_x, b_g, omega, beta, b_lmbda, tl.load(p_table + o_g)), b_g


@triton.jit
def _nearest(b_x, omega, beta, b_lmbda, p_table, lowest, size, ESCAPES: tl.constexpr):
    """Return the best of zero, round(x), its neighbours and the one beyond the inner: [BR]."""
    b_round = round_half_even(b_x)  # [BR]
    if not ESCAPES:
        b_round = tl.minimum(tl.maximum(b_round, lowest * 1.0), (lowest + size - 1) * 1.0)
    b_sign = _sign(b_round)
    b_outward = tl.where(b_round == 0, _sign(b_x), b_sign)
    b_inner = b_round - b_sign
    b_cost, b_best = _cost_of_integer(
        b_x, tl.zeros_like(b_x), omega, beta, b_lmbda, p_table, lowest, size, ESCAPES
    )
    for i in tl.static_range(4):
        if i == 0:
            b_g = b_round
        elif i == 1:
            b_g = b_round + b_outward
        elif i == 2:
            b_g = b_inner
        else:
            b_g = b_inner - _sign(b_inner)
        b_new, b_g = _cost_of_integer(
            b_x, b_g, omega, beta, b_lmbda, p_table, lowest, size, ESCAPES
        )
        b_best = tl.where(b_new < b_cost, b_g, b_best)
        b_cost = tl.where(b_new < b_cost, b_new, b_cost)
    return b_best


@triton.jit
def _scan(
    b_x, omega, beta, b_lmbda, p_table, p_levels, lowest, size,
    BR: tl.constexpr, BG: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Return the first minimum over the whole alphabet: its position [BR] int32, its level [BR]."""
    b_cost = tl.full([BR, BG], float("inf"), tl.float32)  # [BR, BG] best so far in each lane
    b_at = tl.full([BR, BG], 0, tl.int32)  # [BR, BG] and where it was
    for start in range(0, size, BG):
        o_g = start + tl.arange(0, BG)  # [BG]
        m_g = o_g < size
        if LEVELS:
            b_g = tl.load(p_levels + o_g, mask=m_g, other=0.0)  # [BG]
        else:
            b_g = (lowest + o_g).to(tl.float32)  # [BG]
        b_rate = tl.load(p_table[:, None] + o_g[None, :], mask=m_g[None, :], other=0.0)  # [BR, BG]
        b_new = _cost(b_x[:, None], b_g[None, :], omega, beta, b_lmbda[:, None], b_rate)
        m_better = (b_new < b_cost) & m_g[None, :]
        b_cost = tl.where(m_better, b_new, b_cost)
        b_at = tl.where(m_better, o_g[None, :], b_at)
    b_least = tl.min(b_cost, axis=1)  # [BR]
    # The lanes are scanned out of order: of equal costs the lowest position is the first.
    b_first = tl.min(tl.where(b_cost == b_least[:, None], b_at, size - 1), axis=1)  # [BR]
    if LEVELS:
        return b_first, tl.load(p_levels + b_first)
    return b_first + lowest, (b_first + lowest).to(tl.float32)


# The sizes of an alphabet differ from layer to layer: none of them is worth a compilation.
@triton.jit(do_not_specialize=["rows", "stride_problem", "stride_rates", "lowest", "size"])
def quantize_block_kernel(
    # Of each problem of the batch, one after the other but for p_rates and p_levels:
    p_x,  # [rows, columns] float32, row stride stride_x
    p_factor,  # [columns, columns] float32, row stride stride_factor, stride_problem between them
    p_rates,  # [T, stride_rates] float32
    p_levels,  # [size] float32; read only with LEVELS
    p_row_class,  # [rows] int64
    p_column_class,  # [columns] int64
    p_lmbda,  # [rows] float32
    p_importance,  # [columns] float32
    p_curvature,  # [columns] float32
    p_symbols,  # [rows, columns] int32, out
    p_error,  # [rows, columns] float32, out; its finished columns are read again
    rows,
    columns,
    stride_x,
    stride_factor,
    stride_problem,
    stride_rates,
    lowest,
    size,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BG: tl.constexpr,
    LEVELS: tl.constexpr,
    ESCAPES: tl.constexpr,
    EXHAUSTIVE: tl.constexpr,
):
    i_tile = tl.program_id(0).to(tl.int64)
    i_problem = tl.program_id(1).to(tl.int64)
    p_factor += i_problem * stride_problem
    p_column_class += i_problem * columns
    p_importance += i_problem * columns
    p_curvature += i_problem * columns
    p_x += i_problem * rows * stride_x
    p_row_class += i_problem * rows
    p_lmbda += i_problem * rows
    p_symbols += i_problem * rows * columns
    p_error += i_problem * rows * columns
    o_r = i_tile * BR + tl.arange(0, BR)  # [BR]
    m_r = o_r < rows
    b_class = tl.load(p_row_class + o_r, mask=m_r, other=0)  # [BR]
    b_lmbda = tl.load(p_lmbda + o_r, mask=m_r, other=0.0)  # [BR]
    p_row = p_factor  # row j of the factor
    for first in range(0, columns, BC):
        o_c = first + tl.arange(0, BC)  # [BC]
        m_c = o_c < columns
        m_tile = m_r[:, None] & m_c[None, :]
        b_x = tl.load(p_x + o_r[:, None] * stride_x + o_c[None, :], mask=m_tile, other=0.0)
        for before in range(0, first, BC):
            o_k = before + tl.arange(0, BC).to(tl.int64)  # [BC], all of them columns
            p_e = p_error + o_r[:, None] * columns + o_k[None, :]
            p_v = p_factor + o_k[:, None] * stride_factor + o_c[None, :]
            b_e = tl.load(p_e, mask=m_r[:, None], other=0.0)  # [BR, BC]
            b_v = tl.load(p_v, mask=m_c[None, :], other=0.0)  # [BC, BC]
            b_x -= tl.dot(b_e, b_v, input_precision="ieee")
        b_symbols = tl.zeros([BR, BC], tl.int32)  # [BR, BC]
        for j in range(first, min(first + BC, columns)):
            m_now = o_c == j
            b_v = tl.load(p_row + o_c, mask=(o_c > j) & m_c, other=0.0)  # [BC]
            omega = tl.load(p_importance + j)
            beta = tl.load(p_curvature + j)
            p_table = p_rates + (b_class + tl.load(p_column_class + j)) * stride_rates  # [BR]
            b_now = tl.sum(tl.where(m_now[None, :], b_x, 0.0), axis=1)  # [BR] column j
            if EXHAUSTIVE:
                b_symbol, b_value = _scan(
                    b_now, omega, beta, b_lmbda, p_table, p_levels, lowest, size, BR, BG, LEVELS
                )
            else:
                b_value = _nearest(b_now, omega, beta, b_lmbda, p_table, lowest, size, ESCAPES)
                b_symbol = b_value.to(tl.int32)
            b_e = b_now - b_value  # [BR]
            # Columns before j keep their errors: b_v is zero there.
            b_x = tl.where(m_now[None, :], b_e[:, None], b_x - b_e[:, None] * b_v[None, :])
            b_symbols = tl.where(m_now[None, :], b_symbol[:, None], b_symbols)
            p_row += stride_factor
        o_out = o_r[:, None] * columns + o_c[None, :]  # [BR, BC]
        tl.store(p_symbols + o_out, b_symbols, mask=m_tile)
        tl.store(p_error + o_out, b_x, mask=m_tile)
        tl.debug_barrier()  # other threads of the program read these errors in the next group


def quantize_block(problem: BlockProblem, *, exhaustive: bool) -> tuple[Tensor, Tensor]:
    """Quantize the columns of one block; reference.obs.quantize_block is the definition.

    Args:
        problem: its weights x [m, B] are left as they are.
        exhaustive: scan the whole alphabet instead of the integers near the target.

    Returns:
        symbols [m, B] int32 and errors x - value [m, B] float32.

    Raises:
        ValueError: a tensor's shape, type or device does not fit.
    """
    problem.check()
    rows, columns = problem.x.shape
    alphabet = problem.alphabet
    x, factor = contiguous_rows(problem.x), contiguous_rows(problem.factor)
    rates = alphabet.rates.contiguous()
    symbols = torch.empty((rows, columns), dtype=torch.int32, device=x.device)
    error = torch.empty((rows, columns), dtype=torch.float32, device=x.device)
    if rows == 0 or columns == 0:
        return symbols, error
    levels = alphabet.levels
    height = rows // problem.batch
    quantize_block_kernel[(triton.cdiv(height, BLOCK_ROWS), problem.batch)](
        x,
        factor,
        rates,
        rates if levels is None else levels.contiguous(),
        problem.row_class.contiguous(),
        problem.column_class.contiguous(),
        problem.lmbda.contiguous(),
        problem.importance.contiguous(),
        problem.curvature.contiguous(),
        symbols,
        error,
        height,
        columns,
        x.stride(0),
        factor.stride(-2),
        factor.stride(0) if factor.ndim == 3 else 0,
        rates.stride(0),
        alphabet.lowest,
        alphabet.size,
        BR=BLOCK_ROWS,
        BC=BLOCK_COLUMNS,
        BG=BLOCK_LEVELS,
        LEVELS=levels is not None,
        ESCAPES=alphabet.escapes,
        EXHAUSTIVE=exhaustive or levels is not None,
        num_warps=WARPS,
        num_stages=STAGES,
        maxnreg=REGISTERS,
    )
    return symbols, error


def contiguous_rows(matrix: Tensor) -> Tensor:
    """Return the matrix [..., m, n] itself if each of its rows is contiguous, else a copy."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()
