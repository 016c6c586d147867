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

import torch
from torch import Tensor

from cerwu_gpu.coding import side
from cerwu_gpu.quantize.symbols import QuantizedMatrix
from cerwu_gpu.quantize.threads import one_thread
from cerwu_gpu.reference.dequantize import step_codes, step_values

UNITS = (64, 32, 16, 8, 4, 2, 1)
"""Resolutions that are tried: codes that are multiples of so many 2**(1/256)."""
RIDGE = 1e-6
"""Of A's mean diagonal entry: columns whose integers are all zero have no equation."""


@dataclass(frozen=True)
class Quadratic:
    """What J's first term is made of, for one matrix.

    Attributes:
        weight: W [m, n] float32.
        hessian: H [n, n] float32, damped like the one that the search used.
        sensitivity: alpha [m] float32.
        lmbda: what a bit costs.
    """

    weight: Tensor
    hessian: Tensor
    sensitivity: Tensor
    lmbda: float

    def of_rows(self, rows: slice) -> "Quadratic":
        """The same for some of the rows."""
        return Quadratic(self.weight[rows], self.hessian, self.sensitivity[rows], self.lmbda)


def refit(matrix: QuantizedMatrix, problem: Quadratic) -> QuantizedMatrix:
    """The matrix with its steps, then its scales, fitted anew wherever that lowers J."""
    return _refit_rows(_refit_columns(matrix, problem), problem)


def _refit_columns(matrix: QuantizedMatrix, problem: Quadratic) -> QuantizedMatrix:
    step = step_values(matrix.column_step).to(torch.float64)
    level = matrix.weight(torch.float32) / step_values(matrix.column_step)
    weighed = level * problem.sensitivity[:, None]
    curvature = ((weighed.t() @ level) * problem.hessian).to(torch.float64)
    target = (weighed * (problem.weight @ problem.hessian)).sum(dim=0, dtype=torch.float64)
    # Deviations from the steps at hand, so that a column without integers keeps its own.
    ridge = RIDGE * float(curvature.diagonal().mean())
    if ridge == 0:
        return matrix
    damped = curvature + ridge * torch.eye(len(step), dtype=torch.float64, device=step.device)
    with one_thread():
        fitted = step + torch.linalg.solve(damped, target - curvature @ step)

    def loss(codes: Tensor) -> float:
        moved = step_values(codes).to(torch.float64) - step
        slope = curvature @ step - target
        return float(slope @ moved + 0.5 * (moved @ curvature @ moved))

    classes = matrix.column_class
    codes = _best("step_code", matrix.column_step, classes, fitted, loss, problem.lmbda)
    return replace(matrix, column_step=codes)


def _refit_rows(matrix: QuantizedMatrix, problem: Quadratic) -> QuantizedMatrix:
    quantized = matrix.weight(torch.float32)
    pulled = quantized @ problem.hessian
    energy = (pulled * quantized).sum(dim=1, dtype=torch.float64)
    overlap = (pulled * problem.weight).sum(dim=1, dtype=torch.float64)
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
    return replace(matrix, row_scale=codes)


def _best(
    name: Literal["step_code", "row_scale_code"],
    codes: Tensor,
    classes: Tensor,
    fitted: Tensor,
    loss: Callable[[Tensor], float],
    lmbda: float,
) -> Tensor:
    """The codes [k] of lowest J: those at hand, or the `fitted` values at some resolution.

    `loss` is the change of J's first term; the bits are those of the side array `name`.
    """
    step = step_values(codes).to(torch.float64)
    fitted = torch.where(fitted > 0, fitted, step).clamp(step / 2, step * 2)
    candidates = [codes, *(step_codes(fitted, unit) for unit in UNITS)]

    def objective(candidate: Tensor) -> float:
        return loss(candidate) + lmbda * _stored_bits(name, candidate, classes)

    return min(candidates, key=objective)


def _stored_bits(name: str, codes: Tensor, classes: Tensor) -> int:
    """What the side data take for these codes."""
    array, predictor = codes.cpu().numpy(), classes.to(torch.uint8).cpu().numpy()
    if name == "step_code":
        arrays = {"step_code": array, "column_class": predictor}
        return 8 * len(side.pack(arrays, 1, len(array)))
    arrays = {"row_scale_code": array, "row_class": predictor}
    return 8 * len(side.pack(arrays, len(array), 1))
