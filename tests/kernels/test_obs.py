"""The kernel and the compiled form that round a block, against reference/obs.py."""

import importlib
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cerwu_gpu.block_problem import Alphabet, BlockProblem
from cerwu_gpu.kernels import obs as kernel
from cerwu_gpu.reference import obs as reference
from tests.conftest import GPU

FLIPS = 1e-4
"""Share of symbols that may differ at a tie; in a small test none may."""
TIE = 1e-4
"""Costs this close, relative to the larger of them and 1, tie within float32's rounding."""
ERROR = {"atol": 1e-4, "rtol": 1e-5}

SHAPES = [
    pytest.param(1, 1, id="one-weight"),
    pytest.param(1, 37, id="one-row"),
    pytest.param(35, 1, id="one-column"),
    pytest.param(16, 16, id="exactly-one-tile"),
    pytest.param(17, 17, id="one-more-than-a-tile"),
    pytest.param(33, 53, id="nothing-divides"),
    pytest.param(3, 128, id="a-block"),
]


@pytest.fixture(params=["kernels", "compiled"], autouse=True)
def form(request, monkeypatch):
    """Every test of this file is run on both forms: `kernel` is the module of one of them."""
    module = importlib.import_module(f"cerwu_gpu.{request.param}.obs")
    monkeypatch.setattr(sys.modules[__name__], "kernel", module)
    return request.param


@pytest.fixture
def device(form):
    """The GPU where there is one and the form can use it, else the CPU."""
    return torch.device("cuda" if GPU and form == "kernels" else "cpu")


