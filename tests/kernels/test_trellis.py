"""The kernel that searches a trellis against its definition in reference/trellis.py."""

import importlib
import sys

import pytest
import torch

from cerwu_gpu.block_problem import Alphabet, BlockProblem
from cerwu_gpu.kernels import trellis as kernel
from cerwu_gpu.reference import trellis as reference
from cerwu_gpu.reference.dequantize import trellis_levels, trellis_quantizers, trellis_states
from cerwu_gpu.spec import TRELLIS_NEXT, TRELLIS_QUANTIZER
from tests.conftest import GPU

FLIPS = 1e-4
"""Share of symbols that may differ where two paths tie; in a small test none may."""
TIE = 1e-4
"""Relative difference of the costs of two paths that tie within float32's rounding."""
ERROR = {"atol": 1e-4, "rtol": 1e-5}
FAR_ERROR = {"atol": 4e-4, "rtol": 1e-5}
"""Tolerance for weights near 1000, whose float32 neighbours are 6e-5 away."""

SHAPES = [
    pytest.param(1, 1, 1, id="one-weight"),
    pytest.param(1, 20, 20, id="one-row"),
    pytest.param(18, 1, 1, id="one-column"),
    pytest.param(16, 16, 16, id="exactly-one-tile"),
    pytest.param(17, 8, 3, id="one-row-more-than-a-tile"),
    pytest.param(2, 33, 8, id="lookahead-of-more-than-a-tile"),
    pytest.param(3, 18, 17, id="one-column-of-lookahead"),
]
STATES = pytest.mark.parametrize("states", [4, 8, 16, 32])


@pytest.fixture(params=["kernels", "compiled"], autouse=True)
def form(request, monkeypatch):
    """Every test of this file is run on both forms: `kernel` is the module of one of them."""
    module = importlib.import_module(f"cerwu_gpu.{request.param}.trellis")
    monkeypatch.setattr(sys.modules[__name__], "kernel", module)
    return request.param


@pytest.fixture
def device(form):
    """The GPU where there is one and the form can use it, else the CPU."""
    return torch.device("cuda" if GPU and form == "kernels" else "cpu")


def solve(form, arguments, commit):
    """What a form makes of the problem and the other arguments."""
    options = {name: arguments[name] for name in ("states", "start")}
    fields = {name: value for name, value in arguments.items() if name not in options}
    return form.quantize_block_trellis(BlockProblem(**fields), **options, commit=commit)


def problem(rows, columns, device, states, *, half=4, tables=4, spread=3.0):
    """Generic weights under random tables, in the arguments of quantize_block_trellis."""
    generator = torch.Generator().manual_seed(1000 * rows + columns)

    def random(*shape):
        return torch.rand(*shape, generator=generator)

    integers = torch.arange(-half, half + 1).abs()
    slope = torch.linspace(0.4, 1.5, 2 * tables)[:, None]
    rates = torch.cat([integers * slope + 1, torch.full((2 * tables, 1), 20.0)], dim=1)
    factor = torch.randn(columns, columns, generator=generator) * 0.5 / max(columns, 8) ** 0.5
    # Below the diagonal nothing counts, so nothing there may be looked at.
    factor = torch.triu(factor, 1) + torch.tril(torch.full_like(factor, torch.nan))
    arguments = {
        "x": spread * torch.randn(rows, columns, generator=generator),
        "factor": factor,
        "row_class": torch.randint(0, tables - 1, (rows,), generator=generator),
        "column_class": torch.randint(0, 2, (columns,), generator=generator),
        "lmbda": 0.2 * random(rows),
        "importance": 0.5 + random(columns),
        "curvature": 0.1 * random(columns),
        "start": torch.randint(0, states, (rows,), generator=generator),
    }
    arguments = {name: tensor.to(device) for name, tensor in arguments.items()}
    rates = (rates + random(*rates.shape)).to(device)
    return {**arguments, "alphabet": Alphabet(rates, -half, escapes=True), "states": states}


