"""The drawings: stacked bars, and one mark for each block."""

import math
from collections.abc import Callable, Sequence

from cerwu_gpu.report_page.markup import Markup, join, tag

WIDTH, HEIGHT = 320.0, 40.0
"""Of a chart in its own units; the page stretches it."""
DECADES_LEAST = 1e-9
"""Relative losses below it are drawn there."""


def stacked_bar(parts: Sequence[tuple[str, float, str]], total: float, label: str) -> Markup:
    """Parts (class of their colour, amount, words) side by side; `total` is the full width."""
    pieces, x = [], 0.0
    for colour, amount, words in parts:
        width = 100 * amount / total if total else 0.0
        title = tag("title", words)
        pieces.append(tag("rect", title, class_=colour, x=x, y=0, width=width, height=10))
        x += width
    return tag(
        "svg",
        tag("title", label),
        tag("rect", class_="rest", x=0, y=0, width=100, height=10),
        *pieces,
        class_="stack",
        viewBox="0 0 100 10",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )


Point = tuple[int | None, float | None, str]
"""Number of the block (None: outside the blocks), value, words."""


def columns(points: Sequence[Point], blocks: int, low: float, high: float, label: str) -> Markup:
    """A column for each block, from 0 to its value; the axis goes from `low` to `high`."""

    def height(value: float) -> float:
        return HEIGHT * (high - value) / ((high - low) or 1.0)

    def mark(value: float) -> tuple[float, float]:
        top, bottom = sorted((height(value), height(0.0)))
        return top, max(bottom - top, 0.6)

    zero = tag("line", class_="axis", x1=0, x2=WIDTH, y1=height(0.0), y2=height(0.0))
    return _chart(points, blocks, mark, "column", [zero], label)


def levels(points: Sequence[Point], blocks: int, low: int, high: int, label: str) -> Markup:
    """A stroke for each block at its value on a logarithmic axis from 10^low to 10^high."""

    def height(exponent: float) -> float:
        return HEIGHT * (high - exponent) / ((high - low) or 1)

    def mark(value: float) -> tuple[float, float]:
        middle = height(math.log10(max(value, DECADES_LEAST)))
        return min(max(middle - 1.5, 0.0), HEIGHT - 3), 3.0

    lines = [
        tag("line", class_="axis", x1=0, x2=WIDTH, y1=height(e), y2=height(e))
        for e in range(low, high + 1)
    ]
    return _chart(points, blocks, mark, "level", lines, label)


def decades(values: Sequence[float]) -> tuple[int, int]:
    """The whole powers of ten around these values."""
    known = [max(value, DECADES_LEAST) for value in values] or [0.1]
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    return low, max(high, low + 1)


def _chart(
    points: Sequence[Point],
    blocks: int,
    mark: Callable[[float], tuple[float, float]],
    kind: str,
    lines: Sequence[Markup],
    label: str,
) -> Markup:
    pitch = WIDTH / max(blocks, 1)
    marks = []
    for block, value, words in points:
        if value is None:
            continue
        top, height = mark(value)
        x, width = (0.0, WIDTH) if block is None else (block * pitch + 0.1 * pitch, 0.8 * pitch)
        title = tag("title", words)
        marks.append(tag("rect", title, class_=kind, x=x, y=top, width=width, height=float(height)))
    return tag(
        "svg",
        tag("title", label),
        join(*lines),
        join(*marks),
        class_="chart",
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )
