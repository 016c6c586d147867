"""One Hessian and the matrices that share it: from floats to integers and their tables."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from cerwu_gpu.config import CompressionConfig, Uniform, Values, Waterfilled
from cerwu_gpu.quantize.classes import Classes
from cerwu_gpu.quantize.grid import Grid, nearest, scaled
from cerwu_gpu.quantize.limit import limit_bits
from cerwu_gpu.quantize.objective import (
    OutputLoss,
    check_finite,
    factor_with_damping,
    quadratic_error,
    usual_damping,
)
from cerwu_gpu.quantize.problem import Problem
from cerwu_gpu.quantize.refit import Quadratic, refit
from cerwu_gpu.quantize.symbols import QuantizedMatrix, finish_matrix
from cerwu_gpu.threads import one_thread

NARROW_COLUMNS = 4096
"""Columns up to which a stack is one thread's work, beside other stacks where there are any."""


@dataclass(frozen=True)
class QuantizedStack:
    """The quantized matrices of a stack, and their losses.

    Attributes:
        matrices: in the order given.
        relative_losses: tr((W-Q) H (W-Q)^T) / tr(W H W^T) of each, with the undamped H.
        damping: the damping of the Hessian, by the settings or by the number of inputs; None: the
            method takes no Hessian.
        more_damping: the damping that the factorisation needed where that was not enough; else
            None.
        find_limits: functions that return the fewest bits per weight for each matrix's loss,
            weighted by the sensitivities (limit.py), from the eigenvalues of a matrix [n, n]; None
            where no limit was asked for, or the loss is 0.
    """

    matrices: tuple[QuantizedMatrix, ...]
    relative_losses: tuple[float, ...]
    damping: float | None
    more_damping: float | None
    find_limits: tuple[Callable[[], float | None], ...]

    @property
    def limits(self) -> tuple[float | None, ...]:
        """Fewest bits per weight for the loss of each matrix."""
        with one_thread():
            return tuple(find() for find in self.find_limits)


def quantize_stack(
    weights: Sequence[Tensor],
    hessian: Tensor,
    config: CompressionConfig,
    sensitivities: Sequence[Tensor] | None = None,
    rows_seen: int | None = None,
) -> QuantizedStack:
    """Quantize matrices [m_k, n] float32 that see the same inputs, in one pass.

    Args:
        weights: the matrices; all have n columns.
        hessian: [n, n], undamped.
        config: method, grid, rate and trade-off.
        sensitivities: alpha [m_k] float32 > 0 of each matrix, the cost of a unit of squared
            error in each row; None: 1 everywhere.
        rows_seen: number of inputs that the Hessian is a mean of, from which its damping follows
            unless the configuration gives one; None: many.

    Raises:
        FactorizationError: the Hessian cannot be factored.
        CerwuError: a subclass, where something is not finite, or integers leave their range.
    """
    # Operations on wide matrices are large enough for all of torch's threads.
    with one_thread() if len(hessian) <= NARROW_COLUMNS else nullcontext():
        return _quantize(weights, hessian, config, sensitivities, rows_seen)


def _quantize(
    weights: Sequence[Tensor],
    hessian: Tensor,
    config: CompressionConfig,
    sensitivities: Sequence[Tensor] | None,
    rows_seen: int | None,
) -> QuantizedStack:
    weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
    check_finite(weight, hessian, sensitivities or ())
    bounds = [0, *torch.tensor([len(w) for w in weights]).cumsum(0).tolist()]
    states = config.states
    raised: Tensor | None = None
    alpha = weight.new_ones(len(weight)) if sensitivities is None else torch.cat([*sensitivities])
    if not isinstance(config.grid, Waterfilled) and config.grid.method == "rtn":
        symbols, grid, classes = _round_to_nearest(weight, config.grid)
        damping = more_damping = None
    else:
        damping = config.objective.damping
        if damping is None:
            damping = usual_damping(rows_seen, len(hessian))
        damped, upper, used = factor_with_damping(hessian, damping, config.objective.damping_by)
        more_damping = used if used != damping else None
        problem = Problem.build(weight, alpha, damped, upper, bounds, config)
        symbols, grid, classes = problem.solve(), problem.grid, problem.classes
        if not config.bounded:
            raised = (damped.diagonal() - hessian.diagonal()).to(torch.float32)
        del damped, upper, problem
    matrices, losses, limits = [], [], []
    for first, last in pairwise(bounds):
        rows = slice(first, last)
        output = OutputLoss.of(weight[rows], hessian)
        matrix = finish_matrix(symbols[rows], grid, rows, classes, states)
        if raised is not None:
            fitted = Quadratic(output, raised, alpha[rows], config.lmbda)
            matrix, product = refit(matrix, fitted)
            quantized = matrix.weight(torch.float32)
        else:
            quantized = matrix.weight(torch.float32)
            product = output.times_hessian(quantized)
        matrices.append(matrix)
        errors = output.error(quantized, product)
        losses.append(_share(float(errors.sum()), float(output.energy().sum())))
        loss = float((alpha[rows] * errors).sum())
        finds = partial(_limit, weight[rows], hessian, alpha[rows], loss)
        limits.append(finds if weight.shape[1] <= config.limit_columns else _no_limit)
    return QuantizedStack(tuple(matrices), tuple(losses), damping, more_damping, tuple(limits))


def _limit(weight: Tensor, hessian: Tensor, alpha: Tensor, loss: float) -> float | None:
    """Return the fewest bits per weight for the loss that the search weighs bits against."""
    bits = limit_bits(alpha.sqrt()[:, None] * weight, hessian, max(loss, 0.0))
    return bits if math.isfinite(bits) else None


def _no_limit() -> None:
    """Return None: no limit was asked for."""


def relative_loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Return tr((W-Q) H (W-Q)^T) / tr(W H W^T); 0 where W has no effect and Q equals it."""
    error = float(quadratic_error(weight - quantized, hessian).sum())
    return _share(error, float(quadratic_error(weight, hessian).sum()))


def _share(error: float, energy: float) -> float:
    if energy <= 0:
        return 0.0 if error <= 0 else math.inf
    return max(error, 0.0) / energy


def _round_to_nearest(weight: Tensor, given: Uniform | Values) -> tuple[Tensor, Grid, Classes]:
    grid = scaled(weight, given)
    x = weight / (grid.steps(weight.shape[1]) * grid.scales(weight.shape[0])[:, None])
    classes = Classes.single(*x.shape, device=x.device)
    return nearest(x, grid), grid, classes
