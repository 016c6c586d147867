"""The adaptive context model against its sentences, one decision after the other."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cerwu_gpu.baselines import adaptive
from cerwu_gpu.baselines.adaptive import LEAST, AdaptiveRate
from cerwu_gpu.baselines.paper import paper_problem
from cerwu_gpu.quantize.layer import relative_loss

LAYER = "model.layers.14.self_attn.q_proj"


def decisions(q: int, before: int) -> tuple[list[tuple[object, bool]], int]:
    """The decisions that say q, each with the name of its state, and how many plain bits follow."""
    side = (before > 0) - (before < 0)
    if q == 0:
        return [(("zero", side), False)], 0
    string = [(("zero", side), True), (("negative", side), q < 0)]
    for k in range(1, min(abs(q), 10) + 1):
        string.append((("above", k, q < 0), abs(q) > k))
    if abs(q) <= 10:
        return string, 0
    group = int(math.log2(abs(q) - 10))
    string += [(("group", i), True) for i in range(group)]
    return [*string, (("group", group), False)], group


class StraightStates:
    """States by name; a decision costs -log2 of the mean of two estimates."""

    def __init__(self) -> None:
        self.estimates: dict[object, tuple[float, float]] = {}

    def cost(self, q: int, before: int, adapt: bool) -> float:
        string, total = decisions(q, before)
        total = float(total)
        for name, one in string:
            fast, slow = self.estimates.get(name, (0.5, 0.5))
            p = min(max((fast + slow) / 2, LEAST), 1 - LEAST)
            total -= math.log2(p if one else 1 - p)
            if adapt:
                self.estimates[name] = (fast + (one - fast) / 16, slow + (one - slow) / 128)
        return total


def straight_code_length(symbols: torch.Tensor) -> float:
    states = StraightStates()
    return sum(
        states.cost(q, before, True)
        for row in symbols.tolist()
        for before, q in zip([0, *row[:-1]], row, strict=True)
    )


def layer(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(columns, 4 * columns, generator=generator)
    x = x + x.roll(1, dims=0)
    return torch.randn(rows, columns, generator=generator) ** 3, 2 / x.shape[1] * x @ x.t()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(-3000, 3000), min_size=3, max_size=3), max_size=30))
def test_code_length_is_the_sum_over_all_decisions(rows: list[list[int]]) -> None:
    symbols = torch.tensor(rows, dtype=torch.int32).reshape(-1, 3)
    expected = straight_code_length(symbols)
    assert AdaptiveRate().code_length(symbols) == pytest.approx(expected, rel=1e-9)


def test_every_integer_of_32_bits_has_a_code() -> None:
    symbols = torch.tensor([[2**31 - 1, -(2**31 - 1)]], dtype=torch.int32)
    assert 2 * 60 < AdaptiveRate().code_length(symbols) < 2 * 90


def test_states_learn_what_is_usual_and_stop_at_their_limit() -> None:
    rate = AdaptiveRate()
    zeros = torch.zeros(1, 100_000, dtype=torch.int32)
    assert rate.code_length(zeros) / zeros.numel() == pytest.approx(-math.log2(1 - LEAST), rel=0.1)
    generator = torch.Generator().manual_seed(0)
    coins = torch.randint(0, 2, (100, 300), generator=generator, dtype=torch.int32)
    # A fair bit and the learnt certainty that it is neither negative nor above 1.
    assert 1.0 < rate.code_length(coins) / coins.numel() < 1.1


@pytest.mark.parametrize("method", ["cerwu", "cerwu-gamma0"])
def test_the_search_takes_the_cheapest_candidate_under_the_states_so_far(method: str) -> None:
    weight, hessian = layer(20, 10)
    problem = paper_problem(weight, hessian, method=method, levels=30, lmbda=0.5)
    x, factor = problem.target.double().numpy().copy(), problem.factor.double().numpy()
    states, expected = StraightStates(), np.zeros(x.shape, dtype=np.int64)
    grid = range(-problem.reach, problem.reach + 1)
    for i in range(x.shape[0]):
        before = 0
        for j in range(x.shape[1]):
            omega, beta = float(problem.importance[j]), float(problem.curvature[j])
            costs = [
                omega * ((x[i, j] - g) ** 2 - beta * g**2) / 2
                + float(problem.lmbda[i]) * states.cost(g, before, False)
                for g in grid
            ]
            q = grid[int(np.argmin(costs))]
            states.cost(q, before, True)
            expected[i, j] = before = q
            x[i, j + 1 :] -= (x[i, j] - q) * factor[j, j + 1 :]
    assert np.abs(expected).max() > 11  # the tail of the code is reached
    assert torch.equal(AdaptiveRate().search(problem).long(), torch.from_numpy(expected))


def test_prices_of_candidates_are_what_coding_them_costs() -> None:
    states = adaptive._fresh()
    generator = np.random.default_rng(0)
    symbols = np.rint(generator.standard_cauchy((20, 30)) * 3).astype(np.int64)
    adaptive._code_length(states, symbols)
    for before in (-4, 0, 2):
        for reach in (1, 10, 11, 40):
            prices = np.empty(2 * reach + 1)
            adaptive._prices(states, reach, before, prices)
            costs = [adaptive._code(states, q, before, False) for q in range(-reach, reach + 1)]
            np.testing.assert_allclose(prices, costs, rtol=1e-12)


def test_plain_python_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = layer(3, 7)
    problem = paper_problem(weight, hessian, method="cerwu", levels=8, lmbda=0.02)
    rate = AdaptiveRate()
    symbols = rate.search(problem)
    bits = rate.code_length(symbols)
    for name in ("_cost", "_adapt", "_code", "_prices", "_code_length", "_search"):
        compiled = getattr(adaptive, name)
        monkeypatch.setattr(adaptive, name, getattr(compiled, "py_func", compiled))
    assert torch.equal(rate.search(problem), symbols)
    assert rate.code_length(symbols) == pytest.approx(bits, rel=1e-12)


def test_comes_near_to_the_authors_bytes_on_a_real_layer(data: Path) -> None:
    """Another estimator of probabilities than theirs: near their bytes, not the same symbols."""
    arrays = np.load(data / "layers" / f"{LAYER}.npz")
    weight, hessian = torch.from_numpy(arrays["W"]), torch.from_numpy(arrays["H"])
    rate, seen = AdaptiveRate(), 0
    with (data / "reference.csv").open() as lines:
        runs = [run for run in csv.DictReader(lines) if run["layer"] == LAYER]
    for run in runs:
        if (run["method"], run["nbins"], run["rate_model"], run["scan"]) != (
            "cerwu",
            "16",
            "deepcabac",
            "row",
        ):
            continue
        problem = paper_problem(
            weight, hessian, method="cerwu", levels=16, lmbda=float(run["lmbda"])
        )
        symbols = rate.search(problem)
        bits = rate.code_length(symbols) / symbols.numel()
        assert bits == pytest.approx(float(run["bits_per_weight"]), rel=0.02)
        loss = relative_loss(weight, symbols * problem.step, hessian)
        assert loss == pytest.approx(float(run["relative_loss"]), rel=0.03)
        seen += 1
    assert seen >= 5
