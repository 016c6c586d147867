"""The limit: closed forms, its shape as a curve, and a straight-line definition of its own."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cerwu_gpu.quantize.limit import Limit, limit_bits

TOLERANCE = 1e-9
SHAPES = [(1, 1), (1, 7), (9, 1), (5, 6), (40, 12), (12, 40)]
"""One weight, one row, one column, and matrices that are neither square nor a power of two."""


def problem(m: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W [m, n] whose rows and columns have different spreads, and a full-rank H [n, n]."""
    noise = torch.Generator().manual_seed(seed)
    spread = torch.randn(m, 1, generator=noise).exp() * torch.randn(1, n, generator=noise).exp()
    inputs = torch.randn(n, 3 * n, generator=noise, dtype=torch.float64)
    return torch.randn(m, n, generator=noise) * spread, inputs @ inputs.T / n


def components(weight: Tensor, hessian: Tensor) -> Tensor:
    """rho_i mu_k [m * n], straight from the definition."""
    square = weight.to(torch.float64).square()
    root = torch.diag(square.mean(dim=0).sqrt())
    mu = torch.linalg.eigvalsh(root @ hessian @ root)
    return torch.outer(square.mean(dim=1) / square.mean(), mu).flatten()


def definition(power: Tensor, loss: float) -> float:
    """Bits at `loss`: bisection on theta itself over all m * n components."""
    low, high = 0.0, float(power.max())
    for _ in range(300):
        theta = (low + high) / 2
        if float(power.clamp_max(theta).sum()) < loss:
            low = theta
        else:
            high = theta
    return float((power / high).clamp_min(1).log2().mean() / 2)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("share", [0.9, 0.3, 1e-2, 1e-6])
def test_bits_are_those_of_the_definition(m: int, n: int, share: float) -> None:
    weight, hessian = problem(m, n)
    power = components(weight, hessian)
    loss = share * float(power.sum())
    assert limit_bits(weight, hessian, loss) == pytest.approx(
        definition(power, loss), rel=TOLERANCE, abs=TOLERANCE
    )


def test_equal_components_need_half_a_bit_per_halving_of_the_loss() -> None:
    signs = torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]])
    limit = Limit.of(3 * signs, 2 * torch.eye(3))
    assert limit.total == pytest.approx(6 * 9 * 2)
    for bits in (0.5, 1.0, 4.0):
        assert limit.bits(limit.total / 4**bits) == pytest.approx(bits)
        assert limit.loss(bits) == pytest.approx(limit.total / 4**bits)
        assert limit.level(bits) == pytest.approx(18 / 4**bits)


def test_a_diagonal_hessian_is_filled_from_its_largest_column() -> None:
    weight = torch.ones(4, 2)
    limit = Limit.of(weight, torch.diag(torch.tensor([16.0, 1.0])))
    # Down to theta = 1 only the first column is coded; below it both are.
    assert limit.bits(4 * (4.0 + 1.0)) == pytest.approx(math.log2(16 / 4) / 2 / 2)
    assert limit.bits(4 * (1.0 + 1.0)) == pytest.approx(math.log2(16) / 2 / 2)
    assert limit.bits(4 * (0.25 + 0.25)) == pytest.approx((math.log2(64) + math.log2(4)) / 4)
    assert limit.slope(4.0) == pytest.approx(-1 / 4)
    assert limit.slope(0.5) == pytest.approx(-1 / 2)


def test_a_diagonal_hessian_may_change_places_with_the_spread_of_columns() -> None:
    root = torch.tensor([3.0, 1.0, 0.5, 0.1])
    signs = torch.randn(6, 4).sign()
    spread_in_weights = Limit.of(signs * root, torch.eye(4))
    spread_in_hessian = Limit.of(signs, torch.diag(root.square()))
    for bits in (0.1, 1.0, 3.0):
        assert spread_in_weights.loss(bits) == pytest.approx(spread_in_hessian.loss(bits))


