"""Rate models of the search: what they say, and what whole matrices become under them."""

import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cerwu_gpu.coding.tables import bits, table_from_codes
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.quantize.layer import QuantizedStack, quantize_stack
from cerwu_gpu.quantize.rate_models import gaussian_bits, histogram_bits, model_bits, uniform_bits
from tests.configs import configured

LMBDA = 0.5


def layer(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian weights under a correlated Hessian."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    x = mixing @ torch.randn(columns, 4 * columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), 2 / x.shape[1] * x @ x.t()


def coded_bits(stack: QuantizedStack) -> float:
    """Bits of the symbols under the tables that are stored, one class."""
    total = 0.0
    for matrix in stack.matrices:
        table = bits(table_from_codes(matrix.codes.numpy()))[0]
        total += float(table[(matrix.symbols - matrix.lowest).numpy()].sum())
    return total


def objective(stack: QuantizedStack, weights: list[torch.Tensor], hessian: torch.Tensor) -> float:
    """J: half of the loss, and what the coder charges."""
    loss = 0.0
    for weight, matrix in zip(weights, stack.matrices, strict=True):
        error = (weight - matrix.weight(torch.float32)).double()
        loss += float(((error @ hessian.double()) * error).sum())
    return loss / 2 + LMBDA * coded_bits(stack)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.05, 40.0), st.integers(1, 60))
def test_gaussian_bits_are_those_of_the_intervals(deviation: float, reach: int) -> None:
    levels = torch.arange(-reach, reach + 1, dtype=torch.float32)
    found = gaussian_bits(levels, deviation**2)
    assert bool(torch.isfinite(found).all())
    assert torch.equal(found, found.flip(0))
    assert bool((found[reach:].diff() >= 0).all())
    unit = deviation * math.sqrt(2)
    for g in range(reach + 1):
        share = (math.erfc((g - 0.5) / unit) - math.erfc((g + 0.5) / unit)) / 2
        if share > 1e-290:
            assert float(found[reach + g]) == pytest.approx(-math.log2(share), rel=1e-6)


def test_intervals_of_a_list_reach_halfway_to_the_neighbours() -> None:
    normal = NormalDist(0, 1.5)
    edges = [-3.0, -1.0, 0.25, 1.75, 4.25]
    found = gaussian_bits(torch.tensor([-2.0, 0.0, 0.5, 3.0]), 1.5**2)
    expected = [-np.log2(normal.cdf(b) - normal.cdf(a)) for a, b in pairwise(edges)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_without_spread_zero_is_free() -> None:
    found = gaussian_bits(torch.arange(-2.0, 3.0), 0.0)
    assert float(found[2]) == 0.0
    assert float(found[1]) > 100


def test_histogram_bits_are_shares() -> None:
    found = histogram_bits(torch.tensor([[0, 1], [1, 1]]), 3, added=1.0)
    assert found.tolist() == pytest.approx([-np.log2(2 / 7), -np.log2(4 / 7), -np.log2(1 / 7)])


def test_uniform_bits_are_those_of_a_plain_code() -> None:
    assert uniform_bits(torch.arange(8.0)).tolist() == [3.0] * 8
    assert model_bits("uniform", torch.arange(8.0), torch.ones(1, 1)).dtype == torch.float32


def test_a_uniform_rate_plays_no_part() -> None:
    weight, hessian = layer(40, 33)
    rated = configured(
        method="cerwu-gamma0", rate_model="uniform", levels=31, lmbda=LMBDA, sensitivity="none"
    )
    free = configured(method="optq", levels=31, sensitivity="none")
    found = quantize_stack([weight], hessian, rated).matrices[0].symbols
    assert torch.equal(found, quantize_stack([weight], hessian, free).matrices[0].symbols)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    "grid",
    [{"levels": 15}, {"levels": 16}, {"levels": 201}, {"grid": (-1.0, -0.4, -0.1, 0.0, 0.2, 1.0)}],
    ids=["odd", "even", "too-many-to-scan", "list"],
)
def test_a_gaussian_rate_is_weighed_against_the_error(grid: dict[str, object], passes: int) -> None:
    """Without correlations each weight is on its own, and every level can be tried."""
    weight = layer(50, 20)[0]
    config = configured(
        method="cerwu-gamma0",
        rate_model="gaussian",
        lmbda=0.05,
        passes=passes,
        damping=0.0,
        scale="per-tensor",
        sensitivity="none",
        **grid,
    )
    matrix = quantize_stack([weight], torch.eye(20), config).matrices[0]
    scale = 2.0 ** (float(matrix.row_scale[0]) / 256)
    x = weight.double() / scale
    levels = torch.arange(matrix.size) + matrix.lowest if matrix.grid is None else matrix.grid
    values = x
    for _ in range(passes):
        rates = gaussian_bits(levels, float(values.square().mean()))
        cost = (x[..., None] - levels).square() / 2 + 0.05 / scale**2 * rates
        found = cost.argmin(dim=2)
        values = levels.double()[found]
    assert torch.equal(matrix.symbols, (found + matrix.lowest).int())
    assert not torch.equal(found, (x[..., None] - levels).abs().argmin(dim=2))


@pytest.mark.parametrize("levels", [15, 16])
def test_gaussian_weights_want_a_gaussian_more_than_nothing(levels: int) -> None:
    weight, hessian = layer(200, 60)
    found = {}
    for model in ("histogram", "gaussian", "uniform"):
        config = configured(
            method="cerwu-gamma0",
            rate_model=model,
            levels=levels,
            lmbda=LMBDA,
            sensitivity="none",
        )
        found[model] = objective(quantize_stack([weight], hessian, config), [weight], hessian)
    assert found["histogram"] < 0.8 * found["gaussian"]
    assert found["gaussian"] < 0.97 * found["uniform"]


def test_each_matrix_of_a_stack_has_its_own_gaussian() -> None:
    weight, hessian = layer(30, 24)
    other = layer(20, 24, seed=1)[0] ** 3
    config = configured(
        method="cerwu-gamma0",
        rate_model="gaussian",
        levels=31,
        lmbda=LMBDA,
        sensitivity="none",
    )
    together = quantize_stack([weight, other], hessian, config).matrices
    for matrix, part in zip(together, (weight, other), strict=True):
        alone = quantize_stack([part], hessian, config).matrices[0]
        assert torch.equal(matrix.symbols, alone.symbols)


def test_steps_that_follow_from_lmbda_take_the_histogram() -> None:
    for model in ("gaussian", "uniform"):
        with pytest.raises(ConfigError, match=f"rate_model {model} needs a given grid"):
            configured(rate_model=model)
    with pytest.raises(ConfigError, match="choose one of histogram, gaussian, uniform"):
        configured(rate_model="laplace", levels=16)
