"""Numbers that break others: each has an outcome that is stated here, whatever the quantizer."""

import math

import pytest
import torch

from cerwu_gpu.block_problem import Alphabet, BlockProblem
from cerwu_gpu.compiled import obs as compiled
from cerwu_gpu.container.matrix import encode_matrix, unpack_matrix
from cerwu_gpu.errors import CalibrationError, CerwuError, ConfigError, ModelError
from cerwu_gpu.quantize.layer import QuantizedStack, quantize_stack
from cerwu_gpu.quantize.objective import quadratic_error
from cerwu_gpu.quantize.sensitivity import Sensitivities
from cerwu_gpu.reference import obs
from cerwu_gpu.reference.weights import decode_weights
from cerwu_gpu.steps import covering_code, step_codes, step_values
from tests.configs import configured
from tests.quantize.test_layer import layer

ROWS, COLUMNS = 5, 20
EMPTY = ("zero", "zero rows", "zero columns")
SIZES = ("tiny", "denormal", "huge", "massive input", "spread")
WATERFILLED = [
    {"quantizer": quantizer, "method": method}
    for quantizer in ("scalar", "trellis4", "trellis8", "trellis32")
    for method in ("cerwu", "cerwu-gamma0")
]
GIVEN = [
    {"levels": 16, "scale": scale, "method": method}
    for scale in ("per-tensor", "per-row")
    for method in ("cerwu", "cerwu-gamma0", "optq", "rtn")
]
# Where only bits count, given levels and no completed square leave nothing but the likeliest level.
LARGEST_LOSS = {"cerwu": 1 + 1e-5, "cerwu-gamma0": 4.0, "optq": 1.0, "rtn": 1.0}
settings = pytest.mark.parametrize(
    "setting", WATERFILLED + GIVEN, ids=lambda x: "-".join(map(str, x.values()))
)


def solved(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    alpha: torch.Tensor | None = None,
    **setting: object,
) -> tuple[QuantizedStack, torch.Tensor]:
    """The stack, and its weight after a way through the file, which must not change a bit."""
    config = configured(**{"lmbda": 1e-2, **setting})
    stack = quantize_stack([weight], hessian, config, None if alpha is None else [alpha])
    matrix = stack.matrices[0]
    coded = encode_matrix(matrix, stack.relative_losses[0])
    coded.part.check("x")
    stored = unpack_matrix("x", coded.part, torch.from_numpy(coded.words), coded.side, "cpu")
    decoded = decode_weights([stored.coded], [stored.rule], torch.float32)[0]
    assert torch.equal(decoded, matrix.weight(torch.float32))
    assert bool(torch.isfinite(decoded).all())
    assert math.isfinite(stack.relative_losses[0])
    return stack, decoded


def weights(kind: str) -> torch.Tensor:
    weight = layer(ROWS, COLUMNS)[0]
    match kind:
        case "zero":
            return torch.zeros_like(weight)
        case "equal":
            return torch.full_like(weight, 0.25)
        case "constant rows":
            return torch.arange(1.0, ROWS + 1)[:, None].expand(ROWS, COLUMNS).clone()
        case "zero rows":
            return weight * (torch.arange(ROWS) % 2)[:, None]
        case "zero columns":
            return weight * (torch.arange(COLUMNS) % 2)
        case "tiny":
            return weight * 1e-25
        case "denormal":
            return weight * 1e-41
        case "huge":
            return weight * 1e37
    return weight * torch.logspace(-20, 8, ROWS)[:, None]


@settings
@pytest.mark.parametrize(
    "kind",
    [*EMPTY, "equal", "constant rows", "tiny", "denormal", "huge", "spread"],
)
def test_odd_weights_are_quantized_and_lose_no_more_than_all(kind: str, setting: dict) -> None:
    weight, hessian = weights(kind), layer(ROWS, COLUMNS)[1]
    stack, decoded = solved(weight, hessian, **setting)
    assert stack.relative_losses[0] <= LARGEST_LOSS[setting["method"]]
    if kind == "zero":
        assert not decoded.any()
    if kind == "zero rows" and "levels" in setting:
        assert not decoded[0].any()
    if kind == "huge":
        assert stack.relative_losses[0] < 0.5


