"""The rate-aware rounding of a block against a straight-line float64 implementation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cerwu_gpu.block_problem import Alphabet, BlockProblem
from cerwu_gpu.reference.obs import quantize_block
from tests.reference.straight_line import obs


def problem(rows, columns, tables=3, half=6, seed=0, lmbda=0.05):
    """Random weights, a unit upper factor, smooth (Laplacian) tables and all the weights."""
    generator = torch.Generator().manual_seed(seed)
    x = 2.5 * torch.randn(rows, columns, generator=generator)
    factor = torch.triu(0.3 * torch.randn(columns, columns, generator=generator), 1)
    factor += torch.eye(columns)
    q = torch.arange(-half, half + 1).abs()
    spread = torch.arange(1, tables + 1)[:, None] * 0.8
    rates = (q / spread).float() + 1.0
    row_class = torch.randint(0, max(1, tables - 1), (rows,), generator=generator)
    column_class = torch.randint(0, 2 if tables > 1 else 1, (columns,), generator=generator)
    return {
        "x": x,
        "factor": factor,
        "alphabet": Alphabet(rates, -half),
        "row_class": row_class,
        "column_class": column_class,
        "lmbda": lmbda * (0.5 + torch.rand(rows, generator=generator)),
        "importance": 0.5 + torch.rand(columns, generator=generator),
        "curvature": 0.2 * torch.rand(columns, generator=generator),
    }


SHAPES = [
    pytest.param(1, 1, id="one-weight"),
    pytest.param(1, 37, id="one-row"),
    pytest.param(5, 1, id="one-column"),
    pytest.param(7, 8, id="exactly-one-leaf"),
    pytest.param(7, 9, id="one-column-more-than-a-leaf"),
    pytest.param(33, 29, id="nothing-divides"),
]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("exhaustive", [True, False])
def test_equals_the_straight_line(rows, columns, exhaustive):
    given_ = problem(rows, columns, seed=rows * 100 + columns)
    symbols, error = quantize_block(BlockProblem(**given_), exhaustive=exhaustive)
    table = given_["row_class"][:, None] + given_["column_class"]
    expected = obs(
        given_["x"].numpy(),
        given_["factor"].double().numpy(),
        given_["alphabet"].rates.double().numpy(),
        -6,
        table.numpy(),
        given_["lmbda"].double().numpy(),
        given_["importance"].double().numpy(),
        given_["curvature"].double().numpy(),
    )
    assert symbols.dtype == torch.int32
    assert torch.equal(symbols.long(), torch.from_numpy(expected))
    # What the errors mean: x minus their effect is what the symbols stand for.
    back = given_["x"].double() - error.double() @ given_["factor"].double()
    torch.testing.assert_close(back, symbols.double(), atol=1e-4, rtol=0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), lmbda=st.floats(0, 0.2), rows=st.integers(1, 9))
def test_near_candidates_find_what_a_full_scan_finds(seed, lmbda, rows):
    # As completing the square makes it: what the curvature gives back, the rate has charged.
    # Waterfilled steps have lmbda near 0.07 in these units; dear bits can hide far optima.
    given_ = problem(rows, 11, seed=seed, lmbda=lmbda)
    gamma = torch.tensor([0.9, 0.4, 0.2])
    rates = 1 + gamma[:, None] / 2 * torch.arange(-6, 7).square() + given_["alphabet"].rates / 4
    given_["alphabet"] = Alphabet(rates, -6)
    given_["curvature"] = given_["lmbda"].min() * 0.2 / given_["importance"]
    near = quantize_block(BlockProblem(**given_), exhaustive=False)[0]
    full = quantize_block(BlockProblem(**given_), exhaustive=True)[0]
    assert torch.equal(near, full)


def test_without_rate_or_curvature_it_is_nearest_rounding_of_what_is_left():
    given_ = problem(16, 10, lmbda=0.0)
    given_["curvature"] = torch.zeros(10)
    given_["factor"] = torch.eye(10)
    symbols, _ = quantize_block(BlockProblem(**given_), exhaustive=True)
    assert torch.equal(symbols, given_["x"].round().clamp(-6, 6).int())


def test_a_list_of_values_gives_positions():
    given_ = problem(4, 6, lmbda=0.0)
    levels = torch.tensor([-1.0, -0.25, 0.0, 0.5, 2.0])
    given_["alphabet"] = Alphabet(torch.zeros(3, 5), 0, levels=levels)
    given_["factor"] = torch.eye(6)
    given_["curvature"] = torch.zeros(6)
    symbols, error = quantize_block(BlockProblem(**given_), exhaustive=False)
    distance = (given_["x"][:, :, None] - levels).abs()
    assert torch.equal(symbols.long(), distance.argmin(dim=2))
    torch.testing.assert_close(error, given_["x"] - levels[symbols.long()])


def test_escapes_leave_the_integers_unbounded():
    given_ = problem(3, 4, lmbda=1e-4)
    given_["x"][1, 2] = 5000.4
    given_["factor"] = torch.eye(4)
    given_["curvature"] = torch.zeros(4)
    rates = torch.cat([given_["alphabet"].rates, torch.full((3, 1), 20.0)], dim=1)
    given_["alphabet"] = Alphabet(rates, -6, escapes=True)
    symbols, _ = quantize_block(BlockProblem(**given_), exhaustive=False)
    assert int(symbols[1, 2]) == 5000


def test_a_dearer_bit_never_buys_more_bits():
    given_ = problem(64, 16)
    table = given_["row_class"][:, None] + given_["column_class"]
    spent = []
    for lmbda in (0.0, 0.02, 0.1, 0.5, 5.0):
        given_["lmbda"] = torch.full((64,), lmbda)
        symbols, _ = quantize_block(BlockProblem(**given_), exhaustive=True)
        spent.append(float(given_["alphabet"].rates[table, symbols.long() + 6].sum()))
    assert np.all(np.diff(spent) <= 0)
    assert spent[-1] < spent[0]
