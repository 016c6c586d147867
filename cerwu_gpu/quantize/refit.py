r"""After the rounding: the steps of the columns and the scales of the rows, fitted once more.

With the integers v_ij fixed, Q_ij = t_i step_j v_ij is linear in the steps and in the scales, and

    J = 1/2 sum_i alpha_i (W - Q)_i H (W - Q)_i^T + lmbda R

has a closed-form minimum in either. For the steps, with beta_i = alpha_i t_i^2,

    A step = b,   A = H o (V^T diag(beta) V),   b_j = sum_i alpha_i t_i v_ij (W H)_ij;

for the rows each t_i is a ratio of two numbers. Better fitted codes are finer codes, which cost
more: a fit is kept at the resolution at which J, with the bits of the codes, is lowest, if at any.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cerwu_gpu.coding import side
from cerwu_gpu.quantize.objective import OutputLoss, product, solve
from cerwu_gpu.quantize.strips import strips
from cerwu_gpu.quantize.symbols import QuantizedMatrix
from cerwu_gpu.steps import step_codes, step_values

UNITS = (64, 32, 16, 8, 4, 2, 1)
"""Resolutions that are tried: codes are multiples of a unit, of 2**(1/256) each."""
LEAST_SHARE = 0.5
"""Share of the bits under their own frequencies below which codes are hardly ever stored."""
RIDGE = 1e-6
"""Share of A's mean diagonal entry added to it: columns of zeros only have no equation."""


@dataclass(frozen=True)
class Quadratic:
    """The parts of J's first term, for B matrices of equal shape.

    Attributes:
        output: W [B, m, n] and the undamped H.
        raised: [B, n] float32, the damping added to the diagonals of H.
        sensitivity: alpha [B, m] float32.
        lmbda: the price of a bit.
    """

    output: OutputLoss
    raised: Tensor
    sensitivity: Tensor
    lmbda: float

    @property
    def weight(self) -> Tensor:
        """W [B, m, n] float32."""
        return self.output.weight * self.output.unit

    @property
    def hessian(self) -> Tensor:
        """H [B, n, n] float32, damped like the one that the search used."""
        return _raised(self.output.hessian * self.output.scale, self.raised)

    def damped(self, matrix: Tensor, product: Tensor) -> Tensor:
        """Return matrices times the damped H, given `product` with the undamped one."""
        wide = product * (self.output.unit * self.output.scale).to(product.dtype)
        return torch.addcmul(wide, matrix, self.raised[:, None, :])


def refit(
    matrices: Sequence[QuantizedMatrix], problem: Quadratic
) -> tuple[list[QuantizedMatrix], Tensor]:
    """Fit steps, then scales, anew wherever that lowers J.

    Returns:
        The matrices with their new codes, and their weights' products with H [B, m, n] as
        `OutputLoss` has them.
    """
    return _refit_rows(_refit_columns(matrices, problem), problem)


def _refit_columns(
    matrices: Sequence[QuantizedMatrix], problem: Quadratic
) -> list[QuantizedMatrix]:
    codes = torch.stack([matrix.column_step for matrix in matrices])
    narrow = step_values(codes)
    step = narrow.to(torch.float64)
    level = weights_of(matrices).div_(narrow[:, None, :])
    weighed = level * problem.sensitivity[..., None]
    narrow_curvature = product(weighed.mT, level).mul_(problem.hessian)
    weight, behind, target = problem.weight, problem.output.product, torch.zeros_like(step)
    for rows in strips(*level.shape[1:]):
        pulled = problem.damped(weight[:, rows], behind[:, rows])
        target += pulled.mul_(weighed[:, rows]).to(torch.float64).sum(dim=1)
    del level, weighed, weight
    curvature = narrow_curvature.to(torch.float64)
    # Solved for deviations from the present steps, so that a column of zeros keeps its step.
    ridge = RIDGE * curvature.diagonal(dim1=1, dim2=2).mean(dim=1)
    slope = _applied(curvature, step) - target
    # In place, and made anew from float32 below: that takes half the memory.
    curvature = _raised(curvature, ridge.where(ridge > 0, 1.0)[:, None])
    fitted = step + solve(curvature, -slope[..., None])[..., 0]
    del curvature

    def losses(codes: Tensor) -> Tensor:
        moved = step_values(codes).to(torch.float64) - step[:, None, :]
        bent = (product(moved, narrow_curvature.to(torch.float64)) * moved).sum(dim=-1)
        return (moved * slope[:, None, :]).sum(dim=-1) + 0.5 * bent

    classes = [matrix.column_class for matrix in matrices]
    best = _best("step_code", codes, classes, fitted, losses, problem.lmbda)
    kept = zip(matrices, best.where(ridge[:, None] > 0, codes), strict=True)
    return [replace(matrix, column_step=chosen) for matrix, chosen in kept]


