"""Second moments of a layer's inputs: the definition, in torch.

    sum <- sum + X^T X        X [p, n], one row per token

in two levels: the products of one call are added up in float32, the calls in the dtype of the sum,
so that a long calibration loses nothing to a growing float32 sum.
"""

from torch import Tensor


def accumulate_hessian(sum_: Tensor, x: Tensor) -> None:
    """Add X^T X to `sum_`, in place.

    Args:
        sum_: [n, n] float64 or float32.
        x: [p, n] bfloat16, float16 or float32; p may be 0.
    """
    rows = x.float()
    sum_ += rows.T @ rows
