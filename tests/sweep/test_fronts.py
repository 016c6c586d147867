"""Pareto fronts and minimum bits, against brute force."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cerwu_gpu.sweep.fronts import badness, minimum_cost, pareto_front
from cerwu_gpu.sweep.subject import Quality

SPOTS = st.lists(
    st.tuples(
        st.sampled_from([1.0, 1.5, 2.0, 2.5, 3.0, 4.0]) | st.floats(0.5, 8.0),
        st.sampled_from([0.0, 0.5, 0.8, 1.0, math.inf, math.nan]) | st.floats(0.01, 1.0),
    ),
    max_size=12,
)
MEASURES = st.sampled_from(["perplexity", "accuracy"])


def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Costs and badness: a is nowhere worse than b and somewhere better."""
    return a[0] <= b[0] and a[1] <= b[1] and a != b


def split(
    spots: list[tuple[float, float]], measure: Quality
) -> tuple[list[float], list[float], list[tuple[float, float]]]:
    costs, qualities = [cost for cost, _ in spots], [quality for _, quality in spots]
    return costs, qualities, [(cost, badness(quality, measure)) for cost, quality in spots]


@given(spots=SPOTS, measure=MEASURES)
@settings(max_examples=300, deadline=None)
def test_the_front_is_what_nothing_beats(
    spots: list[tuple[float, float]], measure: Quality
) -> None:
    costs, qualities, places = split(spots, measure)
    front = pareto_front(costs, qualities, measure)
    finite = [place for place in places if place[1] < math.inf]
    expected = {place for place in finite if not any(beats(other, place) for other in finite)}
    assert {places[index] for index in front} == expected
    assert len(front) == len(expected)  # of equal points one
    assert [costs[index] for index in front] == sorted(costs[index] for index in front)


@given(spots=SPOTS, measure=MEASURES, wanted=st.floats(0.05, 1.0))
@settings(max_examples=300, deadline=None)
def test_the_minimum_is_the_cheapest_point_or_between_it_and_the_one_before(
    spots: list[tuple[float, float]], measure: Quality, wanted: float
) -> None:
    costs, qualities, places = split(spots, measure)
    goal = badness(wanted, measure)
    reaching = [place for place in places if place[1] <= goal]
    least = minimum_cost(costs, qualities, measure, wanted)
    if not reaching:
        assert least is None
        return
    assert least is not None
    assert places[least.index] == min(reaching)
    missing = [place for place in places if goal < place[1] < math.inf and place < min(reaching)]
    assert least.open == (not missing)
    if least.open:
        assert least.interpolated == costs[least.index]
    else:
        before = min(missing, key=lambda place: (place[1], place[0]))
        assert before[0] <= least.interpolated <= costs[least.index]


def test_interpolation_is_linear_in_the_logarithm_of_the_quality() -> None:
    least = minimum_cost([2.0, 4.0], [40.0, 10.0], "perplexity", 20.0)
    assert least is not None
    assert least.interpolated == pytest.approx(3.0)
    assert least.index == 1
    least = minimum_cost([2.0, 4.0], [0.2, 0.8], "accuracy", 0.4)
    assert least is not None
    assert least.interpolated == pytest.approx(3.0)


def test_a_quality_that_no_point_has_is_not_reached() -> None:
    assert minimum_cost([2.0, 4.0], [40.0, 10.0], "perplexity", 9.9) is None
    assert minimum_cost([2.0], [math.nan], "accuracy", 0.1) is None
    assert minimum_cost([], [], "accuracy", 0.1) is None
