r"""The quadratic side of the objective: H, H', W' and the factor that Optimal Brain Surgeon needs.

J(Q) = 1/2 tr((W - Q) H (W - Q)^T) + lmbda R(Q). A rate that is quadratic but for a remainder,
R = sum_ij gamma_j/2 W_ij^2 + remainder, joins the first term by completing the square:

    H' = H + lmbda diag(gamma),   W' = W H H'^-1,   H'^-1 = C'^T C' with C' upper triangular.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cerwu_gpu.config import DampingBy
from cerwu_gpu.errors import CalibrationError, FactorizationError, ModelError
from cerwu_gpu.quantize.strips import strips
from cerwu_gpu.threads import one_thread

DRIFT_SHARE = 0.25
"""Share of the correction that is made: the regression overfits its tokens, layer after layer."""
DRIFT_DAMPING = 0.01
"""Share of the mean diagonal entry that is added to H_hat before the regression solves with it."""
MODERATE = (2.0**-24, 2.0**24)
"""Range of largest entries of W and H whose products and sums stay well within float32."""
TRIANGLE = 192
"""Columns up to which a triangular matrix is inverted by LAPACK at once."""
DAMPING_LIMIT = 1.0
"""Maximum damping, as a multiple of the diagonal: beyond, little of H would be left."""
LEAST_DAMPING = 1e-3
"""Damping of a Hessian that is the mean of any number of inputs."""


def check_finite(
    weights: Sequence[Tensor], hessian: Tensor, sensitivities: Sequence[Tensor]
) -> None:
    """Refuse inputs of which no objective can be made.

    Raises:
        ModelError: a weight is NaN or infinite.
        CalibrationError: an entry of the Hessian is, or a sensitivity is not finite and > 0.
    """
    if not all(map(_finite, weights)):
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
    """Return H [..., n, n] in float64, the diagonal raised, and 1 on it for inputs never active.

    The diagonal grows by `damping` times its median (or mean) over the active inputs; a few
    outlier inputs dictate the mean.
    """
    damped = hessian.to(torch.float64, copy=True)
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    active = diagonal > 0
    number = active.sum(dim=-1, keepdim=True)
    if by == "median":
        ascending = diagonal.where(active, torch.inf).sort(dim=-1).values
        usual = ascending.gather(-1, (number - 1).clamp_min(0) // 2)
    else:
        usual = diagonal.where(active, 0.0).sum(dim=-1, keepdim=True) / number
    raised = diagonal.where(active, 1.0) + damping * usual
    diagonal.copy_(raised.where(number > 0, 1.0))
    return damped


def usual_damping(rows_seen: int | None, columns: int) -> float:
    """Return the damping of a Hessian [columns, columns] that is the mean of `rows_seen` inputs.

    The fewer inputs there are for each column, the more of H is theirs alone, and a matrix that is
    quantized against it does badly on any other text. None: so many that it does not matter.
    """
    if not rows_seen:
        return LEAST_DAMPING
    return min(max(math.sqrt(columns / rows_seen), LEAST_DAMPING), DAMPING_LIMIT)


def inverse_factor(hessian: Tensor) -> Tensor:
    """Return C [..., n, n] float64, upper triangular, H^-1 = C^T C, of positive definite H
    (float64).

    With R the upper factor of H = R R^T, C = R^-1: no inverse of H is ever formed.

    Raises:
        FactorizationError: an H is not numerically positive definite.
    """
    return inverse_upper(upper_factor(hessian))


def inverse_upper(upper: Tensor) -> Tensor:
    """Return the inverses of upper triangular matrices [..., n, n], by halves.

    Most of it are matrix products then, which do not touch the zeros below the diagonal:

        [A B; 0 D]^-1 = [A^-1, -A^-1 B D^-1; 0, D^-1].
    """
    columns = upper.shape[-1]
    if columns <= TRIANGLE:
        identity = torch.eye(columns, dtype=upper.dtype, device=upper.device)
        with one_thread():
            small: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
        return small
    half = columns // 2
    left, right = slice(half), slice(half, columns)
    first, last = inverse_upper(upper[..., left, left]), inverse_upper(upper[..., right, right])
    inverse = torch.zeros_like(upper)
    inverse[..., left, left], inverse[..., right, right] = first, last
    inverse[..., left, right] = -product(product(first, upper[..., left, right]), last)
    return inverse


def upper_factor(hessian: Tensor) -> Tensor:
    """Return R [..., n, n] float64, upper triangular, H = R R^T: Cholesky's factor of H read
    backwards.

    Raises:
        FactorizationError: an H is not numerically positive definite.
    """
    upper, definite = _factored(hessian)
    if not bool(definite.all()):
        raise FactorizationError(
            "the Hessian is not positive definite: give more calibration text or more damping."
        )
    return upper


def _factored(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Return R [..., n, n], and whether each H is numerically positive definite, [...] bool."""
    with one_thread():
        backwards, info = torch.linalg.cholesky_ex(hessian.flip(-2, -1))
    low, high = backwards.amin(dim=(-2, -1)), backwards.amax(dim=(-2, -1))  # NaN is passed on
    definite = (info == 0) & torch.isfinite(low) & torch.isfinite(high)
    return backwards.flip(-2, -1), definite