def path_cost(arguments, row, symbols):
    """float64 cost of one row's path over all columns of the block."""
    alphabet, states = arguments["alphabet"], arguments["states"]
    x = arguments["x"][row].double().cpu()
    factor = arguments["factor"].double().cpu()
    state, total = int(arguments["start"][row]), 0.0
    for j, k in enumerate(symbols.tolist()):
        second = TRELLIS_QUANTIZER[states][state]
        level = 2 * k - second * ((k > 0) - (k < 0))
        index = k - alphabet.lowest
        index = index if 0 <= index < alphabet.size else alphabet.size
        table = 2 * int(arguments["row_class"][row] + arguments["column_class"][j]) + second
        square = float(x[j] - level) ** 2 - float(arguments["curvature"][j]) * level**2
        total += float(arguments["importance"][j]) / 2 * square
        total += float(arguments["lmbda"][row]) * float(alphabet.rates[table, index])
        x[j + 1 :] -= (x[j] - level) * factor[j, j + 1 :]
        state = TRELLIS_NEXT[states][state][k & 1]
    return total


def assert_agree(arguments, commit, tolerance=ERROR):
    """Symbols, errors and the state at the end are the reference's but for paths that tie."""
    before = arguments["x"].clone()
    symbols, error, end = solve(kernel, arguments, commit)
    assert torch.equal(arguments["x"], before), "x was written to"
    assert (symbols.dtype, end.dtype) == (torch.int32, torch.int64)
    wanted = solve(reference, arguments, commit)
    tied = (symbols != wanted[0]).any(dim=1)
    flips = tied.nonzero()[:, 0].tolist()
    assert len(flips) <= FLIPS * symbols.numel(), f"{len(flips)} of {symbols.numel()} differ"
    if flips:  # which path is cheapest shows only in whole ones
        columns = arguments["x"].shape[1]
        ours = solve(kernel, arguments, columns)[0]
        theirs = solve(reference, arguments, columns)[0]
        for row in flips:
            expected = path_cost(arguments, row, theirs[row])
            assert path_cost(arguments, row, ours[row]) == pytest.approx(expected, rel=TIE)
    rounding = 4 * torch.finfo(torch.float32).eps * float(before.abs().max())
    limits = {**tolerance, "atol": max(tolerance["atol"], rounding)}
    torch.testing.assert_close(error[~tied], wanted[1][~tied], **limits)
    assert torch.equal(end[~tied], wanted[2][~tied])
    return symbols, end


@STATES
@pytest.mark.parametrize(("rows", "columns", "commit"), SHAPES)
def test_equals_the_reference(rows, columns, commit, states, device, poisoned_empty):
    assert_agree(problem(rows, columns, device, states), commit)


@STATES
def test_the_state_after_the_commitment_is_the_machine_s(states, device):
    given = problem(12, 11, device, states)
    given["start"] = torch.zeros(12, dtype=torch.int64, device=device)
    whole, _, _ = solve(kernel, given, 11)
    for commit in (1, 6):
        part, _, end = solve(kernel, given, commit)
        assert torch.equal(part, whole[:, :commit])
        assert torch.equal(end, trellis_states(whole & 1, states)[:, commit])


@STATES
def test_large_weights_escape_with_the_right_parity(states, device, poisoned_empty):
    given = problem(4, 19, device, states)
    given["x"][0, 3] = 401.2
    given["x"][3, 17] = -900.7
    given["start"] = torch.zeros(4, dtype=torch.int64, device=device)
    symbols, _ = assert_agree(given, 19, FAR_ERROR)
    level = trellis_levels(symbols, trellis_quantizers(symbols, states))
    assert abs(float(level[0, 3]) - 401.2) < 6
    assert int(symbols[3, 17]) < -400


@STATES
def test_of_equal_costs_the_same_path_wins(states, device):
    # Halves without rate or coupling: every cost is exact, so every tie is one in both forms.
    given = problem(16, 12, device, states, tables=2)
    given["x"] = torch.randint(-15, 16, (16, 12), device=device) / 2
    given["factor"] = torch.zeros(12, 12, device=device)
    given["importance"] = torch.ones(12, device=device)
    given["curvature"] = torch.zeros(12, device=device)
    given["lmbda"] = torch.zeros(16, device=device)
    symbols, _, end = solve(kernel, given, 9)
    wanted = solve(reference, given, 9)
    assert torch.equal(symbols, wanted[0])
    assert torch.equal(end, wanted[2])


