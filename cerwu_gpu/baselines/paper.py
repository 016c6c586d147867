r"""The paper's own settings, as its authors' code has them, on this package's search.

Conzelmann & Bamler, arXiv 2505.18758. One step for the matrix, step = max|W| / (|G| // 2); from
there on in units of the step, H times step^2:

    damp:      H_jj = 1 where it is 0, then H += damping mean(diag H) I
    square:    gamma = 1 / (ln 2 Var W),  H' = H + lmbda gamma I,  W' = W H H'^-1
               (gamma = 0 for cerwu-gamma0 and optq; lmbda = 0 for optq, too)
    damp H' once more, and C the upper factor of its inverse; W' has seen the first damping only
    search:    argmin over g = -M ... M of 1/2 (w - g)^2 + lmbda C_jj^2 (r(g) - gamma/2 g^2),
               M = |G| for cerwu and |G| // 2 otherwise; the first minimum wins

Its oddities are kept on purpose (docs/method.md, section 13). The rate r is a model of its own.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cerwu_gpu.block_problem import Alphabet, BlockProblem
from cerwu_gpu.config import RateModel
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.quantize.classes import Classes
from cerwu_gpu.quantize.objective import complete_square, inverse_factor, normalised_factor
from cerwu_gpu.quantize.passes import scalar_pass
from cerwu_gpu.quantize.rate_models import histogram_bits, uniform_bits

PaperMethod = Literal["cerwu", "cerwu-gamma0", "optq"]

PAPER_DAMPING = 0.01
NEVER = 2.0**40
"""Bits of a level without probability: finite, as lmbda may be 0."""


@dataclass(frozen=True)
class PaperProblem:
    """A matrix in units of its step, ready for a search.

    Attributes:
        target: W' [m, n] float32.
        factor: V_jk = C_jk / C_jj [n, n] float32, upper triangular.
        lmbda: [m] float32, importance: 1 / C_jj^2 [n] and curvature: lmbda gamma C_jj^2 [n].
        reach: M; the candidates are -M ... M.
        step: the unit.
    """

    target: Tensor
    factor: Tensor
    lmbda: Tensor
    importance: Tensor
    curvature: Tensor
    reach: int
    step: float

    @property
    def levels(self) -> Tensor:
        """Candidates [2 M + 1] float32."""
        reach, device = self.reach, self.target.device
        return torch.arange(-reach, reach + 1, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class FrozenRate:
    """One table for all weights: all rows of a column at once, by the package's blocked pass.

    Attributes:
        bits: [2 M + 1] float32, of the integers -M ... M.
    """

    bits: Tensor
    block_size: int = 128

    @staticmethod
    def of(model: RateModel, problem: PaperProblem) -> "FrozenRate":
        """Return the table of a model by what it can know before the search, W'."""
        if model == "uniform":
            bits = uniform_bits(problem.levels)
        elif model == "gaussian":
            bits = _gaussian_bits(problem.levels, problem.target)
        else:
            reach, x = problem.reach, problem.target
            # Halves go away from zero; where weights lie on a grid of their own there are many.
            nearest = (torch.sign(x) * (x.abs() + 0.5).floor()).clamp(-reach, reach)
            bits = histogram_bits(nearest.to(torch.int64) + reach, 2 * reach + 1, added=1.0)
        return FrozenRate(bits.to(torch.float32))

    def search(self, problem: PaperProblem) -> Tensor:
        """Return the symbols [m, n] int32, the best of all candidates."""
        classes = Classes.single(1, *problem.target.shape, device=problem.target.device)
        columns = BlockProblem(
            x=problem.target,
            factor=problem.factor,
            alphabet=Alphabet(self.bits[None], -problem.reach),
            row_class=classes.row[0],
            column_class=classes.column[0],
            lmbda=problem.lmbda,
            importance=problem.importance,
            curvature=problem.curvature,
        )
        return scalar_pass(columns, block_size=self.block_size, exhaustive=True)

    def code_length(self, symbols: Tensor) -> float:
        """Return the bits of the symbols [m, n] int32 under the table."""
        index = symbols.to(torch.int64) + len(self.bits) // 2
        return float(self.bits.to(torch.float64)[index].sum())


def paper_problem(
    weight: Tensor,
    hessian: Tensor,
    *,
    method: PaperMethod,
    levels: int,
    lmbda: float,
    damping: float = PAPER_DAMPING,
) -> PaperProblem:
    """Prepare W and H for the search, as the authors do.

    Args:
        weight: W [m, n] float32.
        hessian: H [n, n], undamped, a mean over tokens as everywhere in this package; the
            authors' H is a sum over a sequence, and their lmbda larger by its length.
        method: cerwu-gamma0 is what the authors call optq-rd.
        levels: |G| >= 2, which the authors call nbins.
        lmbda: loss per bit, in the units of H.
        damping: of the mean diagonal entry, twice.

    Raises:
        ConfigError: fewer than two levels, or all entries of W are equal.
        FactorizationError: the Hessian cannot be factored (the authors' code goes on with the
            identity).
    """
    if levels < 2:
        raise ConfigError(f"levels is {levels}: a grid needs at least 2 levels.")
    if bool((weight == weight[0, 0]).all()):
        raise ConfigError("all entries of the matrix are equal: their variance must not be 0.")
    half = levels // 2
    step = float(weight.abs().max()) / half
    if method == "optq":
        lmbda = 0.0
    x = (weight / step).clamp(-half, half)
    gamma = 1 / (math.log(2) * float(x.to(torch.float64).var())) if method == "cerwu" else 0.0
    damped = _damp(hessian.to(torch.float64) * step**2, damping)
    penalty = torch.full_like(damped.diagonal(), lmbda * gamma)
    target, _ = complete_square(x, damped, penalty)
    factor = inverse_factor(_damp(damped + torch.diag(penalty), damping))
    square = factor.diagonal().square()
    return PaperProblem(
        target=target,
        factor=normalised_factor(factor, torch.ones_like(x[0])),
        lmbda=torch.full_like(x[:, 0], lmbda),
        importance=(1 / square).to(torch.float32),
        curvature=(lmbda * gamma * square).to(torch.float32),
        reach=levels if method == "cerwu" else half,
        step=step,
    )


def _gaussian_bits(levels: Tensor, x: Tensor) -> Tensor:
    """Return -log2 of the differences of N(0, Var x)'s distribution function between the levels.

    As the authors have it the function is a float32, which is 1 from 5.4 standard deviations on and
    0 from -8.3 on: what lies beyond has no probability and is never chosen.
    """
    edges = torch.cat([levels - 0.5, levels[-1:] + 0.5]).to(torch.float64)
    deviation = x.to(torch.float64).std()
    distribution = ((1 + torch.erf(edges / (deviation * math.sqrt(2)))) / 2).to(torch.float32)
    return -distribution.diff().log2().clamp_min(-NEVER)


def _damp(hessian: Tensor, damping: float) -> Tensor:
    """Return H [n, n] float64 with ones for zeros of its diagonal, and its mean added to it."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    return damped
