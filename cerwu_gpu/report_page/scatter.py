"""Coordinates of a scatter plot: a quality over sizes, one point for each directory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cerwu_gpu import quantities

WIDTH, HEIGHT = 560.0, 300.0
"""Size of a plot in its own units."""
LEFT, RIGHT, TOP, BOTTOM = 62.0, 34.0, 24.0, 34.0
"""Margins around the area of the points."""
TICKS = 5
"""Approximate number of ticks on an axis."""


@dataclass(frozen=True)
class Tick:
    """A place on an axis, with its words."""

    at: float
    words: str


@dataclass(frozen=True)
class Point:
    """One directory: the number of its colour, its place, and its words."""

    colour: int
    x: float
    y: float
    words: str
    label: str


@dataclass(frozen=True)
class Scatter:
    """A plot; its vertical axis has a name, its horizontal one is the size."""

    title: str
    columns: tuple[Tick, ...]
    rows: tuple[Tick, ...]
    points: tuple[Point, ...]


def scatter(
    title: str, names: Sequence[str], sizes: Sequence[int], values: Sequence[float | None]
) -> Scatter | None:
    """Return the plot of the values that are known and finite; None where there are none.

    Args:
        title: name of the vertical axis.
        names: of the directories, in the order of their colours.
        sizes: bytes of the directories.
        values: measured qualities; None where one was not measured.
    """
    known = [
        (index, name, size, value)
        for index, (name, size, value) in enumerate(zip(names, sizes, values, strict=True))
        if value is not None and math.isfinite(value)
    ]
    if not known:
        return None
    across = _axis([float(size) for _, _, size, _ in known])
    up = _axis([value for _, _, _, value in known])

    def x(size: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * _share(size, across)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * _share(value, up)

    points = tuple(
        Point(index, x(size), y(value), f"{name}: {quantities.size(size)}, {value:.4g}", name)
        for index, name, size, value in known
    )
    return Scatter(
        title,
        tuple(Tick(x(at), quantities.size(at)) for at in across),
        tuple(Tick(y(at), f"{at:.4g}") for at in up),
        points,
    )


def _axis(values: Sequence[float]) -> list[float]:
    """Return round numbers at equal distances that enclose the values."""
    low, high = min(values), max(values)
    spread = high - low or abs(high) or 1.0
    power: float = 10.0 ** math.floor(math.log10(spread / TICKS))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * TICKS >= spread)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return [step * number for number in range(first, last + 1)]


def _share(value: float, axis: Sequence[float]) -> float:
    return (value - axis[0]) / (axis[-1] - axis[0])
