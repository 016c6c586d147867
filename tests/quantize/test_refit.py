"""Steps and scales fitted after the rounding: never worse, and right where the answer is known."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.container.matrix import encode_matrix
from cerwu_gpu.quantize import layer
from cerwu_gpu.quantize.objective import OutputLoss, damp, quadratic_error, usual_damping
from cerwu_gpu.quantize.refit import Quadratic, refit
from cerwu_gpu.quantize.symbols import QuantizedMatrix
from cerwu_gpu.steps import step_values
from tests.configs import configured
from tests.quantize.test_layer import unfitted


def correlated(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(columns, 4 * columns, generator=generator)
    x[1:] += x[:-1].clone()
    return weight, x @ x.t() / columns


def rounded(
    weight: torch.Tensor, hessian: torch.Tensor, config: CompressionConfig
) -> QuantizedMatrix:
    """The matrix as it is before the fit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "refit", unfitted)
        return layer.quantize_stack([weight], hessian, config).matrices[0]


def objective(matrix: QuantizedMatrix, problem: Quadratic) -> float:
    """J with the bits of the whole file."""
    difference = problem.weight[0] - matrix.weight(torch.float32)
    error = quadratic_error(difference, problem.hessian[0])
    encoded = encode_matrix(matrix, 0.0)
    stored = 32 * len(encoded.words) + 8 * len(encoded.side)
    loss = 0.5 * float((error * problem.sensitivity[0].to(torch.float64)).sum())
    return loss + problem.lmbda * stored


def posed(
    weight: torch.Tensor, hessian: torch.Tensor, config: CompressionConfig, lmbda: float
) -> Quadratic:
    damping = usual_damping(None, len(hessian))
    damped = damp(hessian, damping, config.objective.damping_by)
    raised = (damped - hessian).diagonal().to(torch.float32)
    output = OutputLoss.of(weight[None], hessian[None])
    return Quadratic(output, raised[None], torch.ones(1, len(weight)), lmbda)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 24),
    seed=st.integers(0, 99),
    quantizer=st.sampled_from(["scalar", "trellis4", "trellis8", "trellis16", "trellis32"]),
    price=st.sampled_from([0.0, 1e-4, 1e-2]),
)
def test_it_never_raises_the_objective(rows, columns, seed, quantizer, price):
    weight, hessian = correlated(rows, columns, seed)
    config = configured(lmbda=0.02, quantizer=quantizer)
    before = rounded(weight, hessian, config)
    problem = posed(weight, hessian, config, price)
    (after,), _ = refit([before], problem)
    assert objective(after, problem) <= objective(before, problem) * (1 + 1e-5) + 1e-6
    assert torch.equal(after.symbols, before.symbols)


def test_free_codes_give_the_least_squares_steps():
    weight, hessian = correlated(200, 12, 5)
    config = configured(lmbda=0.3)
    before = rounded(weight, hessian, config)
    problem = replace(posed(weight, hessian, config, 0.0), sensitivity=1 + torch.rand(1, 200))
    (fitted,), product = refit([before], problem)
    # Straight from the definition: minimise over the steps, all rows stacked, in float64.
    level = before.symbols.double() * step_values(before.row_scale).double()[:, None]
    root = torch.linalg.cholesky(problem.hessian[0].double()).t()
    weigh = problem.sensitivity[0].double().sqrt()[:, None, None]
    system = (weigh * root[None] * level[:, None, :]).flatten(0, 1)
    wanted = (weigh[:, :, 0] * (weight.double() @ root.t())).flatten()
    steps = torch.linalg.lstsq(system, wanted[:, None]).solution[:, 0]
    octaves = step_values(fitted.column_step).double().log2() - steps.log2()
    assert float(octaves.abs().max()) <= 0.5 / 256 + 1e-4
    assert not torch.equal(fitted.column_step, before.column_step)
    torch.testing.assert_close(product[0], fitted.weight(torch.float32) @ hessian)


def test_scales_that_are_off_are_found_when_bits_are_cheap():
    weight, hessian = correlated(30, 64, 1)
    config = configured(lmbda=0.02)
    before = rounded(weight, hessian, config)
    spoiled = replace(before, row_scale=before.row_scale + 64)
    problem = posed(weight, hessian, config, 0.0)
    (repaired,), _ = refit([spoiled], problem)
    assert objective(repaired, problem) < 1.02 * objective(before, problem)
    assert objective(spoiled, problem) > 1.5 * objective(before, problem)


def test_dear_bits_leave_the_codes_alone():
    weight, hessian = correlated(30, 64, 2)
    before = rounded(weight, hessian, configured(lmbda=0.02))
    (after,), _ = refit([before], posed(weight, hessian, configured(lmbda=0.02), 1e3))
    assert torch.equal(after.column_step, before.column_step)
    assert torch.equal(after.row_scale, before.row_scale)


def test_a_matrix_of_zeros_keeps_its_steps():
    weight, hessian = torch.zeros(5, 7), torch.eye(7)
    before = rounded(weight, hessian, configured(lmbda=0.02))
    (after,), _ = refit([before], posed(weight, hessian, configured(lmbda=0.02), 0.0))
    assert torch.equal(after.weight(torch.float32), weight)