def problem(rows, columns, device, *, levels=13, lowest=None, escapes=False, tables=5, spread=2.5):
    """Generic weights under random tables, in the arguments of quantize_block."""
    generator = torch.Generator().manual_seed(1000 * rows + columns + levels)

    def random(*shape):
        return torch.rand(*shape, generator=generator)

    lowest = -(levels // 2) if lowest is None else lowest
    integers = torch.arange(lowest, lowest + levels)
    rates = (integers.abs() / torch.linspace(0.8, 4, tables)[:, None]) + 1 + random(tables, levels)
    if escapes:
        rates = torch.cat([rates, rates.amax(dim=1, keepdim=True) + 12], dim=1)
    factor = torch.randn(columns, columns, generator=generator) * 0.3 / max(columns, 8) ** 0.5
    # Below the diagonal nothing counts, so nothing there may be looked at.
    factor = torch.triu(factor, 1) + torch.tril(torch.full_like(factor, torch.nan))
    arguments = {
        "x": spread * torch.randn(rows, columns, generator=generator),
        "factor": factor,
        "row_class": torch.randint(0, tables - 1, (rows,), generator=generator),
        "column_class": torch.randint(0, 2, (columns,), generator=generator),
        "lmbda": 0.2 * random(rows),
        "importance": 0.5 + random(columns),
        "curvature": 0.2 * random(columns),
    }
    arguments = {name: tensor.to(device) for name, tensor in arguments.items()}
    return {**arguments, "alphabet": Alphabet(rates.to(device), lowest, escapes)}


def cost(arguments, row, column, symbol, error):
    """float64 cost of one symbol, given the errors of the columns before it."""
    alphabet = arguments["alphabet"]
    x = arguments["x"][row, column].double()
    x -= error[row, :column].double() @ arguments["factor"][:column, column].double()
    value = float(symbol) if alphabet.levels is None else alphabet.levels[symbol].double()
    index = symbol - alphabet.lowest
    if alphabet.escapes and not 0 <= index < alphabet.size:
        index = alphabet.size
    table = arguments["row_class"][row] + arguments["column_class"][column]
    square = (x - value) ** 2 - arguments["curvature"][column].double() * value**2
    bits = arguments["lmbda"][row].double() * alphabet.rates[table, index].double()
    return float(arguments["importance"][column].double() / 2 * square + bits)


def assert_agree(arguments, exhaustive):
    """Symbols are equal but for ties; what follows in a row after a tie is not compared."""
    before = arguments["x"].clone()
    symbols, error = kernel.quantize_block(BlockProblem(**arguments), exhaustive=exhaustive)
    assert torch.equal(arguments["x"], before), "x was written to"
    assert symbols.dtype == torch.int32
    wanted, wanted_error = reference.quantize_block(
        BlockProblem(**arguments), exhaustive=exhaustive
    )
    differ = symbols != wanted
    flips = differ.any(dim=1).nonzero()[:, 0].tolist()
    assert len(flips) <= FLIPS * symbols.numel(), f"{len(flips)} of {symbols.numel()} differ"
    for row in flips:
        column = int(differ[row].int().argmax())
        ours, theirs = (
            cost(arguments, row, column, int(s[row, column]), wanted_error)
            for s in (symbols, wanted)
        )
        assert ours == pytest.approx(theirs, rel=TIE, abs=TIE)
    same = ~differ.any(dim=1)
    torch.testing.assert_close(error[same], wanted_error[same], **ERROR)
    return symbols


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("exhaustive", [True, False], ids=["full", "near"])
def test_equals_the_reference(rows, columns, exhaustive, device, poisoned_empty):
    assert_agree(problem(rows, columns, device), exhaustive)


@pytest.mark.parametrize("exhaustive", [True, False], ids=["full", "near"])
@pytest.mark.parametrize(
    ("levels", "lowest"),
    [
        pytest.param(1, 0, id="one-level"),
        pytest.param(1, -1, id="one-level-but-not-zero"),
        pytest.param(3, -1, id="ternary"),
        pytest.param(9, 2, id="zero-is-outside"),
        pytest.param(16, -8, id="even-and-exactly-one-tile-of-levels"),
        pytest.param(33, -16, id="odd-and-more-than-two-tiles"),
    ],
)
def test_alphabets_of_all_sizes(levels, lowest, exhaustive, device, poisoned_empty):
    given_ = problem(18, 19, device, levels=levels, lowest=lowest)
    symbols = assert_agree(given_, exhaustive)
    assert int(symbols.min()) >= lowest and int(symbols.max()) < lowest + levels


def test_escapes_leave_the_integers_unbounded(device, poisoned_empty):
    given_ = problem(9, 21, device, escapes=True)
    given_["x"][1, 3] = 5000.4
    given_["x"][8, 0] = -70000.2
    given_["x"][2, 5] = 2.0**24 + 2
    symbols = assert_agree(given_, exhaustive=False)
    assert 4000 < int(symbols[1, 3]) < 6000
    assert int(symbols[2, 5]) > 2**24 - 100


@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("exhaustive", [True, False], ids=["full", "near"])
def test_a_list_of_values_gives_positions(count, exhaustive, device, poisoned_empty):
    given_ = problem(18, 20, device, levels=count, lowest=0)
    levels = (3 * torch.randn(count)).sort().values.to(device)
    given_["alphabet"] = Alphabet(given_["alphabet"].rates, 0, levels=levels)
    symbols = assert_agree(given_, exhaustive)
    assert int(symbols.min()) >= 0 and int(symbols.max()) < count


@pytest.mark.parametrize("exhaustive", [True, False], ids=["full", "near"])
def test_of_equal_costs_the_same_one_wins(exhaustive, device):
    # Halves without rate or coupling: every cost is exact, so every tie is one in both forms.
    given_ = problem(20, 24, device, tables=2)
    given_["x"] = torch.randint(-15, 16, (20, 24), device=device) / 2
    given_["factor"] = torch.zeros(24, 24, device=device)
    given_["importance"] = torch.ones(24, device=device)
    given_["curvature"] = torch.zeros(24, device=device)
    given_["lmbda"] = torch.zeros(20, device=device)
    symbols, _ = kernel.quantize_block(BlockProblem(**given_), exhaustive=exhaustive)
    assert torch.equal(
        symbols, reference.quantize_block(BlockProblem(**given_), exhaustive=exhaustive)[0]
    )


@pytest.mark.parametrize("exhaustive", [True, False], ids=["full", "near"])
def test_columns_of_zeros(exhaustive, device):
    given_ = problem(5, 18, device)
    given_["x"][:, 3:17] = 0
    given_["factor"] = torch.eye(18, device=device)
    symbols = assert_agree(given_, exhaustive)
    if not exhaustive:
        assert not symbols[:, 3:17].any()


def test_without_rate_it_is_nearest_rounding_of_what_is_left(device):
    given_ = problem(16, 10, device, escapes=True, spread=30)
    given_["lmbda"] = torch.zeros(16, device=device)
    given_["curvature"] = torch.zeros(10, device=device)
    given_["factor"] = torch.eye(10, device=device)
    symbols, _ = kernel.quantize_block(BlockProblem(**given_), exhaustive=False)
    assert torch.equal(symbols, given_["x"].round().int())


def test_blocks_are_slices_of_larger_matrices(device, poisoned_empty):
    given_ = problem(19, 23, device)
    wide = dict(given_)
    for name in ("x", "factor"):
        larger = torch.full((30, 50), torch.nan, device=device)
        larger[: len(given_[name]), 7:30] = given_[name]
        wide[name] = larger[: len(given_[name]), 7:30]
    wide["x"] = wide["x"].t().contiguous().t()  # the columns may even be the contiguous ones
    wide["lmbda"] = given_["lmbda"][:1].expand(19)
    given_["lmbda"] = wide["lmbda"].clone()
    ours = kernel.quantize_block(BlockProblem(**wide), exhaustive=False)
    theirs = kernel.quantize_block(BlockProblem(**given_), exhaustive=False)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


# The fixture only names the device: nothing of it carries over from one example to the next.
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 18),
    columns=st.integers(1, 24),
    levels=st.integers(1, 40),
    escapes=st.booleans(),
    spread=st.floats(0, 100),
)
def test_any_problem(rows, columns, levels, escapes, spread, device):
    given_ = problem(rows, columns, device, levels=levels, escapes=escapes, spread=spread)
    assert_agree(given_, exhaustive=False)


