"""Second moments of a layer's inputs: the definition, in torch.

    sum <- sum + X^T X        X [p, n], one row per token

in two levels: the products of one call are added up in float32, the calls in the dtype of the sum,
so that a long calibration loses nothing to a growing float32 sum. The product is symmetric: of two
blocks that mirror each other one is computed.
"""

from torch import Tensor

BLOCK_COLUMNS = 384
"""Columns of a block: narrower products are slower than what they save."""


def accumulate_hessian(sum_: Tensor, x: Tensor) -> None:
    """Add X^T X to `sum_`, in place.

    Args:
        sum_: [n, n] float64 or float32.
        x: [p, n] bfloat16, float16 or float32; p may be 0.
    """
    rows = x.float()
    columns = rows.shape[1]
    for first in range(0, columns, BLOCK_COLUMNS):
        block, after = slice(first, first + BLOCK_COLUMNS), slice(first + BLOCK_COLUMNS, columns)
        sum_[block, block] += rows[:, block].T @ rows[:, block]
        if after.start < columns:
            product = rows[:, block].T @ rows[:, after]
            sum_[block, after] += product
            sum_[after, block] += product.T
