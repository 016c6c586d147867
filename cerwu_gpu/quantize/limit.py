r"""The information-theoretic limit: reverse waterfilling for independent Gaussian weights.

Weights of variance rho_i v_j under the Hessian H have the spectrum rho_i mu_k, mu_k the
eigenvalues of diag(v)^1/2 H diag(v)^1/2. At water level theta

    loss = sum_ik min(rho_i mu_k, theta),   R = mean_ik 1/2 log2(max(1, rho_i mu_k / theta)).

The slope of the curve is d(loss / 2) = -ln2 theta d(bits), so theta = lmbda / ln2 is where an ideal
quantizer would be with the objective J (design.md 2.1).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cerwu_gpu.quantize.strips import mean_squares

HALVINGS = 64
"""Steps of the bisection on log2 theta: past the precision of float64."""


@dataclass(frozen=True)
class Limit:
    """The limit of one matrix: bits per weight against loss, both over the water level.

    Attributes:
        rho: [<= m] float64, the rows' relative mean squares without zeros, ascending.
        mu: [<= n] float64, the eigenvalues without zeros.
        weights: m * n; rows and directions left out above take part with nothing.
    """

    rho: Tensor
    mu: Tensor
    weights: int

    @staticmethod
    def of(weight: Tensor, hessian: Tensor) -> "Limit":
        """Return the limit for W [m, n] and the undamped H [n, n]; it keeps two vectors, not H."""
        row, column = mean_squares(weight)
        root = column.sqrt()
        mu = torch.linalg.eigvalsh(root[:, None] * hessian.to(torch.float64) * root)
        rho = row[row > 0] / row.mean()
        return Limit(rho.sort().values, mu[mu > 0], weight.numel())

    @property
    def total(self) -> float:
        """Loss at 0 bits."""
        return float(self.rho.sum() * self.mu.sum())

    def bits(self, loss: float) -> float:
        """Return the fewest bits per weight for `loss` = tr((W - Q) H (W - Q)^T); inf at 0."""
        if loss >= self.total:
            return 0.0
        if loss <= 0:
            return math.inf
        # Every one of the m * n components loses theta at most, which bounds theta from below. The
        # loss is concave and piecewise linear in theta: Newton's steps from below stay below, and
        # end at the theta that is sought.
        level, following = 0.0, loss / self.weights
        while following > level:
            level = following
            drowned, above = self._parts(level)
            if above > 0:
                following = (loss - drowned) / above
        return self._bits_at(math.log2(level))

    def loss(self, bits: float) -> float:
        """Return the least tr((W - Q) H (W - Q)^T) at `bits` per weight."""
        return self.total if bits <= 0 else self._loss_at(self._log_level(bits))

    def level(self, bits: float) -> float:
        """Return theta at `bits` per weight; the largest rho_i mu_k at 0."""
        return float(2.0 ** self._log_level(bits))

    def slope(self, level: float) -> float:
        """Return d(bits) / d(log2 theta) <= 0: minus half the share of weights above the water."""
        return -float(self._above(level).sum()) / (2 * self.weights)

    def _log_level(self, bits: float) -> float:
        components = len(self.rho) * len(self.mu)
        if not components:
            return -math.inf
        # Below all components the curve is a straight line in log2 theta.
        lowest = math.log2(float(self.rho[0])) + math.log2(float(self.mu.min()))
        lowest -= 2 * bits * self.weights / components
        return self._bisect(lambda t: self._bits_at(t) > bits, lowest)

    def _bisect(self, below: Callable[[float], bool], low: float) -> float:
        """Return log2 theta, from `low` to the largest component, at which `below` turns false."""
        high = math.log2(float(self.rho[-1])) + math.log2(float(self.mu.max()))
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if below(middle) else (low, middle)
        return high

    def _above(self, level: float) -> Tensor:
        """Return the number of rows above the water in each direction: [<= n] int64."""
        return len(self.rho) - torch.searchsorted(self.rho, level / self.mu)

    def _loss_at(self, log_level: float) -> float:
        level = float(2.0**log_level)
        drowned, above = self._parts(level)
        return drowned + level * above

    def _parts(self, level: float) -> tuple[float, int]:
        """Return the sum of the components below the water, and the number of those above."""
        above = self._above(level)
        sums = torch.cat([self.rho.new_zeros(1), self.rho.cumsum(0)])
        return float((self.mu * sums[len(self.rho) - above]).sum()), int(above.sum())

    def _bits_at(self, log_level: float) -> float:
        above = self._above(2.0**log_level)
        sums = torch.cat([self.rho.new_zeros(1), self.rho.log2().flip(0).cumsum(0)])
        heights = sums[above] + above * (self.mu.log2() - log_level)
        return float(heights.sum()) / (2 * self.weights)


def limit_bits(weight: Tensor, hessian: Tensor, loss: float) -> float:
    """Return the fewest bits per weight at which tr((W - Q) H (W - Q)^T) can be `loss`."""
    return Limit.of(weight, hessian).bits(loss)
