r"""Costs of a unit of squared output error, row by row: the alpha of the objective

    J = 1/2 sum_i alpha_i (W - Q)_i H (W - Q)_i^T + lmbda R.

- none: 1 everywhere, the paper's objective;
- relative: one over the layer's own mean output energy, so that relative errors count alike;
- layer: the mean of the model's squared gradients over the outputs of the layer;
- row: the squared gradients themselves, damped toward that mean;
- balanced: row, with the layer's mean replaced by its geometric mean with that of relative.

With layer and row, J approximates the loss of the model, and lmbda is nats per token for a bit. The
approximation is quadratic around the trained weights; where one lmbda would leave a layer with
errors far beyond its reach, as in small networks for images, balanced holds them back.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from cerwu_gpu.config import Sensitivity
from cerwu_gpu.layout import Label
from cerwu_gpu.quantize.objective import quadratic_error

FLOOR = 0.05
"""Least share of the layer's mean that a row counts: gradients of few tokens are noisy."""


@dataclass(frozen=True)
class Sensitivities:
    """Second derivatives of a model's loss, as far as they are known.

    Attributes:
        squared_gradients: matrix -> mean over tokens of (dL/dy_i)^2 [m] at its outputs; zeros
            where no gradient reached them.
        hessian_additions: name of an input, as in a block's statistics -> what is added to its
            Hessian [n, n].
    """

    squared_gradients: Mapping[Label, Tensor] = field(default_factory=dict)
    hessian_additions: Mapping[str, Tensor] = field(default_factory=dict)

    def squared_gradient(self, name: str, part: int) -> Tensor | None:
        """Return [m] of a matrix, the mean of all others where no gradient reached it; None where
        nothing is known."""
        gradient = self.squared_gradients.get((name, part))
        if gradient is None or bool(gradient.any()):
            return gradient
        return torch.full_like(gradient, self._usual)

    def with_usual(self, labels: Iterable[Label]) -> "Sensitivities":
        """Return these with the mean of all matrices that a gradient reached in place of zeros."""
        known = self.squared_gradients
        usual = {label: torch.full_like(known[label], self._usual) for label in labels}
        return replace(self, squared_gradients={**known, **usual})

    @cached_property
    def _usual(self) -> float:
        """Mean of all matrices that a gradient reached."""
        means = [float(gradient.mean()) for gradient in self.squared_gradients.values()]
        positive = [mean for mean in means if mean > 0]
        return sum(positive) / max(len(positive), 1)

    def reaches(self, name: str, part: int) -> bool:
        """Return whether a gradient reached the outputs of a matrix, as far as is known."""
        gradient = self.squared_gradients.get((name, part))
        return gradient is None or bool(gradient.any())


def row_sensitivity(
    kind: Sensitivity, weight: Tensor, hessian: Tensor, squared_gradient: Tensor | None
) -> Tensor:
    """Return alpha [m] float32 > 0 of a matrix.

    Args:
        kind: see above.
        weight: W [m, n] float32.
        hessian: H [n, n], undamped.
        squared_gradient: mean over tokens of (dL/dy_i)^2, [m]; needed for layer, row and
            balanced.
    """
    ones = torch.ones(len(weight), device=weight.device)
    if kind == "none":
        return ones
    if kind == "relative":
        return ones * _relative(weight, hessian)
    if squared_gradient is None:
        raise ValueError(f"sensitivity {kind} needs squared gradients")
    gradient = squared_gradient.to(weight.device, torch.float32)
    mean = gradient.mean()
    if float(mean) <= 0:
        return ones
    if kind == "layer":
        return ones * mean
    row = gradient.clamp_min(FLOOR * mean)
    if kind == "row":
        return row
    level: float = (_relative(weight, hessian) / float(mean)) ** 0.5
    return row * level


def _relative(weight: Tensor, hessian: Tensor) -> float:
    """Return one over the mean of a row's output energy; 1 where there is none."""
    energy = float(quadratic_error(weight, hessian).mean())
    return 1 / energy if energy > 0 else 1.0