def factor_with_damping(
    hessian: Tensor, damping: float, by: DampingBy
) -> tuple[Tensor, Tensor, float]:
    """Damp and factor H [n, n], with ten times more damping as often as it takes.

    Returns:
        The damped H and its upper factor R [n, n] float64, and the damping that was used.

    Raises:
        FactorizationError: even DAMPING_LIMIT does not help.
    """
    damped, upper, used = factors_with_damping(hessian[None], [damping], by)
    return damped[0], upper[0], used[0]


def factors_with_damping(
    hessians: Tensor, dampings: Sequence[float], by: DampingBy
) -> tuple[Tensor, Tensor, list[float]]:
    """Damp and factor each H [B, n, n] by its damping as `factor_with_damping` does, together.

    Returns:
        [B, n, n], [B, n, n] and B numbers.

    Raises:
        FactorizationError: even DAMPING_LIMIT does not help one of them.
    """
    matrices = [damp(h, damping, by) for h, damping in zip(hessians, dampings, strict=True)]
    damped = (
        torch.stack(matrices) if len(matrices) > 1 else matrices[0][None]
    )  # a single one uncopied
    del matrices
    upper, definite = _factored(damped)
    used = list(dampings)
    for index in (~definite).nonzero().flatten().tolist():
        while not bool(definite[index]):
            used[index] = max(10 * used[index], 1e-6)
            if used[index] > DAMPING_LIMIT:
                upper_factor(damped[index])
            damped[index] = damp(hessians[index], used[index], by)
            upper[index], definite[index] = _factored(damped[index])
    return damped, upper, used


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix products a @ b, of batches [B, ., .] one by one on a CPU: the library
    rounds a batch by its size, and the result must not depend on what stands beside a matrix."""
    if a.ndim < 3 or a.device.type != "cpu":
        return a @ b
    if len(a) == 1:
        return (a[0] @ b[0])[None]
    out = a.new_empty(len(a), a.shape[1], b.shape[2])
    for index in range(len(a)):
        torch.mm(a[index], b[index], out=out[index])
    return out


def less_product(base: Tensor, a: Tensor, b: Tensor, share: float = 1.0) -> Tensor:
    """Return base - share * (a @ b), batches like `product`'s."""
    if base.ndim < 3:
        return torch.addmm(base, a, b, alpha=-share)
    if a.device.type != "cpu":
        return torch.baddbmm(base, a, b, alpha=-share)
    if len(a) == 1:
        return torch.addmm(base[0], a[0], b[0], alpha=-share)[None]
    out = torch.empty_like(base)
    for index in range(len(a)):
        torch.addmm(base[index], a[index], b[index], alpha=-share, out=out[index])
    return out


class Factors:
    """Damped Hessians H [..., n, n] float64 and their upper factors R, H = R R^T, until one of the
    methods uses them up: each takes as much memory as anything else of a search.

    Attributes:
        diagonal: of R [..., n].
    """

    def __init__(self, damped: Tensor, upper: Tensor) -> None:
        self.diagonal = upper.diagonal(dim1=-2, dim2=-1).clone()
        self._both: tuple[Tensor, Tensor] | None = damped, upper

    def _taken(self) -> tuple[Tensor, Tensor]:
        assert self._both is not None, "they are used up"
        both, self._both = self._both, None
        return both

    def inverse(self) -> Tensor:
        """Return C [..., n, n] float64, H^-1 = C^T C."""
        _, upper = self._taken()
        del _
        return inverse_upper(upper)

    def penalised_inverse(self, penalty: Tensor) -> Tensor:
        """Return C' [..., n, n] float64 of H' = H + diag(penalty), penalty [..., n] float64."""
        damped, _ = self._taken()
        del _
        damped.diagonal(dim1=-2, dim2=-1).add_(penalty)
        upper = upper_factor(damped)
        del damped
        return inverse_upper(upper)


