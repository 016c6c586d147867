"""Whole matrices: against straight lines, on real layers, and at the edges."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cerwu_gpu.container.matrix import encode_matrix
from cerwu_gpu.errors import FactorizationError
from cerwu_gpu.quantize import layer as quantize_layer
from cerwu_gpu.quantize.grid import step_unit
from cerwu_gpu.quantize.layer import Stack, quantize_stack, quantize_stacks, relative_loss
from cerwu_gpu.quantize.limit import limit_bits
from cerwu_gpu.quantize.objective import quadratic_error
from cerwu_gpu.quantize.refit import weights_of
from tests.configs import configured

QUANTIZERS = ["scalar", "trellis4", "trellis8", "trellis16", "trellis32"]


def layer(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights with rows and columns of unlike spread, and a correlated Hessian."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.exp(0.5 * torch.randn(rows, 1, generator=generator))
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    mixing += torch.eye(columns)
    x = mixing @ torch.randn(columns, 4 * columns, generator=generator)
    x *= torch.exp(0.5 * torch.randn(columns, 1, generator=generator))
    return weight, 2 / x.shape[1] * x @ x.t()


def straight_optq(weight: torch.Tensor, hessian: torch.Tensor, step: np.ndarray, half: int):
    """OPTQ from its description: round a column, spread its error over the columns after it."""
    w = weight.double().numpy().copy()
    h = hessian.double().numpy().copy()
    h += 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
    inverse = np.linalg.inv(h)
    q = np.zeros(w.shape, dtype=np.int64)
    for j in range(w.shape[1]):
        q[:, j] = np.clip(np.rint(w[:, j] / step), -half, half)
        error = (w[:, j] - q[:, j] * step) / inverse[j, j]
        w[:, j:] -= np.outer(error, inverse[j, j:])
        # Without input j, the inverse Hessian of the inputs that are left.
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return q


def test_lmbda_zero_is_optq():
    weight, hessian = layer(40, 33)
    config = configured(
        levels=31, lmbda=0.0, scale="per-row", block_size=8, damping=0.01, damping_by="mean"
    )
    matrix = quantize_stack([weight], hessian, config).matrices[0]
    step = 2.0 ** (matrix.row_scale.double().numpy() / 256)
    expected = torch.from_numpy(straight_optq(weight, hessian, step, 15))
    assert (matrix.symbols == expected).float().mean() > 0.995
    assert torch.equal(
        matrix.symbols,
        quantize_stack(
            [weight],
            hessian,
            dataclasses.replace(config, grid=dataclasses.replace(config.grid, method="optq")),
        )
        .matrices[0]
        .symbols,
    )


def test_round_to_nearest_ignores_the_hessian():
    weight, hessian = layer(12, 20)
    config = configured(method="rtn", levels=15, scale="per-tensor")
    matrix = quantize_stack([weight], hessian, config).matrices[0]
    step = float(2.0 ** (matrix.row_scale.double() / 256))
    assert step >= weight.abs().max() / 7
    assert torch.equal(matrix.symbols, (weight / step).round().int())


@pytest.mark.parametrize("levels", [2, 3, 16, 31])
@pytest.mark.parametrize("scale", ["per-tensor", "per-row"])
def test_levels_bound_the_alphabet_and_cover_the_largest_weight(levels, scale):
    weight, hessian = layer(9, 14, seed=levels)
    config = configured(method="rtn", levels=levels, scale=scale)
    matrix = quantize_stack([weight], hessian, config).matrices[0]
    assert matrix.size == levels
    inside = (matrix.symbols >= matrix.lowest) & (matrix.symbols < matrix.lowest + levels)
    assert bool(inside.all())
    if scale == "per-tensor":
        row, column = divmod(int(weight.abs().argmax()), 14)
        assert abs(int(matrix.symbols[row, column])) == levels // 2


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_smaller_lmbda_buys_a_smaller_loss_with_more_bits(quantizer):
    weight, hessian = layer(64, 48)
    losses, sizes = [], []
    for lmbda in (1e-1, 1e-2, 1e-3):
        config = configured(lmbda=lmbda, quantizer=quantizer)
        stack = quantize_stack([weight], hessian, config)
        losses.append(stack.relative_losses[0])
        sizes.append(len(encode_matrix(stack.matrices[0], 0.0).words))
    assert losses == sorted(losses, reverse=True)
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_reported_loss_is_that_of_the_decoded_weight(quantizer):
    weight, hessian = layer(30, 25)
    config = configured(lmbda=1e-2, quantizer=quantizer)
    stack = quantize_stack([weight], hessian, config)
    difference = (weight - stack.matrices[0].weight(torch.float32)).double()
    loss = torch.trace(difference @ hessian.double() @ difference.t())
    energy = torch.trace(weight.double() @ hessian.double() @ weight.double().t())
    assert stack.relative_losses[0] == pytest.approx(float(loss / energy), rel=1e-3)


def test_completing_the_square_pays():
    weight, hessian = layer(96, 64)
    objective = []
    for method in ("cerwu", "cerwu-gamma0"):
        config = configured(method=method, lmbda=0.1)
        stack = quantize_stack([weight], hessian, config)
        encoded = encode_matrix(stack.matrices[0], 0.0)
        error = quadratic_error(weight - stack.matrices[0].weight(torch.float32), hessian)
        objective.append(0.5 * float(error.sum()) + 0.1 * 32 * len(encoded.words))
    assert objective[0] < objective[1]


def test_outliers_are_escaped_not_clipped():
    weight, hessian = layer(600, 8)
    weight[17, 3] = 4000.0
    stack = quantize_stack([weight], hessian, configured(lmbda=0.1))
    matrix = stack.matrices[0]
    assert matrix.escapes == 1
    assert int(matrix.symbols.abs().max()) > matrix.lowest + matrix.size
    assert abs(float(matrix.weight(torch.float32)[17, 3]) - 4000) < 10


def unfitted(matrices, problem):
    """In the place of `refit`: the matrices as they are."""
    return matrices, problem.output.times_hessian(weights_of(matrices))


def test_a_stack_equals_its_matrices_in_steps_and_shares_nothing_else(monkeypatch):
    monkeypatch.setattr(quantize_layer, "refit", unfitted)  # it sees each one's errors
    first, hessian = layer(28, 16, seed=1)
    second, _ = layer(28, 16, seed=2)
    config = configured(lmbda=1e-2)
    stack = quantize_stack([first, second], hessian, config)
    alone = quantize_stack([second], hessian, config)
    assert torch.equal(stack.matrices[1].column_step, alone.matrices[0].column_step)
    assert [m.symbols.shape for m in stack.matrices] == [(28, 16), (28, 16)]
    assert stack.relative_losses[1] == pytest.approx(alone.relative_losses[0], rel=0.2)


def test_sensitive_rows_get_finer_steps_and_smaller_losses():
    weight, hessian = layer(64, 32)
    alpha = torch.ones(64)
    alpha[:8] = 100.0
    config = configured(lmbda=1e-2)
    plain = quantize_stack([weight], hessian, config).matrices[0]
    stack = quantize_stack([weight], hessian, config, [alpha])
    matrix = stack.matrices[0]
    nearest = step_unit(32) / 2
    assert int(matrix.row_scale[0]) == pytest.approx(int(matrix.row_scale[9]) - 850, abs=nearest)
    error = quadratic_error(weight - matrix.weight(torch.float32), hessian)
    before = quadratic_error(weight - plain.weight(torch.float32), hessian)
    assert float(error[:8].sum()) < 0.05 * float(before[:8].sum())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    kind=st.sampled_from(["zero weights", "zero hessian", "equal", "dead inputs", "one token"]),
    quantizer=st.sampled_from(QUANTIZERS),
)
def test_degenerate_layers_have_a_defined_outcome(rows, columns, kind, quantizer):
    weight, hessian = layer(rows, columns, seed=rows)
    if kind == "zero weights":
        weight = torch.zeros_like(weight)
    elif kind == "zero hessian":
        hessian = torch.zeros_like(hessian)
    elif kind == "equal":
        weight = torch.full_like(weight, 0.25)
    elif kind == "dead inputs":
        hessian[: columns // 2] = 0
        hessian[:, : columns // 2] = 0
    else:
        x = torch.randn(columns, 1)
        hessian = 2 * x @ x.t()
    config = configured(lmbda=1e-2, quantizer=quantizer)
    stack = quantize_stack([weight], hessian, config)
    decoded = stack.matrices[0].weight(torch.float32)
    assert bool(torch.isfinite(decoded).all())
    assert stack.relative_losses[0] <= 1.5
    encode_matrix(stack.matrices[0], stack.relative_losses[0])


def test_a_hessian_without_a_factor_is_refused():
    weight, hessian = layer(4, 6)
    with pytest.raises(FactorizationError, match="not positive definite"):
        quantize_stack([weight], -hessian, configured(lmbda=1e-2))


def test_the_same_input_gives_the_same_symbols_on_one_and_two_threads():
    weight, hessian = layer(200, 150)
    config = configured(lmbda=1e-2, quantizer="trellis4")
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 2):
            torch.set_num_threads(number)
            found.append(quantize_stack([weight], hessian, config).matrices[0].symbols)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_relative_loss_of_a_matrix_without_effect():
    weight, hessian = torch.ones(2, 3), torch.zeros(3, 3)
    assert relative_loss(weight, weight, hessian) == 0.0


def test_the_limit_is_that_of_the_weighted_loss_and_only_up_to_the_width_that_was_asked_for():
    weight, hessian = layer(40, 24)
    alpha = torch.rand(40, generator=torch.Generator().manual_seed(1)) + 0.1
    stack = quantize_stack(
        [weight[:16], weight[16:]], hessian, configured(lmbda=1e-3), [alpha[:16], alpha[16:]]
    )
    first = 0
    for matrix, limit in zip(stack.matrices, stack.limits, strict=True):
        rows = slice(first, first + len(matrix.symbols))
        first = rows.stop
        error = weight[rows] - matrix.weight(torch.float32)
        loss = float((alpha[rows] * quadratic_error(error, hessian)).sum())
        scaled = alpha[rows].sqrt()[:, None] * weight[rows]
        assert limit == pytest.approx(limit_bits(scaled, hessian, loss))
        assert limit > 1
        assert limit != pytest.approx(limit_bits(weight[rows], hessian, loss), rel=1e-3)
    narrow = configured(lmbda=1e-3, limit_columns=23)
    assert quantize_stack([weight], hessian, narrow).limits == (None,)
    assert quantize_stack([0 * weight], hessian, configured(lmbda=1e-3)).limits == (0.0,)


@pytest.mark.parametrize(
    ("quantizer", "gap"), [("scalar", 0.32), ("trellis8", 0.20), ("trellis32", 0.17)]
)
def test_a_real_layer_comes_close_to_the_limit(data: Path, quantizer: str, gap: float):
    arrays = np.load(data / "layers" / "model.layers.14.self_attn.q_proj.npz")
    weight, hessian = torch.from_numpy(arrays["W"]), torch.from_numpy(arrays["H"])
    config = configured(lmbda=1.8e-5, quantizer=quantizer)
    stack = quantize_stack([weight], hessian, config)
    encoded = encode_matrix(stack.matrices[0], 0.0)
    bits = 8 * (4 * len(encoded.words) + len(encoded.side)) / weight.numel()
    loss = stack.relative_losses[0] * float(quadratic_error(weight, hessian).sum())
    assert 2.0 < bits < 3.5
    assert 0 < bits - limit_bits(weight, hessian, loss) < gap


def random_stack(heights: tuple[int, ...], columns: int, seed: int) -> Stack:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * columns, columns, generator=generator)
    x *= torch.rand(columns, generator=generator).exp()
    weights = []
    for rows in heights:
        spread = torch.randn(rows, 1, generator=generator).exp()
        weights.append(spread * torch.randn(rows, columns, generator=generator))
    alphas = [0.1 + torch.rand(rows, generator=generator) for rows in heights]
    return Stack(weights, x.t() @ x / columns, alphas)


@settings(max_examples=15, deadline=None)
@given(
    # More than a block of columns, of odd alignment, more rows than passes before the last see.
    shape=st.sampled_from(
        [
            ((24,), 32),
            ((7, 11), 48),
            ((5,), 208),
            ((6,), 136),
            ((3,), 21),
            ((32,), 24),
            ((1100, 9), 16),
        ]
    ),
    quantizer=st.sampled_from(["scalar", "trellis4", "trellis8"]),
    lmbda=st.sampled_from([1e-4, 1e-2, 1.0]),
    seed=st.integers(0, 99),
)
def test_stacks_that_are_quantized_together_become_what_each_would_alone(
    shape, quantizer, lmbda, seed
):
    config = configured(lmbda=lmbda, quantizer=quantizer)
    posed = [random_stack(*shape, 3 * seed + number) for number in range(3)]
    zeros = [0 * weight for weight in posed[1].weights]
    posed[1] = dataclasses.replace(posed[1], weights=zeros)
    # A Hessian that no damping but a large one makes definite.
    less = posed[2].hessian - 0.5
    posed[2] = dataclasses.replace(posed[2], hessian=less)
    try:
        together = quantize_stacks(posed, config)
    except FactorizationError:
        posed[2] = random_stack(*shape, seed)
        together = quantize_stacks(posed, config)
    for stack, quantized in zip(posed, together, strict=True):
        alone = quantize_stack(stack.weights, stack.hessian, config, stack.sensitivities)
        assert quantized.more_damping == alone.more_damping
        assert quantized.relative_losses == alone.relative_losses
        assert quantized.limits == alone.limits
        for matrix, other in zip(quantized.matrices, alone.matrices, strict=True):
            loss = quantized.relative_losses[0]
            coded, wanted = encode_matrix(matrix, loss), encode_matrix(other, loss)
            assert coded.part == wanted.part
            assert coded.side == wanted.side
            assert np.array_equal(coded.words, wanted.words)


def test_stacks_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        quantize_stacks(
            [random_stack((4,), 8, 0), random_stack((5,), 8, 0)], configured(lmbda=1e-2)
        )