def _refit_rows(
    matrices: Sequence[QuantizedMatrix], problem: Quadratic
) -> tuple[list[QuantizedMatrix], Tensor]:
    quantized = weights_of(matrices)
    behind = problem.output.times_hessian(quantized)
    weight, overlaps, energies = problem.weight, [], []
    for rows in strips(*quantized.shape[1:]):
        pulled = problem.damped(quantized[:, rows], behind[:, rows])
        overlaps.append((pulled * weight[:, rows]).sum(dim=2))
        energies.append(pulled.mul_(quantized[:, rows]).sum(dim=2))
    overlap, energy = (torch.cat(parts, dim=1).to(torch.float64) for parts in (overlaps, energies))
    codes = torch.stack([matrix.row_scale for matrix in matrices])
    narrow = step_values(codes)
    scale = narrow.to(torch.float64)
    alpha = problem.sensitivity.to(torch.float64)
    usable = (energy > 0) & (overlap > 0)
    fitted = torch.where(usable, scale * overlap / energy.where(usable, 1.0), scale)

    def losses(codes: Tensor) -> Tensor:
        ratio = step_values(codes).to(torch.float64) / scale[:, None, :]
        change = 0.5 * (ratio.square() - 1) * energy[:, None, :]
        change -= (ratio - 1) * overlap[:, None, :]
        return (alpha[:, None, :] * change).sum(dim=-1)

    classes = [matrix.row_class for matrix in matrices]
    best = _best("row_scale_code", codes, classes, fitted, losses, problem.lmbda)
    kept = zip(matrices, best, strict=True)
    ratio = step_values(best) / narrow
    done = [replace(matrix, row_scale=chosen) for matrix, chosen in kept]
    return done, behind.mul_(ratio[..., None])


def _raised(matrix: Tensor, by: Tensor) -> Tensor:
    """Return [B, n, n] with its diagonal raised by [B, n] or [B, 1], in place."""
    matrix.diagonal(dim1=1, dim2=2).add_(by)
    return matrix


def weights_of(matrices: Sequence[QuantizedMatrix]) -> Tensor:
    """Return the weights [B, m, n] float32 that every decoder gives back."""
    if len(matrices) == 1:
        return matrices[0].weight(torch.float32)[None]
    return torch.stack([matrix.weight(torch.float32) for matrix in matrices])


def _applied(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return matrix @ vector of [B, n, n] and [B, n], on a CPU one by one as `product` does."""
    if matrix.device.type != "cpu":
        return (matrix @ vector[..., None])[..., 0]
    return torch.stack([each @ own for each, own in zip(matrix, vector, strict=True)])


def _best(
    name: Literal["step_code", "row_scale_code"],
    codes: Tensor,
    classes: Sequence[Tensor],
    fitted: Tensor,
    losses: Callable[[Tensor], Tensor],
    lmbda: float,
) -> Tensor:
    """Return the codes [B, k] of lowest J: those at hand, or the `fitted` values at some
    resolution.

    `losses` returns the changes [B, U] of J's first term with codes [B, U, k]; the bits are those
    of the side array `name`.
    """
    step = step_values(codes).to(torch.float64)
    fitted = torch.where(fitted > 0, fitted, step).clamp(step / 2, step * 2)
    candidates = torch.stack([codes, *(step_codes(fitted, unit) for unit in UNITS)], dim=1)
    changes = losses(candidates).tolist()
    arrays = candidates.cpu().numpy()
    chosen = []
    for array, own, change in zip(arrays, classes, changes, strict=True):
        predictor = own.to(torch.uint8).cpu().numpy()
        best, least = 0, change[0] + lmbda * _stored_bits(name, array[0], predictor)
        for number in range(1, len(array)):
            if change[number] >= least:
                continue  # no bits are negative
            if change[number] + lmbda * LEAST_SHARE * _entropy_bits(array[number]) >= least:
                continue  # and deflating it takes as long as everything else here
            bits = _stored_bits(name, array[number], predictor)
            if change[number] + lmbda * bits < least:
                best, least = number, change[number] + lmbda * bits
        chosen.append(best)
    stacks = torch.arange(len(chosen), device=codes.device)
    return candidates[stacks, torch.tensor(chosen, device=codes.device)]


def _entropy_bits(codes: NDArray[np.int16]) -> float:
    """Return the bits of the codes [k] under their own frequencies."""
    counts = np.unique(codes, return_counts=True)[1]
    return float((counts * np.log2(len(codes) / counts)).sum())


def _stored_bits(name: str, codes: NDArray[np.int16], classes: NDArray[np.uint8]) -> int:
    """Return the bits of the codes in the side data."""
    return 8 * side.packed_size(name, codes, classes)