def complete_square(weight: Tensor, hessian: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """Return W' [..., m, n] float32 and C' [..., n, n] float64 for H' = H + diag(penalty).

    Args:
        weight: W [..., m, n] float32.
        hessian: damped H [..., n, n] float64.
        penalty: lmbda gamma_j [..., n] float64.
    """
    factor = inverse_factor(hessian + torch.diag_embed(penalty))
    return completed(weight, factor, penalty), factor


def completed(weight: Tensor, factor: Tensor, penalty: Tensor) -> Tensor:
    """Return W' [..., m, n] float32, given C' [..., n, n] (complete_square)."""
    # Half of the penalty goes into C in float64: the products stay in float32's range.
    narrow, root = factor.to(weight.dtype), penalty.sqrt()[..., None, :]
    scaled, root = (factor * root).to(weight.dtype), root.to(weight.dtype)
    if weight.shape[-2] < weight.shape[-1]:
        return less_product(weight, product(weight * root, scaled.mT), narrow)
    shrink = root.mT * product(scaled.mT, narrow)
    return less_product(weight, weight, shrink)


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
    """Return matrix^-1 right [..., n, k] float64, for symmetric matrices that are positive
    definite, or nearly so."""
    with one_thread():
        factor, info = torch.linalg.cholesky_ex(matrix)
        definite = info == 0
        if bool(definite.all()):
            return torch.cholesky_solve(right, factor)
        if matrix.ndim == 2:
            direct: Tensor = torch.linalg.solve(matrix, right)
            return direct
        each = zip(matrix, right.expand(*matrix.shape[:-2], *right.shape[-2:]), strict=True)
        return torch.stack([solve(*one) for one in each])


def normalised_factor(factor: Tensor, step: Tensor) -> Tensor:
    """Return V_jk = (step_j / step_k) C_jk / C_jj [..., n, n] float32, unit upper triangular."""
    scale = step.to(factor.dtype)
    ratio = factor / factor.diagonal(dim1=-2, dim2=-1)[..., None]
    return ratio.mul_(scale[..., None]).div_(scale[..., None, :]).to(torch.float32)


def quadratic_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """Return D H D^T of each row, [m] float64, of D [m, n] and the undamped H [n, n], both finite.

    The products are float32; powers of two in front of them keep all of them in its range.
    """
    unit, scale = (_power_of_two(float(_largest(x))) for x in (difference, hessian))
    narrow = (difference / unit).to(torch.float32)
    error = (narrow @ (hessian / scale).to(torch.float32)) * narrow
    return error.sum(dim=1, dtype=torch.float64) * (scale * unit * unit)


@dataclass(frozen=True)
class OutputLoss:
    """Squared output errors of matrices W [..., m, n] under undamped H, with W H computed once.

    Products are float32, of W / unit and H / scale, powers of two that keep them in its range.

    Attributes:
        weight: W / unit [..., m, n] float32.
        hessian: H / scale [..., n, n] float32.
        product: their product [..., m, n].
        unit, scale: one for each matrix, [..., 1, 1].
    """

    weight: Tensor
    hessian: Tensor
    product: Tensor
    unit: Tensor
    scale: Tensor

    @staticmethod
    def of(weight: Tensor, hessian: Tensor) -> "OutputLoss":
        """Return the loss for W [..., m, n] and H [..., n, n], finite all."""
        unit, scale = _moderate(weight), _moderate(hessian)
        narrow, form = _divided(weight, unit), _divided(hessian, scale).to(torch.float32)
        return OutputLoss(narrow, form, product(narrow, form), unit, scale)

    def times_hessian(self, quantized: Tensor) -> Tensor:
        """Return Q H [..., m, n] in the units of `product`."""
        return product(_divided(quantized, self.unit), self.hessian)

    def energy(self) -> Tensor:
        """Return W H W^T of each row, [..., m] float64."""
        return self._summed(lambda rows: self.weight[..., rows, :] * self.product[..., rows, :])

    def error(self, quantized: Tensor, product: Tensor) -> Tensor:
        """Return (W - Q) H (W - Q)^T of each row, [..., m] float64; `product` is of
        `times_hessian`."""

        def terms(rows: slice) -> Tensor:
            narrow = _divided(quantized[..., rows, :], self.unit)
            behind = self.product[..., rows, :] - product[..., rows, :]
            return (self.weight[..., rows, :] - narrow).mul_(behind)

        return self._summed(terms)

    def _summed(self, terms: Callable[[slice], Tensor]) -> Tensor:
        parts = [terms(rows).sum(dim=-1) for rows in strips(*self.weight.shape[-2:])]
        unit, scale = (x.to(torch.float64)[..., 0] for x in (self.unit, self.scale))
        return torch.cat(parts, dim=-1).to(torch.float64) * (scale * unit * unit)


def _divided(x: Tensor, unit: Tensor) -> Tensor:
    """Return x / unit, x itself where every unit is 1."""
    return x if bool((unit == 1).all()) else x / unit


def _largest(x: Tensor) -> Tensor:
    """Return the largest |x| of each matrix, [..., 1, 1]."""
    high, low = (end(dim=(-2, -1), keepdim=True) for end in (x.amax, x.amin))
    return high.maximum(-low)


def _moderate(x: Tensor) -> Tensor:
    """Return for each matrix 1 where its largest |x| is moderate, else the power of two to divide
    by: [..., 1, 1] in x's dtype."""
    size = _largest(x)
    powers = [_power_of_two(value) for value in size.flatten().tolist()]
    powers = [1.0 if MODERATE[0] <= power <= MODERATE[1] else power for power in powers]
    return size.new_tensor(powers).view_as(size)


def _power_of_two(size: float) -> float:
    """Return the largest power of two <= size whose inverse is in float32; 1 for 0."""
    return 2.0 ** max(math.frexp(size)[1] - 1, -126) if size > 0 else 1.0
