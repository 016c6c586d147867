"""What a unit of squared output error costs, row by row."""

import pytest
import torch
from torch.testing import assert_close

from cerwu_gpu.config import GRADIENT_BASED
from cerwu_gpu.quantize.sensitivity import FLOOR, row_sensitivity

WEIGHT = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 1.0]])
HESSIAN = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
GRADIENT = torch.tensor([4.0, 0.0, 2.0])
ENERGY = (2.0 + 9.0 + (8.0 + 1.0 + 2.0)) / 3
"""Mean over rows of w H w^T, by hand."""


def test_each_kind_is_what_its_name_says() -> None:
    found = {
        kind: row_sensitivity(kind, WEIGHT, HESSIAN, GRADIENT)
        for kind in ("none", "relative", "layer", "row", "balanced")
    }
    floored = torch.tensor([4.0, 2.0 * FLOOR, 2.0])
    assert_close(found["none"], torch.ones(3))
    assert_close(found["relative"], torch.full((3,), 1 / ENERGY))
    assert_close(found["layer"], torch.full((3,), 2.0))
    assert_close(found["row"], floored)
    assert_close(found["balanced"], floored / 2.0 * (2.0 / ENERGY) ** 0.5)


def test_balanced_levels_lie_between_relative_and_layer() -> None:
    """Weights of another size change relative by its square, layer not at all, this by its root."""
    small = row_sensitivity("balanced", WEIGHT, HESSIAN, GRADIENT)
    large = row_sensitivity("balanced", 4 * WEIGHT, HESSIAN, GRADIENT)
    steep = row_sensitivity("balanced", WEIGHT, HESSIAN, 16 * GRADIENT)
    assert_close(large, small / 4)
    assert_close(steep, small * 4)


@pytest.mark.parametrize("kind", GRADIENT_BASED)
def test_without_gradients_or_energy_all_count_alike(kind: str) -> None:
    alpha = row_sensitivity(kind, WEIGHT, HESSIAN, torch.zeros(3))  # type: ignore[arg-type]
    assert_close(alpha, torch.ones(3))
    alpha = row_sensitivity(kind, 0 * WEIGHT, HESSIAN, GRADIENT)  # type: ignore[arg-type]
    assert bool((torch.isfinite(alpha) & (alpha > 0)).all())
    with pytest.raises(ValueError, match="needs squared gradients"):
        row_sensitivity(kind, WEIGHT, HESSIAN, None)  # type: ignore[arg-type]
