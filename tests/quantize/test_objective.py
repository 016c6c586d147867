"""The quadratic side: factors, the completed square, and the target behind drifted inputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cerwu_gpu.quantize.objective import (
    DAMPING_LIMIT,
    DRIFT_SHARE,
    LEAST_DAMPING,
    complete_square,
    damp,
    drift_target,
    factor_with_damping,
    inverse_factor,
    inverse_upper,
    usual_damping,
)


def moments(columns: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(columns, tokens, generator=generator, dtype=torch.float64)
    return x, 2 / tokens * x @ x.t()


def test_the_factor_is_upper_and_gives_the_inverse() -> None:
    _, hessian = moments(12, 40)
    factor = inverse_factor(hessian)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.t() @ factor, torch.linalg.inv(hessian))


def test_completing_the_square_changes_the_objective_by_a_constant() -> None:
    _, hessian = moments(9, 40)
    weight = torch.randn(5, 9)
    penalty = torch.rand(9, dtype=torch.float64)
    moved, factor = complete_square(weight, hessian, penalty)
    raised = torch.linalg.inv(factor.t() @ factor)
    torch.testing.assert_close(raised, hessian + torch.diag(penalty))

    def gap(q: torch.Tensor) -> torch.Tensor:
        direct = (weight - q) @ hessian.float() @ (weight - q).t() + (q * penalty.float()) @ q.t()
        square = (moved - q) @ raised.float() @ (moved - q).t()
        return torch.trace(direct - square)

    torch.testing.assert_close(gap(torch.randn(5, 9)), gap(torch.zeros(5, 9)), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("by", "usual"), [("median", 3.0), ("mean", 26.5)])
def test_outliers_dictate_the_mean_only(by, usual) -> None:
    hessian = torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.0, 100.0]))
    damped = damp(hessian, 0.1, by)
    expected = torch.tensor([1.0, 2.0, 3.0, 1.0, 100.0], dtype=torch.float64) + 0.1 * usual
    if by == "median":
        expected -= 0.1  # of the active entries 1, 2, 3, 100 the lower median is 2
    torch.testing.assert_close(damped.diagonal(), expected)


def test_damping_grows_until_there_is_a_factor() -> None:
    hessian = torch.tensor([[1.0, 1.2], [1.2, 1.0]])
    _, _, used = factor_with_damping(hessian, 1e-3, "mean")
    assert used == pytest.approx(1.0)


@given(rows=st.integers(1, 10**7), columns=st.integers(1, 20_000))
def test_fewer_inputs_for_each_column_are_damped_more(rows: int, columns: int) -> None:
    damping = usual_damping(rows, columns)
    assert LEAST_DAMPING <= damping <= DAMPING_LIMIT
    assert usual_damping(4 * rows, columns) <= damping
    assert usual_damping(rows, columns) == pytest.approx(usual_damping(3 * rows, 3 * columns))
    assert usual_damping(None, columns) == LEAST_DAMPING


def test_without_drift_the_target_is_the_weight() -> None:
    _, hessian = moments(8, 50)
    weight = torch.randn(3, 8)
    assert torch.equal(drift_target(weight, hessian=hessian, cross=hessian.clone()), weight)


def test_the_drift_target_goes_its_share_of_the_way_to_least_squares() -> None:
    x, _ = moments(8, 4000)
    x_hat = 0.7 * x + 0.1 * moments(8, 4000, seed=1)[0]
    weight = torch.randn(3, 8)
    tokens = x.shape[1]
    target = drift_target(
        weight, hessian=2 / tokens * x_hat @ x_hat.t(), cross=2 / tokens * x @ x_hat.t()
    )

    def miss(w: torch.Tensor) -> float:
        return float((weight.double() @ x - w.double() @ x_hat).square().mean())

    solution = torch.linalg.lstsq(x_hat.t().double(), x.t().double()).solution.t()
    best = weight.double() @ solution
    torch.testing.assert_close(
        target.double(), weight + DRIFT_SHARE * (best - weight), rtol=0.02, atol=0.01
    )
    assert miss(best) < miss(target) < miss(weight)


@pytest.mark.parametrize("rows", [5, 40], ids=["few rows", "many rows"])
def test_completing_the_square_stays_in_range(rows) -> None:
    _, hessian = moments(9, 40)
    weight, penalty = torch.randn(rows, 9), 1e3 * torch.rand(9, dtype=torch.float64)
    wanted, _ = complete_square(weight, hessian, penalty)
    moved, _ = complete_square(weight * 2.0**-80, hessian * 2.0**116, penalty * 2.0**116)
    torch.testing.assert_close(moved * 2.0**80, wanted)


def test_a_triangular_inverse_by_halves_is_the_inverse() -> None:
    upper = torch.randn(450, 450, dtype=torch.float64).triu() / 30 + torch.eye(450)
    inverse = inverse_upper(upper)
    assert torch.equal(inverse, inverse.triu())
    torch.testing.assert_close(upper @ inverse, torch.eye(450, dtype=torch.float64))
