"""The search for lmbda and what full passes teach it."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cerwu_gpu.compression.estimate import Probe, estimate, first_lmbda
from cerwu_gpu.compression.target import Correction, solve
from cerwu_gpu.errors import TargetError
from tests.configs import configured


def bits(lmbda: float) -> float:
    """A rate that is flat for lmbda below 1e-8 and above 1, and falls in between."""
    place = min(max(math.log10(lmbda), -8.0), 0.0)
    return 0.5 - 1.5 * place


def loss(lmbda: float) -> float:
    return 3.0 * lmbda**0.9


@given(st.floats(-13.9, 3.9), st.floats(0.6, 12.0), st.floats(0.01, 2.0))
def test_bits_are_found_from_any_start(start: float, goal: float, step: float) -> None:
    found = solve(bits, goal, 10**start, step, falls=True)
    assert bits(found) == pytest.approx(goal, rel=5e-3)


@given(st.floats(-13.9, 3.9), st.floats(-9.0, 2.0))
def test_a_loss_is_found_from_any_start(start: float, goal: float) -> None:
    found = solve(loss, 10**goal, 10**start, falls=False)
    assert loss(found) == pytest.approx(10**goal, rel=5e-3)


@pytest.mark.parametrize("goal", [0.4, 12.6])
def test_what_no_lmbda_gives_is_an_error(goal: float) -> None:
    with pytest.raises(TargetError, match="no lmbda reaches"):
        solve(bits, goal, 1e-4, falls=True)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0])
def test_a_search_begins_near_two_bits(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = scale * torch.randn(200, 192, generator=generator)
    inputs = torch.randn(192, 600, generator=generator)
    alpha = torch.full((200,), 3.0)
    sample = Probe("w", weight, inputs @ inputs.T / 300, alpha, None, weight.numel(), 1)
    config = configured(lmbda=first_lmbda([sample]))
    assert 1.5 < estimate([sample], config).bits < 3.0


def test_a_search_through_zeros_begins_somewhere() -> None:
    sample = Probe("w", torch.zeros(2, 3), torch.eye(3), torch.ones(2), None, 6, 1)
    assert 0 < first_lmbda([sample]) < math.inf


def off_by_a_line(lmbda: float) -> float:
    return bits(lmbda) + 0.3 + 0.02 * math.log(lmbda)


def off_by_a_power(lmbda: float) -> float:
    return bits(lmbda) * 1.7 * lmbda**0.1


@pytest.mark.parametrize(
    ("truth", "relative"), [(off_by_a_line, False), (off_by_a_power, True)], ids=["sum", "factor"]
)
def test_two_passes_tell_an_offset_that_is_linear(
    truth: Callable[[float], float], relative: bool
) -> None:
    correction = Correction(relative=relative, drift=True)
    assert correction.apply(1e-4, 6.5) == 6.5
    for lmbda in (1e-3, 1e-4, 2e-4):  # the first one is forgotten
        correction.learn(lmbda, bits(lmbda), truth(lmbda))
        assert correction.apply(lmbda, bits(lmbda)) == pytest.approx(truth(lmbda))
    for lmbda in (1e-4, 1.5e-4, 3e-4):
        assert correction.apply(lmbda, bits(lmbda)) == pytest.approx(truth(lmbda))
    far = correction.apply(1.0, 0.5)
    assert far == pytest.approx(correction.apply(0.9, 0.5))  # not followed that far


def test_after_one_pass_an_offset_is_constant_or_for_drift_in_proportion() -> None:
    for drift, expected in ((False, -0.5), (True, -0.25)):
        correction = Correction(relative=False, drift=drift)
        correction.learn(1e-3, 2.5, 2.0)
        assert correction.apply(1e-3, 2.5) == pytest.approx(2.0)
        assert correction.apply(5e-4, 3.0) == pytest.approx(3.0 + expected)


def test_the_same_place_twice_counts_once() -> None:
    correction = Correction(relative=False, drift=False)
    correction.learn(1e-3, 2.0, 2.5)
    correction.learn(1e-3, 2.0, 2.25)
    assert correction.apply(1e-2, 1.0) == 1.25
