"""Fewer tokens than columns: the Hessian is taken toward its mean by the number of tokens."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cerwu_gpu.quantize.layer import quantize_stack
from cerwu_gpu.quantize.objective import SHRINKAGE_LIMIT, quadratic_error, shrinkage, shrunk
from tests.configs import configured


def sample(tokens: int, columns: int, scales: torch.Tensor | None = None) -> torch.Tensor:
    """H of random inputs."""
    x = torch.randn(columns, tokens, generator=torch.Generator().manual_seed(tokens))
    x = x if scales is None else x * scales[:, None]
    return 2 / tokens * x @ x.T


@given(st.integers(2, 40), st.integers(1, 80))
def test_only_too_few_tokens_shrink(columns: int, tokens: int) -> None:
    delta = shrinkage(sample(tokens, columns), tokens)
    assert (delta > 0) == (tokens < columns)
    assert delta <= SHRINKAGE_LIMIT


def test_unknown_numbers_and_zeros_are_taken() -> None:
    assert shrinkage(sample(3, 9), None) == 0
    assert shrinkage(torch.zeros(4, 4), 2) == SHRINKAGE_LIMIT
    hessian = sample(3, 9)
    assert shrunk(hessian, 0) is hessian


def test_structure_that_few_tokens_show_counts() -> None:
    """Two strong directions are seen by 20 tokens, 40 equal ones are not."""
    strong = torch.tensor([10.0, 10.0] + [0.1] * 38)
    assert shrinkage(sample(20, 40, strong), 20) < 0.3
    assert shrinkage(sample(20, 40), 20) > 3


def test_the_scale_of_the_inputs_does_not_matter() -> None:
    hessian = sample(5, 12)
    assert shrinkage(1e18 * hessian, 5) == pytest.approx(shrinkage(hessian, 5), rel=1e-4)


def test_it_is_better_on_other_tokens_at_equal_bytes() -> None:
    """Without it, plain rounding wins: errors go where no calibration token looked."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(64, 200, generator=generator)
    hessian, other = sample(40, 200), sample(4001, 200)

    def result(tokens: int | None, lmbda: float) -> tuple[float, float]:
        config: Any = configured(lmbda=lmbda, sensitivity="none", limit_columns=0)
        matrix = quantize_stack([weight], hessian, config, None, tokens).matrices[0]
        quantized = matrix.weight(torch.float32)
        _, counts = torch.unique(matrix.symbols, return_counts=True)
        share = counts / counts.sum()
        return float(-(share * share.log2()).sum()), float(
            quadratic_error(weight - quantized, other).sum()
        )

    bits, error = result(40, 0.3)
    more_bits, more_error = result(None, 0.03)
    assert bits <= more_bits, "it is not worse by a lack of bits"
    assert error < 0.1 * more_error
