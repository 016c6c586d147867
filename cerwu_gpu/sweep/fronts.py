"""Pareto fronts of a sweep, and the minimum bits at a given share of the original quality."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from cerwu_gpu.sweep.subject import Quality
from cerwu_gpu.sweep.table import Row

TARGETS: dict[Quality, tuple[float, ...]] = {
    "accuracy": (0.99, 0.95),
    "perplexity": (1.01, 1.05, 2.0),
}
"""Multiples of the original quality at which minimum bits are reported."""


def badness(quality: float, measure: Quality) -> float:
    """Return the quality's logarithm, signed so that less is better; infinite if not finite."""
    if not (math.isfinite(quality) and quality > 0):
        return math.inf
    return math.log(quality) if measure == "perplexity" else -math.log(quality)


def pareto_front(costs: Sequence[float], qualities: Sequence[float], measure: Quality) -> list[int]:
    """Return the indices of the points that no other one beats, by rising cost.

    A point is beaten by one that costs no more and is no worse, and better in one of the two; of
    equal points the first one stays. Points without a finite quality are never on the front.
    """
    worth = [badness(quality, measure) for quality in qualities]
    front: list[int] = []
    best = math.inf
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], worth[i], i)):
        if worth[index] < best:
            front.append(index)
            best = worth[index]
    return front


@dataclass(frozen=True, kw_only=True)
class Minimum:
    """Minimum cost at which a quality is reached.

    Attributes:
        interpolated: linear in the logarithm of the quality between the two neighbouring points
            of the front; where the cheapest point reaches it, that point's cost.
        index: of the cheapest point that reaches it.
        open: whether even the cheapest point reaches it, so that less might do.
    """

    interpolated: float
    index: int
    open: bool


def minimum_cost(
    costs: Sequence[float], qualities: Sequence[float], measure: Quality, quality: float
) -> Minimum | None:
    """Return the minimum cost at a quality along the front; None: not reached."""
    front = pareto_front(costs, qualities, measure)
    goal = badness(quality, measure)
    worth = [badness(qualities[index], measure) for index in front]  # strictly falling
    first = bisect_left(worth, -goal, key=lambda value: -value)
    if first == len(front):
        return None
    cost = costs[front[first]]
    if first > 0:
        share = (worth[first - 1] - goal) / (worth[first - 1] - worth[first])
        before = costs[front[first - 1]]
        cost = before + share * (cost - before)
    return Minimum(interpolated=cost, index=front[first], open=first == 0)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Minimum bits of one kind of method at one share of the original quality.

    Attributes:
        target: multiple of the original quality (TARGETS).
        bits: interpolated along the front; None: not reached.
        row: the cheapest point that reaches it.
        open: whether that is the cheapest point of all, so that fewer bits might do.
    """

    label: str
    target: float
    bits: float | None
    row: Row | None
    open: bool

    @property
    def words(self) -> str:
        """Text such as "2.1250", "<= 2.1250" or "not reached"."""
        if self.bits is None:
            return "not reached"
        return f"{'<= ' * self.open}{self.bits:.4f}"


def by_label(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each kind of method."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.label, []).append(row)
    return groups


def front_rows(rows: Sequence[Row], cost: str = "bits_per_weight") -> list[Row]:
    """Return the Pareto front of one subject; `cost` is bits_per_weight or directory_bytes."""
    if not rows:
        return []
    costs, qualities = [getattr(row, cost) for row in rows], [row.quality for row in rows]
    return [rows[index] for index in pareto_front(costs, qualities, rows[0].measure)]


def standings(rows: Sequence[Row]) -> list[Standing]:
    """Return the minimum bits of every kind of method at every target, for rows of one subject."""
    result = []
    for label, group in by_label(rows).items():
        costs, qualities = [row.bits_per_weight for row in group], [row.quality for row in group]
        for target in TARGETS[group[0].measure]:
            quality = target * group[0].original_quality
            least = minimum_cost(costs, qualities, group[0].measure, quality)
            result.append(
                Standing(
                    label=label,
                    target=target,
                    bits=None if least is None else least.interpolated,
                    row=None if least is None else group[least.index],
                    open=least is not None and least.open,
                )
            )
    return result


def target_words(target: float, measure: Quality) -> str:
    """Return a target in words: "99 % of the accuracy", "1.05x the perplexity"."""
    if measure == "accuracy":
        return f"{100 * target:g} % of the accuracy"
    return f"{target:g}x the perplexity"
