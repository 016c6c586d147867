"""Hessians and the matrices that share each: from floats to integers and their tables."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from cerwu_gpu.config import CompressionConfig, Uniform, Values, Waterfilled
from cerwu_gpu.memory import give_back
from cerwu_gpu.quantize.classes import Classes
from cerwu_gpu.quantize.grid import Grid, nearest, scaled
from cerwu_gpu.quantize.limit import limit_bits
from cerwu_gpu.quantize.objective import (
    Factors,
    OutputLoss,
    check_finite,
    factors_with_damping,
    quadratic_error,
    usual_damping,
)
from cerwu_gpu.quantize.problem import Problem
from cerwu_gpu.quantize.refit import Quadratic, refit, weights_of
from cerwu_gpu.quantize.symbols import QuantizedMatrix, finish_matrices
from cerwu_gpu.threads import one_thread

NARROW_COLUMNS = 4096
"""Columns up to which a stack is one thread's work, beside other stacks where there are any."""
LARGE = 1 << 22
"""Numbers in the Hessians that are searched together from which their memory counts."""


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


@dataclass(frozen=True)
class Stack:
    """Matrices that see the same inputs.

    Attributes:
        weights: [m_k, n] float32 each.
        hessian: [n, n], undamped.
        sensitivities: alpha [m_k] float32 > 0 of each matrix, the cost of a unit of squared
            error in each row; None: 1 everywhere.
        rows_seen: number of inputs that the Hessian is a mean of, from which its damping follows
            unless the configuration gives one; None: many.
    """

    weights: Sequence[Tensor]
    hessian: Tensor
    sensitivities: Sequence[Tensor] | None = None
    rows_seen: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, m_1, m_2, ...): stacks of equal shape can be quantized together."""
        return len(self.hessian), *map(len, self.weights)

    def alpha(self) -> Tensor:
        """Return the sensitivities of all rows [m]."""
        if self.sensitivities is None:
            return self.weights[0].new_ones(sum(map(len, self.weights)))
        return torch.cat([*self.sensitivities])


def quantize_stack(
    weights: Sequence[Tensor],
    hessian: Tensor,
    config: CompressionConfig,
    sensitivities: Sequence[Tensor] | None = None,
    rows_seen: int | None = None,
) -> QuantizedStack:
    """Quantize matrices [m_k, n] float32 that see the same inputs, in one pass.

    Args:
        weights, hessian, sensitivities, rows_seen: as in `Stack`.
        config: method, grid, rate and trade-off.

    Raises:
        FactorizationError: the Hessian cannot be factored.
        CerwuError: a subclass, where something is not finite, or integers leave their range.
    """
    return quantize_stacks([Stack(weights, hessian, sensitivities, rows_seen)], config)[0]


def quantize_stacks(stacks: Sequence[Stack], config: CompressionConfig) -> list[QuantizedStack]:
    """Quantize stacks of equal shape together; each one becomes what it would become alone.

    On waterfilled steps they share every operation and every launch, so that hundreds of small
    matrices, as the experts of a mixture are, are not all overhead. On a given grid they are
    quantized one by one, and on a CPU those whose bits would depend on the stacks beside them.

    Raises:
        FactorizationError: the Hessian of one cannot be factored.
        CerwuError: a subclass, where something is not finite, or integers leave their range.
        ValueError: the shapes differ.
    """
    if len({stack.shape for stack in stacks}) > 1:
        raise ValueError("the stacks differ in shape: quantize each one by itself.")
    alone = config.bounded or not _aligned(stacks[0], config)
    together = [[stack] for stack in stacks] if alone else [list(stacks)]
    # Operations on wide matrices are large enough for all of torch's threads.
    narrow = len(stacks[0].hessian) <= NARROW_COLUMNS
    with one_thread() if narrow else nullcontext():
        return [quantized for some in together for quantized in _quantize(some, config)]


def _aligned(stack: Stack, config: CompressionConfig) -> bool:
    """Return whether on its device each of many such stacks would begin as a single one does: on a
    CPU the library's products round by the alignment of their operands to 64 bytes."""
    if stack.hessian.device.type != "cpu":
        return True
    columns = len(stack.hessian)
    sizes = [columns * len(weight) for weight in stack.weights]
    whole = all(size % 16 == 0 for size in (config.objective.block_size, *sizes))
    return whole and columns % 8 == 0  # 16 numbers of 4 bytes, or 8 of 8 bytes


