"""Second moments of a layer's inputs, X^T X, on the GPU: one triangle of it.

    sum <- sum + X^T X        X [p, n], one row per token

A program owns a tile [BN, BN] on or above the diagonal, goes through all tokens, and writes the
tile and its mirror image. Products are added up in float32, BP tokens at a time, and the result to
the sum in its own dtype. Nothing is lost in a product: bfloat16 and float16 are numbers of TF32,
too, whose products are exact, and float32 stays float32.

Not yet measured on a GPU, where cuBLAS does the whole square of the same product: until it is, the
backend takes torch's product, and this kernel only when it is asked for.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_COLUMNS = 64
"""Columns on each side of a tile."""
BLOCK_TOKENS = 32
"""Tokens of a step."""
WARPS = 8


@triton.jit
def accumulate_hessian_kernel(
    p_sum,  # [n, n] float64 or float32, contiguous
    p_x,  # [tokens, n], row stride stride_x
    p_tiles,  # [tiles, 2] int64: row and column of each tile, row <= column
    tokens,
    n,
    stride_x,
    BN: tl.constexpr,
    BP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_tile = tl.program_id(0).to(tl.int64)
    i_row = tl.load(p_tiles + 2 * i_tile)
    i_column = tl.load(p_tiles + 2 * i_tile + 1)
    o_a = i_row * BN + tl.arange(0, BN)  # [BN]
    o_b = i_column * BN + tl.arange(0, BN)  # [BN]
    o_p = tl.arange(0, BP).to(tl.int64)  # [BP]
    b_sum = tl.zeros([BN, BN], tl.float32)  # [BN, BN]
    for first in range(0, tokens, BP):
        m_p = first + o_p < tokens
        p_rows = p_x + (first + o_p) * stride_x  # [BP]
        m_a = m_p[None, :] & (o_a < n)[:, None]
        m_b = m_p[:, None] & (o_b < n)[None, :]
        b_a = tl.load(p_rows[None, :] + o_a[:, None], mask=m_a, other=0.0)  # [BN, BP]
        b_b = tl.load(p_rows[:, None] + o_b[None, :], mask=m_b, other=0.0)  # [BP, BN]
        b_sum = tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_sum, input_precision=PRECISION)
    m_sum = (o_a < n)[:, None] & (o_b < n)[None, :]
    p_tile = p_sum + o_a[:, None] * n + o_b[None, :]
    b_sum = b_sum.to(p_sum.dtype.element_ty) + tl.load(p_tile, mask=m_sum, other=0.0)
    tl.store(p_tile, b_sum, mask=m_sum)
    if i_row < i_column:
        tl.store(p_sum + o_b[:, None] * n + o_a[None, :], tl.trans(b_sum), mask=tl.trans(m_sum))


def accumulate_hessian(sum_: Tensor, x: Tensor) -> None:
    """Add X^T X to `sum_`, in place.

    Args:
        sum_: [n, n] float64 or float32, contiguous and symmetric.
        x: [p, n] bfloat16, float16 or float32; p may be 0.
    """
    tokens, n = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    side = triton.cdiv(n, BLOCK_COLUMNS)
    tiles = torch.triu_indices(side, side, device=x.device).T.contiguous()
    accumulate_hessian_kernel[(len(tiles),)](
        sum_,
        x,
        tiles,
        tokens,
        n,
        x.stride(0),
        BN=BLOCK_COLUMNS,
        BP=BLOCK_TOKENS,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=WARPS,
    )
