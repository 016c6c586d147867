r"""The quadratic side of the objective: H, H', W' and the factor that Optimal Brain Surgeon needs.

J(Q) = 1/2 tr((W - Q) H (W - Q)^T) + lmbda R(Q). A rate that is quadratic but for a remainder,
R = sum_ij gamma_j/2 W_ij^2 + remainder, joins the first term by completing the square:

    H' = H + lmbda diag(gamma),   W' = W H H'^-1,   H'^-1 = C'^T C' with C' upper triangular.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cerwu_gpu.config import DampingBy
from cerwu_gpu.errors import CalibrationError, FactorizationError, ModelError
from cerwu_gpu.threads import one_thread

DRIFT_SHARE = 0.25
"""Share of the correction that is made: the regression overfits its tokens, layer after layer."""
DRIFT_DAMPING = 0.01
"""Share of the mean diagonal entry that is added to H_hat before the regression solves with it."""
MODERATE = (2.0**-24, 2.0**24)
"""Range of largest entries of W and H whose products and sums stay well within float32."""
TRIANGLE = 192
"""Columns up to which a triangular matrix is inverted by LAPACK at once."""
SHRINKAGE_LIMIT = 1e3
"""Maximum weight of mu I beside H: at it, H no longer counts."""
DAMPING_LIMIT = 1.0
"""Maximum damping, as a multiple of the diagonal: beyond, little of H would be left."""


def check_finite(weight: Tensor, hessian: Tensor, sensitivities: Sequence[Tensor]) -> None:
    """Refuse inputs of which no objective can be made.

    Raises:
        ModelError: a weight is NaN or infinite.
        CalibrationError: an entry of the Hessian is, or a sensitivity is not finite and > 0.
    """
    if not _finite(weight):
        raise ModelError("it has weights that are NaN or infinite: mend them, or exclude it.")
    if not _finite(hessian):
        raise CalibrationError("its Hessian is not finite in float32: check the weights before it.")
    for alpha in sensitivities:
        if not (_finite(alpha) and float(alpha.min()) > 0):
            raise CalibrationError(
                "its sensitivities are not finite and positive: take another sensitivity."
            )


def _finite(x: Tensor) -> bool:
    """Return whether no entry is NaN, which a minimum passes on, or infinite."""
    return x.numel() == 0 or all(math.isfinite(float(end)) for end in torch.aminmax(x))


def damp(hessian: Tensor, damping: float, by: DampingBy) -> Tensor:
    """Return H [n, n] in float64, the diagonal raised, and 1 on it for inputs never active.

    The diagonal grows by `damping` times its median (or mean) over the active inputs; a few
    outlier inputs dictate the mean.
    """
    damped = hessian.to(torch.float64, copy=True)
    diagonal = damped.diagonal()
    active = diagonal > 0
    if bool(active.any()):
        active_part = diagonal[active]
        usual = active_part.median() if by == "median" else active_part.mean()
        raised = damping * usual
        diagonal[~active] = 1.0
        diagonal += raised
    else:
        diagonal.fill_(1.0)
    return damped


def inverse_factor(hessian: Tensor) -> Tensor:
    """Return C [n, n] float64, upper triangular, H^-1 = C^T C, of a positive definite H (float64).

    With R the upper factor of H = R R^T, C = R^-1: no inverse of H is ever formed.

    Raises:
        FactorizationError: H is not numerically positive definite.
    """
    return inverse_upper(upper_factor(hessian))


def inverse_upper(upper: Tensor) -> Tensor:
    """Return the inverse of an upper triangular matrix [n, n], by halves.

    Most of it are matrix products then, which do not touch the zeros below the diagonal:

        [A B; 0 D]^-1 = [A^-1, -A^-1 B D^-1; 0, D^-1].
    """
    if len(upper) <= TRIANGLE:
        identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
        with one_thread():
            small: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
        return small
    half = len(upper) // 2
    first, last = inverse_upper(upper[:half, :half]), inverse_upper(upper[half:, half:])
    inverse = torch.zeros_like(upper)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = -(first @ upper[:half, half:]) @ last
    return inverse


def upper_factor(hessian: Tensor) -> Tensor:
    """Return R [n, n] float64, upper triangular, H = R R^T: Cholesky's factor of H read backwards.

    Raises:
        FactorizationError: H is not numerically positive definite.
    """
    with one_thread():
        backwards, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(info) != 0 or not bool(torch.isfinite(backwards).all()):
        raise FactorizationError(
            "the Hessian is not positive definite: give more calibration text or more damping."
        )
    upper: Tensor = backwards.flip(0, 1)
    return upper


def shrinkage(hessian: Tensor, tokens: int | None) -> float:
    """Return how far a Hessian of fewer tokens than columns is to be taken toward mu I, mu the mean
    of its diagonal: delta >= 0 of (H + delta mu I) / (1 + delta); 0 where there are tokens enough.

    Of p < n tokens, n - p directions look free of cost, and the search would put its errors there.
    The oracle approximating shrinkage (Chen et al., arXiv 0907.4698) weighs mu I by

        rho = ((1 - 2/n) tr(H^2) + tr(H)^2) / ((p + 1 - 2/n) (tr(H^2) - tr(H)^2 / n)),

    at most 1, and delta = rho / (1 - rho).

    Args:
        hessian: [n, n], undamped.
        tokens: p; None: enough.
    """
    columns = len(hessian)
    if not tokens or tokens >= columns:
        return 0.0
    trace = float(hessian.diagonal().sum(dtype=torch.float64))
    # Of the share of each entry in the trace, so that no square leaves its range.
    square = float((hessian / trace).square().sum(dtype=torch.float64)) if trace > 0 else 0.0
    spread = square - 1 / columns
    if spread <= 0:
        return SHRINKAGE_LIMIT
    weight = (1 - 2 / columns) * square + 1
    rho = min(weight / ((tokens + 1 - 2 / columns) * spread), 1.0)
    return min(rho / max(1 - rho, 1e-9), SHRINKAGE_LIMIT)


def shrunk(hessian: Tensor, delta: float) -> Tensor:
    """Return H + delta mu I (see `shrinkage`); H itself where delta is 0."""
    if delta == 0:
        return hessian
    moved = hessian.clone()
    moved.diagonal().add_(delta * hessian.diagonal().mean())
    return moved


def factor_with_damping(
    hessian: Tensor, damping: float, by: DampingBy
) -> tuple[Tensor, Tensor, float]:
    """Damp and factor H, with ten times more damping as often as it takes.

    Returns:
        The damped H and its upper factor R [n, n] float64, and the damping that was used.

    Raises:
        FactorizationError: even DAMPING_LIMIT does not help.
    """
    used = damping
    while True:
        damped = damp(hessian, used, by)
        try:
            return damped, upper_factor(damped), used
        except FactorizationError:
            used = max(10 * used, 1e-6)
            if used > DAMPING_LIMIT:
                raise


def complete_square(weight: Tensor, hessian: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """Return W' [m, n] float32 and C' [n, n] float64 for H' = H + diag(penalty).

    Args:
        weight: W [m, n] float32.
        hessian: damped H [n, n] float64.
        penalty: lmbda gamma_j [n] float64.
    """
    factor = inverse_factor(hessian + torch.diag(penalty))
    # Half of the penalty goes into C in float64: the products stay in float32's range.
    narrow, root = factor.to(weight.dtype), penalty.sqrt()
    scaled, root = (factor * root).to(weight.dtype), root.to(weight.dtype)
    if len(weight) < len(factor):
        return torch.addmm(weight, (weight * root) @ scaled.t(), narrow, alpha=-1), factor
    shrink = root[:, None] * (scaled.t() @ narrow)
    return torch.addmm(weight, weight, shrink, alpha=-1), factor


def drift_target(weight: Tensor, *, hessian: Tensor, cross: Tensor) -> Tensor:
    r"""Return weights to quantize that map the compressed model's inputs to the original outputs.

    |W X - Q X_hat|^2 is, up to a constant, |(W_hat - Q) X_hat|^2 with
    W_hat = W G H_hat^-1 = W + W (G - H_hat) H_hat^-1. The inverse is damped by DRIFT_DAMPING, and
    W goes DRIFT_SHARE of the way.

    Args:
        weight: W [m, n] float32.
        hessian: H_hat = (2/p) X_hat X_hat^T [n, n].
        cross: G = (2/p) X X_hat^T [n, n].
    """
    damped = damp(hessian, DRIFT_DAMPING, "mean")
    difference = cross - hessian
    if len(weight) < len(hessian):
        moved = (weight @ difference.to(weight.dtype)).to(torch.float64)
        return weight + DRIFT_SHARE * solve(damped, moved.t()).t().to(weight.dtype)
    shift = solve(damped, difference.t().to(torch.float64)).t().to(weight.dtype)
    return torch.addmm(weight, weight, shift, alpha=DRIFT_SHARE)


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Return matrix^-1 right [n, k] float64, for a symmetric matrix that is positive definite, or
    nearly so."""
    with one_thread():
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0:
            return torch.cholesky_solve(right, factor)
        solution: Tensor = torch.linalg.solve(matrix, right)
        return solution


