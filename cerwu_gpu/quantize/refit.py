r"""After the rounding: the steps of the columns and the scales of the rows, fitted once more.

With the integers v_ij fixed, Q_ij = t_i step_j v_ij is linear in the steps and in the scales, and

    J = 1/2 sum_i alpha_i (W - Q)_i H (W - Q)_i^T + lmbda R

has a closed-form minimum in either. For the steps, with beta_i = alpha_i t_i^2,

    A step = b,   A = H o (V^T diag(beta) V),   b_j = sum_i alpha_i t_i v_ij (W H)_ij;

for the rows each t_i is a ratio of two numbers. Better fitted codes are finer codes, which cost
more: a fit is kept at the resolution at which J, with the bits of the codes, is lowest, if at any.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cerwu_gpu.coding import side
from cerwu_gpu.quantize.objective import OutputLoss, solve
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
    """The parts of J's first term, for one matrix.

    Attributes:
        output: W [m, n] and the undamped H.
        raised: [n] float32, the damping added to the diagonal of H.
        sensitivity: alpha [m] float32.
        lmbda: the price of a bit.
    """

    output: OutputLoss
    raised: Tensor
    sensitivity: Tensor
    lmbda: float

    @property
    def weight(self) -> Tensor:
        """W [m, n] float32."""
        output = self.output
        return output.weight * output.unit if output.unit != 1 else output.weight

    @property
    def hessian(self) -> Tensor:
        """H [n, n] float32, damped like the one that the search used."""
        return self.output.hessian * self.output.scale + torch.diag(self.raised)

    def damped(self, matrix: Tensor, product: Tensor) -> Tensor:
        """Return a matrix times the damped H, given `product` with the undamped one."""
        scale = self.output.unit * self.output.scale
        wide = product * scale if scale != 1 else product
        return torch.addcmul(wide, matrix, self.raised)


def refit(matrix: QuantizedMatrix, problem: Quadratic) -> tuple[QuantizedMatrix, Tensor]:
    """Fit steps, then scales, anew wherever that lowers J.

    Returns:
        The matrix with its new codes, and its weights' product with H as `OutputLoss` has it.
    """
    return _refit_rows(_refit_columns(matrix, problem), problem)


def _refit_columns(matrix: QuantizedMatrix, problem: Quadratic) -> QuantizedMatrix:
    output = problem.output
    step = step_values(matrix.column_step).to(torch.float64)
    level = matrix.weight(torch.float32).div_(step_values(matrix.column_step))
    weighed = level * problem.sensitivity[:, None]
    curvature = (weighed.t() @ level).mul_(problem.hessian).to(torch.float64)
    weight, target = problem.weight, torch.zeros_like(step)
    for rows in strips(*level.shape):
        product = problem.damped(weight[rows], output.product[rows])
        target += product.mul_(weighed[rows]).to(torch.float64).sum(dim=0)
    # Solved for deviations from the present steps, so that a column of zeros keeps its step.
    ridge = RIDGE * float(curvature.diagonal().mean())
    if ridge == 0:
        return matrix
    damped = curvature + ridge * torch.eye(len(step), dtype=torch.float64, device=step.device)
    fitted = step + solve(damped, (target - curvature @ step)[:, None])[:, 0]

    def loss(codes: Tensor) -> float:
        moved = step_values(codes).to(torch.float64) - step
        slope = curvature @ step - target
        return float(slope @ moved + 0.5 * (moved @ curvature @ moved))

    classes = matrix.column_class
    codes = _best("step_code", matrix.column_step, classes, fitted, loss, problem.lmbda)
    return replace(matrix, column_step=codes)


def _refit_rows(matrix: QuantizedMatrix, problem: Quadratic) -> tuple[QuantizedMatrix, Tensor]:
    quantized = matrix.weight(torch.float32)
    product = problem.output.times_hessian(quantized)
    weight, overlaps, energies = problem.weight, [], []
    for rows in strips(*quantized.shape):
        pulled = problem.damped(quantized[rows], product[rows])
        overlaps.append((pulled * weight[rows]).sum(dim=1))
        energies.append(pulled.mul_(quantized[rows]).sum(dim=1))
    overlap, energy = (torch.cat(parts).to(torch.float64) for parts in (overlaps, energies))
    scale = step_values(matrix.row_scale).to(torch.float64)
    alpha = problem.sensitivity.to(torch.float64)
    usable = (energy > 0) & (overlap > 0)
    fitted = torch.where(usable, scale * overlap / energy.where(usable, 1.0), scale)

    def loss(codes: Tensor) -> float:
        ratio = step_values(codes).to(torch.float64) / scale
        change = 0.5 * (ratio.square() - 1) * energy - (ratio - 1) * overlap
        return float((alpha * change).sum())

    classes = matrix.row_class
    codes = _best("row_scale_code", matrix.row_scale, classes, fitted, loss, problem.lmbda)
    ratio = step_values(codes) / step_values(matrix.row_scale)
    return replace(matrix, row_scale=codes), product.mul_(ratio[:, None])


def _best(
    name: Literal["step_code", "row_scale_code"],
    codes: Tensor,
    classes: Tensor,
    fitted: Tensor,
    loss: Callable[[Tensor], float],
    lmbda: float,
) -> Tensor:
    """Return the codes [k] of lowest J: those at hand, or the `fitted` values at some resolution.

    `loss` is the change of J's first term; the bits are those of the side array `name`.
    """
    step = step_values(codes).to(torch.float64)
    fitted = torch.where(fitted > 0, fitted, step).clamp(step / 2, step * 2)
    best, least = codes, loss(codes) + lmbda * _stored_bits(name, codes, classes)
    for unit in UNITS:
        candidate = step_codes(fitted, unit)
        change = loss(candidate)
        if change + lmbda * LEAST_SHARE * _entropy_bits(candidate) >= least:
            continue  # and deflating it takes as long as everything else here
        objective = change + lmbda * _stored_bits(name, candidate, classes)
        if objective < least:
            best, least = candidate, objective
    return best


def _entropy_bits(codes: Tensor) -> float:
    """Return the bits of the codes [k] under their own frequencies."""
    counts = np.unique(codes.cpu().numpy(), return_counts=True)[1]
    return float((counts * np.log2(len(codes) / counts)).sum())


def _stored_bits(name: str, codes: Tensor, classes: Tensor) -> int:
    """Return the bits of the codes in the side data."""
    predictor = classes.to(torch.uint8).cpu().numpy()
    return 8 * side.packed_size(name, codes.cpu().numpy(), predictor)