def test_rows_of_different_size_are_filled_alike() -> None:
    limit = Limit.of(torch.tensor([[4.0, -4.0], [1.0, 1.0]]), torch.eye(2))
    assert limit.level(0.5) == pytest.approx(4)  # the large row has 1 bit, the small one none
    assert limit.loss(0.5) == pytest.approx(2 * (4.0 + 1.0))


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_nothing_is_needed_for_the_full_loss(m: int, n: int) -> None:
    limit = Limit.of(*problem(m, n))
    assert limit.bits(limit.total) == 0
    assert limit.bits(2 * limit.total) == 0
    assert limit.loss(0) == limit.total
    assert 0 < limit.bits(0.999 * limit.total) < 0.01


def test_no_loss_needs_infinitely_many_bits() -> None:
    limit = Limit.of(*problem(5, 6))
    assert limit.bits(0.0) == math.inf


def test_weights_without_effect_need_no_bits() -> None:
    weight, hessian = problem(6, 4)
    assert Limit.of(torch.zeros(6, 4), hessian).bits(0.0) == 0
    assert Limit.of(weight, torch.zeros(4, 4)).bits(0.0) == 0
    assert Limit.of(torch.zeros(6, 4), hessian).loss(1.0) == 0


def test_idle_rows_and_columns_take_their_share_of_the_average() -> None:
    weight, hessian = problem(6, 4)
    padded = torch.zeros(8, 6)
    padded[:6, :4] = weight
    wide = torch.zeros(6, 6, dtype=torch.float64)
    wide[:4, :4] = hessian
    narrow, idle = Limit.of(weight, hessian), Limit.of(padded, wide)
    assert idle.total == pytest.approx(narrow.total)
    loss = narrow.total / 50
    assert idle.bits(loss) == pytest.approx(narrow.bits(loss) * (6 * 4) / (8 * 6))
    assert idle.loss(1.0) == pytest.approx(narrow.loss(2.0))


@given(
    seed=st.integers(0, 99),
    shares=st.lists(st.floats(1e-8, 1.0), min_size=2, max_size=8, unique=True),
)
@settings(max_examples=50, deadline=None)
def test_bits_fall_with_the_loss_and_the_curve_is_convex(seed: int, shares: list[float]) -> None:
    limit = Limit.of(*problem(5, 6, seed))
    losses = sorted(share * limit.total for share in shares)
    bits = [limit.bits(loss) for loss in losses]
    assert all(a >= b - TOLERANCE for a, b in pairwise(bits))
    middle = limit.bits((losses[0] + losses[-1]) / 2)
    assert middle <= (bits[0] + bits[-1]) / 2 + TOLERANCE


@given(seed=st.integers(0, 99), bits=st.floats(1e-3, 12.0))
@settings(max_examples=50, deadline=None)
def test_loss_level_and_bits_agree(seed: int, bits: float) -> None:
    weight, hessian = problem(5, 6, seed)
    limit = Limit.of(weight, hessian)
    assert limit.bits(limit.loss(bits)) == pytest.approx(bits, rel=1e-6, abs=1e-6)
    power = components(weight, hessian)
    level = limit.level(bits)
    assert limit.loss(bits) == pytest.approx(float(power.clamp_max(level).sum()), rel=1e-6)


@given(seed=st.integers(0, 99), bits=st.floats(0.1, 6.0))
@settings(max_examples=50, deadline=None)
def test_the_level_is_the_slope_of_the_loss(seed: int, bits: float) -> None:
    """d(loss) = -2 ln2 theta d(m n bits): what makes theta = lmbda / ln2."""
    limit = Limit.of(*problem(5, 6, seed))
    small = 1e-4
    fall = limit.loss(bits - small) - limit.loss(bits + small)
    expected = 2 * math.log(2) * limit.level(bits) * limit.weights * 2 * small
    assert fall == pytest.approx(expected, rel=1e-3)


@given(seed=st.integers(0, 99), factor=st.floats(1e-3, 1e3))
@settings(max_examples=25, deadline=None)
def test_units_do_not_matter(seed: int, factor: float) -> None:
    weight, hessian = problem(5, 6, seed)
    loss = Limit.of(weight, hessian).total / 30
    plain = limit_bits(weight, hessian, loss)
    assert limit_bits(weight, factor * hessian, factor * loss) == pytest.approx(plain, rel=1e-6)
    assert limit_bits(weight * factor, hessian, factor**2 * loss) == pytest.approx(plain, rel=1e-5)