def hessians(kind: str) -> torch.Tensor:
    hessian = layer(3, COLUMNS)[1]
    match kind:
        case "zero":
            return torch.zeros_like(hessian)
        case "one token":
            x = torch.randn(COLUMNS, 1, generator=torch.Generator().manual_seed(3))
            return 2 * x @ x.t()
        case "inputs never active":
            hessian[: COLUMNS // 2] = 0
            hessian[:, : COLUMNS // 2] = 0
        case "tiny":
            hessian *= 1e-30
        case "denormal":
            return torch.eye(COLUMNS) * 1e-42
        case "huge":
            hessian *= 1e35
        case "massive input":
            hessian[0, 0] = 1e30
        case "spread":
            size = torch.logspace(-15, 15, COLUMNS)
            hessian = hessian * size[:, None] * size
    return hessian


@settings
@pytest.mark.parametrize(
    "kind",
    ["zero", "one token", "inputs never active", *SIZES],
)
def test_odd_hessians_give_a_finite_result(kind: str, setting: dict) -> None:
    weight = layer(ROWS, COLUMNS)[0]
    stack, _ = solved(weight, hessians(kind), **setting)
    # Bounded levels cannot always make up for the errors of a singular H.
    assert stack.relative_losses[0] < (4.0 if "levels" in setting else 1 + 1e-5)


@settings
@pytest.mark.parametrize("lmbda", [1e-14, 1e-9, 1.0, 1e6, 1e30])
def test_extreme_lmbda(lmbda: float, setting: dict) -> None:
    weight, hessian = layer(ROWS, COLUMNS)
    stack, decoded = solved(weight, hessian, **{**setting, "lmbda": lmbda})
    rated = setting["method"] in ("cerwu", "cerwu-gamma0")
    assert stack.relative_losses[0] <= LARGEST_LOSS[setting["method"]]
    if rated and lmbda >= 1e6 and "levels" not in setting:
        assert not decoded.any()  # a trellis once found signs in what float32 had cancelled
    if lmbda <= 1e-9 and "levels" not in setting:
        assert stack.relative_losses[0] < 1e-6


@pytest.mark.parametrize("quantizer", ["scalar", "trellis4", "trellis8", "trellis32"])
def test_columns_far_below_their_steps_are_zero_with_the_square_completed(quantizer: str) -> None:
    weight, hessian = layer(64, 48, seed=4)
    stack, decoded = solved(weight, hessian, lmbda=1e6, quantizer=quantizer)
    assert not decoded.any()
    assert stack.relative_losses == (pytest.approx(1.0),)


def test_every_symbol_may_be_an_escape() -> None:
    weight, hessian = layer(12, 9)
    for quantizer in ("scalar", "trellis4", "trellis8", "trellis32"):
        stack, _ = solved(weight, hessian, lmbda=1e-14, quantizer=quantizer)
        matrix = stack.matrices[0]
        outside = (matrix.symbols < matrix.lowest) | (matrix.symbols >= -matrix.lowest)
        assert float(outside.float().mean()) > 0.9
        assert int(matrix.symbols.abs().max()) < 2**24


def test_no_step_is_so_fine_that_integers_leave_the_range_of_float32() -> None:
    weight, hessian = layer(40, 12)
    hessian[0, :] = hessian[:, 0] = 0
    hessian[0, 0] = 1e30  # a massive activation asks for a step of 1e-16
    stack, decoded = solved(weight, hessian, lmbda=1e-2)
    assert int(stack.matrices[0].symbols.abs().max()) < 2**24
    torch.testing.assert_close(decoded[:, 0], weight[:, 0], rtol=0, atol=1e-6 * 4)


@settings
def test_a_huge_outlier_is_kept_or_refused(setting: dict) -> None:
    weight, hessian = layer(ROWS, COLUMNS)
    weight[2, 3] = 1e30
    try:
        _, decoded = solved(weight, hessian, **setting)
    except ConfigError as error:
        assert "past 2**24" in str(error)
    else:
        assert float(decoded[2, 3]) == pytest.approx(1e30, rel=0.2)


@settings
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2)], ids=str)
def test_the_smallest_layers(shape: tuple[int, int], setting: dict) -> None:
    weight, hessian = layer(*shape)
    stack, _ = solved(weight, hessian, **{**setting, "lmbda": 1e-6})
    assert stack.relative_losses[0] < (0.5 if "levels" in setting else 1e-3)


