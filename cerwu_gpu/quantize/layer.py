"""One Hessian and the matrices that share it: from floats to integers and their tables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from cerwu_gpu.config import TRELLIS_STATES, CompressionConfig
from cerwu_gpu.quantize.classes import Classes
from cerwu_gpu.quantize.grid import Grid, nearest, scaled
from cerwu_gpu.quantize.limit import limit_bits
from cerwu_gpu.quantize.objective import check_finite, factor_with_damping, quadratic_error
from cerwu_gpu.quantize.problem import Problem
from cerwu_gpu.quantize.refit import Quadratic, refit
from cerwu_gpu.quantize.symbols import QuantizedMatrix, finish_matrix


@dataclass(frozen=True)
class QuantizedStack:
    """The matrices of a stack and what happened on the way.

    Attributes:
        matrices: in the order given.
        relative_losses: tr((W-Q) H (W-Q)^T) / tr(W H W^T) of each, with the undamped H.
        damping: what the factorisation needed.
        limits: fewest bits per weight for the loss of each, weighted by the sensitivities
            (limit.py); None where it was not asked for, or the loss is 0.
    """

    matrices: tuple[QuantizedMatrix, ...]
    relative_losses: tuple[float, ...]
    damping: float
    limits: tuple[float | None, ...]


def quantize_stack(
    weights: Sequence[Tensor],
    hessian: Tensor,
    config: CompressionConfig,
    sensitivities: Sequence[Tensor] | None = None,
) -> QuantizedStack:
    """Quantize matrices [m_k, n] float32 that see the same inputs, in one pass.

    Args:
        weights: the matrices; all have n columns.
        hessian: [n, n], undamped.
        config: method, grid, rate and trade-off.
        sensitivities: alpha [m_k] float32 > 0 of each matrix, what a unit of squared error costs
            in each row; None: 1 everywhere.

    Raises:
        FactorizationError: the Hessian cannot be factored.
        CerwuError: a subclass, where something is not finite, or integers leave their range.
    """
    weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
    check_finite(weight, hessian, sensitivities or ())
    bounds = [0, *torch.tensor([len(w) for w in weights]).cumsum(0).tolist()]
    states = TRELLIS_STATES[config.quantizer]
    fitted: Quadratic | None = None
    alpha = weight.new_ones(len(weight)) if sensitivities is None else torch.cat([*sensitivities])
    if config.method == "rtn":
        symbols, grid, classes = _round_to_nearest(weight, config)
        damping = config.damping
    else:
        damped, factor, damping = factor_with_damping(hessian, config.damping, config.damping_by)
        problem = Problem.build(weight, alpha, damped, factor, bounds, config)
        symbols, grid, classes = problem.solve(), problem.grid, problem.classes
        if not config.bounded:
            fitted = Quadratic(weight, damped.to(weight.dtype), alpha, config.lmbda)
    matrices, losses, limits = [], [], []
    for first, last in pairwise(bounds):
        rows = slice(first, last)
        matrix = finish_matrix(symbols[rows], grid, rows, classes, states)
        if fitted is not None:
            matrix = refit(matrix, fitted.of_rows(rows))
        matrices.append(matrix)
        stored = matrix.weight(torch.float32)
        losses.append(relative_loss(weight[rows], stored, hessian))
        wanted = weight.shape[1] <= config.limit_columns
        limits.append(_limit(weight[rows], stored, hessian, alpha[rows]) if wanted else None)
    return QuantizedStack(tuple(matrices), tuple(losses), damping, tuple(limits))


def _limit(weight: Tensor, quantized: Tensor, hessian: Tensor, alpha: Tensor) -> float | None:
    """Fewest bits per weight for the loss that the search weighs bits against."""
    loss = float((alpha * quadratic_error(weight - quantized, hessian)).sum())
    bits = limit_bits(alpha.sqrt()[:, None] * weight, hessian, max(loss, 0.0))
    return bits if math.isfinite(bits) else None


def relative_loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr((W-Q) H (W-Q)^T) / tr(W H W^T); 0 where W has no effect and Q is equal to it."""
    error = float(quadratic_error(weight - quantized, hessian).sum())
    energy = float(quadratic_error(weight, hessian).sum())
    if energy <= 0:
        return 0.0 if error <= 0 else math.inf
    return max(error, 0.0) / energy


def _round_to_nearest(weight: Tensor, config: CompressionConfig) -> tuple[Tensor, Grid, Classes]:
    grid = scaled(weight, config)
    x = weight / (grid.steps(weight.shape[1]) * grid.scales(weight.shape[0])[:, None])
    classes = Classes.single(*x.shape, device=x.device)
    return nearest(x, grid), grid, classes