def normalised_factor(factor: Tensor, step: Tensor) -> Tensor:
    """Return V_jk = (step_j / step_k) C_jk / C_jj [n, n] float32, unit upper triangular."""
    scale = step.to(factor.dtype)
    ratio = factor / factor.diagonal()[:, None]
    return (ratio * scale[:, None] / scale[None, :]).to(torch.float32)


def quadratic_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """Return D H D^T of each row, [m] float64, of D [m, n] and the undamped H [n, n], both finite.

    The products are float32; powers of two in front of them keep all of them in its range.
    """
    unit, scale = _power_of_two(difference), _power_of_two(hessian)
    narrow = (difference / unit).to(torch.float32)
    error = (narrow @ (hessian / scale).to(torch.float32)) * narrow
    return error.sum(dim=1, dtype=torch.float64) * (scale * unit * unit)


@dataclass(frozen=True)
class OutputLoss:
    """Squared output errors of a matrix W [m, n] under an undamped H, with W H computed once.

    Products are float32, of W / unit and H / scale, powers of two that keep them in its range.

    Attributes:
        weight: W / unit [m, n] float32.
        hessian: H / scale [n, n] float32.
        product: their product [m, n].
    """

    weight: Tensor
    hessian: Tensor
    product: Tensor
    unit: float
    scale: float

    @staticmethod
    def of(weight: Tensor, hessian: Tensor) -> "OutputLoss":
        """Return the loss for W [m, n] and H [n, n], both finite."""
        unit, scale = _moderate(weight), _moderate(hessian)
        narrow = weight / unit if unit != 1 else weight
        form = (hessian / scale if scale != 1 else hessian).to(torch.float32)
        return OutputLoss(narrow, form, narrow @ form, unit, scale)

    def times_hessian(self, quantized: Tensor) -> Tensor:
        """Return Q H [m, n] in the units of `product`."""
        return (quantized / self.unit if self.unit != 1 else quantized) @ self.hessian

    def energy(self) -> Tensor:
        """Return W H W^T of each row, [m] float64."""
        return self._summed(self.weight * self.product)

    def error(self, quantized: Tensor, product: Tensor) -> Tensor:
        """Return (W - Q) H (W - Q)^T of each row, [m] float64; `product` is of `times_hessian`."""
        narrow = quantized / self.unit if self.unit != 1 else quantized
        return self._summed((self.weight - narrow).mul_(self.product - product))

    def _summed(self, terms: Tensor) -> Tensor:
        return terms.sum(dim=1).to(torch.float64) * (self.scale * self.unit * self.unit)


def _moderate(x: Tensor) -> float:
    """Return 1 where the largest |x| is moderate, else the power of two to divide by."""
    size = _power_of_two(x)
    return 1.0 if MODERATE[0] <= size <= MODERATE[1] else size


def _power_of_two(x: Tensor) -> float:
    """Return the largest power of two <= max |x| whose inverse is in float32; 1 for zeros."""
    size = float(x.abs().max())
    return 2.0 ** max(math.frexp(size)[1] - 1, -126) if size > 0 else 1.0
