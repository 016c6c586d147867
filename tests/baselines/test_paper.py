"""The paper's mode: against the authors' C++, and against a straight line that runs everywhere."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cerwu_gpu.baselines.paper import NEVER, FrozenRate, PaperProblem, paper_problem
from cerwu_gpu.errors import ConfigError, FactorizationError
from cerwu_gpu.quantize.layer import relative_loss
from tests.reference.straight_line import paper

METHODS = {"cerwu": "cerwu", "optq-rd": "cerwu-gamma0", "optq": "optq"}
RATE_MODELS = {"shannon": "histogram", "gaussian": "gaussian", "uniform": "uniform"}

LEAST_AGREEMENT = 0.985
LEAST_MEAN_AGREEMENT = 0.998
LOSS_TOLERANCE = 0.01


def layer(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian weights, and a correlated Hessian with one input that was never active."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) / 20
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    x = mixing @ torch.randn(columns, 4 * columns, generator=generator)
    x[columns // 2] = 0
    return weight, 2 / x.shape[1] * x @ x.t()


def problem_of(target: torch.Tensor, reach: int) -> PaperProblem:
    """A problem without a Hessian and without a price of bits."""
    rows, columns = target.shape
    costs = torch.zeros(rows), torch.ones(columns), torch.zeros(columns)
    return PaperProblem(target, torch.eye(columns), *costs, reach, 1.0)


def test_agrees_with_the_authors_code(data: Path) -> None:
    shares = []
    for run in json.loads((data / "golden" / "index.json").read_text()):
        arrays = np.load(data / "golden" / f"{run['case']}.npz")
        weight, hessian = torch.from_numpy(arrays["W"]), torch.from_numpy(arrays["H"])
        expected = torch.from_numpy(np.load(data / "golden" / run["file"])["q"].astype(np.int32))
        problem = paper_problem(
            weight,
            hessian,
            method=METHODS[run["method"]],
            levels=run["nbins"],
            lmbda=run["lmbda"],
        )
        symbols = FrozenRate.of(RATE_MODELS[run["rate_model"]], problem).search(problem)
        assert problem.step == pytest.approx(run["step"], rel=1e-6), run["file"]
        shares.append(float((symbols == expected).float().mean()))
        assert shares[-1] >= LEAST_AGREEMENT, run["file"]
        loss = relative_loss(weight, symbols * problem.step, hessian)
        assert loss == pytest.approx(run["relative_loss"], rel=LOSS_TOLERANCE), run["file"]
    assert len(shares) == 52
    assert np.mean(shares) >= LEAST_MEAN_AGREEMENT


@pytest.mark.parametrize("levels", [8, 33])
@pytest.mark.parametrize("rate_model", ["histogram", "gaussian", "uniform"])
@pytest.mark.parametrize("method", ["cerwu", "cerwu-gamma0", "optq"])
def test_equals_the_straight_line(method: str, rate_model: str, levels: int) -> None:
    weight, hessian = layer(24, 21, seed=levels)
    lmbda = 3e-4
    expected, step = paper(
        weight.numpy(),
        hessian.numpy(),
        method=method,
        levels=levels,
        lmbda=lmbda,
        rate_model=rate_model,
    )
    problem = paper_problem(weight, hessian, method=method, levels=levels, lmbda=lmbda)
    rate = FrozenRate(FrozenRate.of(rate_model, problem).bits, block_size=8)
    assert problem.step == pytest.approx(step, rel=1e-6)
    assert torch.equal(rate.search(problem).long(), torch.from_numpy(expected))


def test_the_cases_of_the_straight_line_are_worth_comparing() -> None:
    """Methods and rate models change what is found, and the price of bits plays a part."""
    weight, hessian = layer(24, 21, seed=33)
    found = {}
    for method in ("cerwu", "cerwu-gamma0", "optq"):
        problem = paper_problem(weight, hessian, method=method, levels=33, lmbda=3e-4)
        for model in ("histogram", "gaussian", "uniform"):
            found[method, model] = FrozenRate.of(model, problem).search(problem)
    # Without a price all rate models are one; with gamma = 0, so is the uniform one.
    same = [("optq", "histogram"), ("optq", "gaussian"), ("cerwu-gamma0", "uniform")]
    for key in same:
        assert torch.equal(found[key], found["optq", "uniform"])
    assert problem.reach == 16  # the last one is optq; cerwu tries twice as many
    wide = paper_problem(weight, hessian, method="cerwu", levels=33, lmbda=3e-4)
    assert wide.reach == 33
    assert wide.step == problem.step
    others = [symbols for key, symbols in found.items() if key not in same]
    assert len({tuple(symbols.flatten().tolist()) for symbols in others}) == 6


def test_halves_count_away_from_zero_in_the_histogram() -> None:
    target = torch.tensor([[0.5, -0.5, 1.5, -1.5, 2.5, 0.0]])
    bits = FrozenRate.of("histogram", problem_of(target, 3)).bits
    counts = torch.tensor([0, 1, 1, 1, 1, 1, 1]) + 1  # 2.5 is 3, nothing is -3
    counts[4] = 2
    counts[5] = 2
    torch.testing.assert_close(bits, -(counts / counts.sum()).log2())


def test_far_gaussian_levels_have_no_probability_above_and_some_below() -> None:
    target = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    bits = FrozenRate.of("gaussian", problem_of(target, 16)).bits
    assert float(bits[16 + 7]) == NEVER
    assert float(bits[16 - 7]) < 60
    assert float(bits[16 - 12]) == NEVER
    torch.testing.assert_close(bits[16 - 3 : 16], bits[17:20].flip(0), atol=2e-3, rtol=0)


def test_code_length_is_that_of_the_table() -> None:
    bits = torch.tensor([3.0, 1.0, 2.0])
    assert FrozenRate(bits).code_length(torch.tensor([[-1, 0, 0], [1, 1, 0]])) == 3 + 3 * 1 + 2 * 2


def test_what_has_no_step_or_no_factor_is_refused() -> None:
    weight, hessian = layer(5, 6)
    with pytest.raises(ConfigError, match="are equal"):
        paper_problem(torch.ones(5, 6), hessian, method="cerwu", levels=8, lmbda=1e-3)
    with pytest.raises(ConfigError, match="levels is 1"):
        paper_problem(weight, hessian, method="cerwu", levels=1, lmbda=1e-3)
    with pytest.raises(FactorizationError, match="not positive definite"):
        paper_problem(weight, -hessian, method="cerwu", levels=8, lmbda=1e-3)