def _quantize(stacks: Sequence[Stack], config: CompressionConfig) -> list[QuantizedStack]:
    for stack in stacks:
        check_finite(stack.weights, stack.hessian, stack.sensitivities or ())
    weight = _batch([_below(stack.weights) for stack in stacks])
    hessian = _batch([stack.hessian for stack in stacks])
    alpha = _batch([stack.alpha() for stack in stacks])
    bounds = [0, *accumulate(map(len, stacks[0].weights))]
    raised: Tensor | None = None
    if not isinstance(config.grid, Waterfilled) and config.grid.method == "rtn":
        symbols, grid, classes = _round_to_nearest(weight, config.grid)
        dampings: list[float | None] = [None] * len(stacks)
        more_damping = dampings
    else:
        given = config.objective.damping
        asked = [
            usual_damping(stack.rows_seen, len(stack.hessian)) if given is None else given
            for stack in stacks
        ]
        damped, upper, used = factors_with_damping(hessian, asked, config.objective.damping_by)
        dampings = [*asked]
        more_damping = [
            now if now != first else None for now, first in zip(used, asked, strict=True)
        ]
        if not config.bounded:
            diagonals = (x.diagonal(dim1=1, dim2=2) for x in (damped, hessian))
            raised = torch.sub(*diagonals).to(torch.float32)
        factors = Factors(damped, upper)
        del damped, upper
        problem = Problem.build(weight, alpha, factors, bounds, config)
        symbols, grid, classes = problem.solve(), problem.grid, problem.classes
        del problem
        if hessian.numel() >= LARGE:
            give_back()
    finished = finish_matrices(symbols, grid, bounds, classes, config.states)
    done: list[_Done] = [_Done([], [], []) for _ in stacks]
    for number, (first, last) in enumerate(pairwise(bounds)):
        rows = slice(first, last)
        matrices = [own[number] for own in finished]
        output = OutputLoss.of(weight[:, rows], hessian)
        if raised is not None:
            fitted = Quadratic(output, raised, alpha[:, rows], config.lmbda)
            matrices, behind = refit(matrices, fitted)
            quantized = weights_of(matrices)
        else:
            quantized = weights_of(matrices)
            behind = output.times_hessian(quantized)
        errors = output.error(quantized, behind)
        energies = output.energy().sum(dim=1).tolist()
        plain = errors.sum(dim=1).tolist()
        weighed = (alpha[:, rows] * errors).sum(dim=1).tolist()
        for index, (stack, own) in enumerate(zip(stacks, done, strict=True)):
            own.matrices.append(matrices[index])
            own.losses.append(_share(plain[index], energies[index]))
            find = partial(
                _limit, weight[index, rows], stack.hessian, alpha[index, rows], weighed[index]
            )
            own.finds.append(find if weight.shape[2] <= config.limit_columns else _no_limit)
    return [
        QuantizedStack(tuple(own.matrices), tuple(own.losses), damping, more, tuple(own.finds))
        for own, damping, more in zip(done, dampings, more_damping, strict=True)
    ]


@dataclass(frozen=True)
class _Done:
    """The finished matrices of a stack, their relative losses and functions for their limits."""

    matrices: list[QuantizedMatrix]
    losses: list[float]
    finds: list[Callable[[], float | None]]


def _below(weights: Sequence[Tensor]) -> Tensor:
    """Return matrices of equal width one below the other."""
    return torch.cat(list(weights)) if len(weights) > 1 else weights[0]


def _batch(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors of equal shape as one, with an axis more in front; a single one uncopied."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0][None]


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
    """Return the nearest levels [1, m, n] of W [1, m, n]."""
    grid = scaled(weight[0], given)
    scales = grid.scales(weight.shape[1])
    x = weight / (grid.steps(weight.shape[2])[:, None, :] * scales[..., None])
    return nearest(x, grid), grid, Classes.single(*x.shape, device=x.device)