@settings
@pytest.mark.parametrize("size", [1e-41, 1e-30, 1e-12, 1e12, 1e30], ids=str)
def test_sensitivities_of_any_size_give_a_finite_result(size: float, setting: dict) -> None:
    weight, hessian = layer(ROWS, COLUMNS)
    stack, _ = solved(weight, hessian, torch.full((ROWS,), size), **setting)
    assert stack.relative_losses[0] <= LARGEST_LOSS[setting["method"]]


@settings
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_not_finite_is_refused_and_named(bad: float, setting: dict) -> None:
    weight, hessian = layer(ROWS, COLUMNS)
    broken = weight.clone()
    broken[1, 1] = bad
    with pytest.raises(ModelError, match="weights that are NaN or infinite"):
        solved(broken, hessian, **setting)
    broken = hessian.clone()
    broken[1, 0] = broken[0, 1] = bad
    with pytest.raises(CalibrationError, match="Hessian is not finite"):
        solved(weight, broken, **setting)
    with pytest.raises(CalibrationError, match="sensitivities are not finite and positive"):
        solved(weight, hessian, torch.full((ROWS,), bad), **setting)
    with pytest.raises(CerwuError, match="positive"):
        solved(weight, hessian, torch.zeros(ROWS), **setting)


def test_losses_survive_squares_beyond_float32() -> None:
    weight, hessian = layer(6, 7)
    plain = quadratic_error(weight, hessian)
    assert torch.equal(quadratic_error(weight * 2.0**110, hessian), plain * 2.0**220)
    assert torch.equal(quadratic_error(weight * 2.0**-90, hessian), plain * 2.0**-180)
    assert torch.equal(quadratic_error(weight, hessian * 2.0**100), plain * 2.0**100)
    assert not quadratic_error(torch.zeros(6, 7), hessian).any()


def test_steps_are_normal_numbers() -> None:
    sizes = torch.tensor([1e-45, 1e-40, 1e-30, 1.0, 3.4e38, math.inf])
    values = step_values(step_codes(sizes, 16))
    assert bool(torch.isfinite(values).all()) and bool(torch.isfinite(1 / values).all())
    assert covering_code(1e-45) == covering_code(1e-40) == -126 * 256
    assert covering_code(0.0) == 0


def test_what_is_no_number_reads_nothing_out_of_range() -> None:
    x = torch.full((2, 3), math.nan)
    ones, zeros = torch.ones(3), torch.zeros(2, dtype=torch.int64)
    problem = BlockProblem(
        x=x,
        factor=torch.eye(3),
        alphabet=Alphabet(torch.ones(1, 5), -2),
        row_class=zeros,
        column_class=torch.zeros(3, dtype=torch.int64),
        lmbda=torch.ones(2),
        importance=ones,
        curvature=0 * ones,
    )
    symbols, _ = obs.quantize_block(problem, exhaustive=False)
    assert int(symbols.abs().max()) <= 2
    symbols, _ = compiled.quantize_block(problem, exhaustive=False)
    assert int(symbols.abs().max()) <= 2 or int(symbols.min()) == -(2**31)


def test_a_matrix_without_gradients_counts_like_the_mean_of_the_others() -> None:
    gradients = {
        ("a", 0): torch.tensor([1.0, 3.0]),
        ("b", 0): torch.tensor([6.0]),
        ("c", 0): torch.zeros(3),
    }
    assert Sensitivities(gradients).squared_gradient("a", 0) is gradients["a", 0]
    found = Sensitivities(gradients).squared_gradient("c", 0)
    assert found is not None and torch.equal(found, torch.full((3,), 4.0))
    assert Sensitivities(gradients).squared_gradient("d", 0) is None