def test_no_rows_and_no_columns(device):
    for rows, columns in ((0, 4), (4, 0)):
        given_ = problem(4, 4, device)
        row = {name: given_[name][:rows] for name in ("row_class", "lmbda")}
        names = ("column_class", "importance", "curvature")
        column = {name: given_[name][:columns] for name in names}
        given_.update(row, **column, x=given_["x"][:rows, :columns])
        given_["factor"] = given_["factor"][:columns, :columns]
        symbols, error = kernel.quantize_block(BlockProblem(**given_), exhaustive=False)
        assert symbols.shape == error.shape == (rows, columns)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda t: t.double()),
        ("x", lambda t: t[None]),
        ("factor", lambda t: t[:3]),
        ("lmbda", lambda t: t[:, None]),
        ("row_class", lambda t: t.int()),
        ("column_class", lambda t: t[1:]),
        ("importance", lambda t: t.to("meta")),
        ("curvature", lambda t: t.half()),
    ],
)
def test_what_does_not_fit_is_named(name, change, device):
    given_ = problem(4, 5, device)
    given_[name] = change(given_[name])
    with pytest.raises(ValueError, match=name):
        kernel.quantize_block(BlockProblem(**given_), exhaustive=False)


@pytest.mark.gpu
@pytest.mark.parametrize("exhaustive", [True, False], ids=["full", "near"])
@pytest.mark.parametrize("escapes", [True, False])
def test_a_layer_s_block_on_the_gpu(exhaustive, escapes, device):
    assert_agree(problem(4096, 128, device, levels=33, escapes=escapes), exhaustive)


BATCHED = ("factor", "column_class", "importance", "curvature")


def batch_of(problems):
    """Problems of equal shape and alphabet as one."""
    joined = {name: torch.cat([one[name] for one in problems]) for name in ROWWISE}
    joined |= {name: torch.stack([one[name] for one in problems]) for name in BATCHED}
    return {**joined, "alphabet": problems[0]["alphabet"]}


ROWWISE = ("x", "row_class", "lmbda")


@pytest.mark.parametrize("exhaustive", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (17, 5), (20, 33)])
def test_a_batch_is_its_problems_one_by_one(rows, columns, exhaustive, device, poisoned_empty):
    first = problem(rows, columns, device, escapes=not exhaustive)
    others = [{**first, "x": 2 * first["x"].flip(0), "importance": first["importance"].flip(0)}]
    others += [{**first, "factor": -first["factor"], "lmbda": 3 * first["lmbda"]}]
    given = batch_of([first, *others])
    assert_agree_in_batch(given, exhaustive)
    symbols, error = kernel.quantize_block(BlockProblem(**given), exhaustive=exhaustive)
    alone = [
        kernel.quantize_block(BlockProblem(**one), exhaustive=exhaustive)
        for one in (first, *others)
    ]
    assert torch.equal(symbols, torch.cat([each for each, _ in alone]))
    assert torch.equal(error, torch.cat([each for _, each in alone]))


def assert_agree_in_batch(given, exhaustive):
    """The definition's symbols; these problems have no ties."""
    wanted, _ = reference.quantize_block(BlockProblem(**given), exhaustive=exhaustive)
    symbols, _ = kernel.quantize_block(BlockProblem(**given), exhaustive=exhaustive)
    assert torch.equal(symbols, wanted)


def test_rows_that_are_not_those_of_equal_problems_are_refused(device):
    first = problem(6, 4, device)
    given = batch_of([first, first, first, first])
    for name in ROWWISE:
        given[name] = given[name][:-1]
    with pytest.raises(ValueError, match="23 rows are not those of 4 problems"):
        kernel.quantize_block(BlockProblem(**given), exhaustive=False)