@STATES
def test_of_two_symbols_at_one_distance_the_same_one_wins(states, device):
    # 6 lies between the levels 4 and 8 of quantizer 0, and no odd symbol is worth its bits.
    given = problem(8, 5, device, states, tables=2)
    given["x"] = torch.full((8, 5), 6.0, device=device) * torch.tensor([[1], [-1]] * 4).to(device)
    given["factor"] = torch.zeros(5, 5, device=device)
    given["importance"] = torch.ones(5, device=device)
    given["curvature"] = torch.zeros(5, device=device)
    given["lmbda"] = torch.ones(8, device=device)
    given["start"] = torch.zeros(8, dtype=torch.int64, device=device)
    bits = 64.0 * (torch.arange(-4, 6) % 2).expand(4, 10).clone()
    bits[:, -1] = 200
    given["alphabet"] = Alphabet(bits.to(device), -4, escapes=True)
    symbols, _, _ = solve(kernel, given, 5)
    assert torch.equal(symbols, solve(reference, given, 5)[0])


@STATES
def test_columns_of_zeros_cost_nothing(states, device):
    given = problem(3, 18, device, states)
    given["x"].zero_()
    given["start"] = torch.zeros(3, dtype=torch.int64, device=device)
    symbols, end = assert_agree(given, commit=18)
    assert not symbols.any() and not end.any()


def test_more_rows_than_a_launch_takes(form, device, monkeypatch, poisoned_empty):
    if form == "kernels":
        monkeypatch.setattr(kernel, "LAUNCH_ROWS", 16)
    assert_agree(problem(37, 5, device, 4), commit=3)


def test_blocks_are_slices_of_larger_matrices(device, poisoned_empty):
    given = problem(9, 10, device, 4)
    wide = dict(given)
    for name in ("x", "factor"):
        larger = torch.full((30, 40), torch.nan, device=device)
        larger[: len(given[name]), 7:17] = given[name]
        wide[name] = larger[: len(given[name]), 7:17]
    ours = solve(kernel, wide, 10)
    theirs = solve(kernel, given, 10)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("states", {"states": 64}),
        ("commit", {"commit": 0}),
        ("commit", {"commit": 7}),
        ("start", {"start": torch.zeros(3, dtype=torch.int64)}),
        ("escape", {"alphabet": Alphabet(torch.zeros(8, 9), -4)}),
        ("row_class", {"row_class": torch.zeros(4)}),
    ],
)
def test_what_does_not_fit_is_named(word, change):
    given = {**problem(4, 6, torch.device("cpu"), 4), "commit": 6, **change}
    with pytest.raises(ValueError, match=word):
        solve(kernel, given, given.pop("commit"))


@pytest.mark.gpu
@STATES
def test_a_layer_s_block_on_the_gpu(states, device):
    assert_agree(problem(4096, 160, device, states), commit=128)


@STATES
@pytest.mark.parametrize("few", [False, True])
def test_a_batch_is_its_problems_one_by_one(states, few, form, device, monkeypatch, poisoned_empty):
    if few and form == "kernels":
        monkeypatch.setattr(kernel, "LAUNCH_ROWS", 35)  # two problems, then the third
    first = problem(17, 20, device, states)
    second = {**first, "x": 2 * first["x"].flip(0), "importance": first["importance"].flip(0)}
    third = {**first, "factor": -first["factor"], "start": first["start"].flip(0)}
    each = [first, second, third]
    given = {**first}
    for name in ("x", "row_class", "lmbda", "start"):
        given[name] = torch.cat([one[name] for one in each])
    for name in ("factor", "column_class", "importance", "curvature"):
        given[name] = torch.stack([one[name] for one in each])
    ours = solve(kernel, given, 9)
    alone = zip(*(solve(kernel, one, 9) for one in each), strict=True)
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(ours, alone, strict=True))
    wanted = solve(reference, given, 9)
    assert torch.equal(ours[0], wanted[0]) and torch.equal(ours[2], wanted[2])
