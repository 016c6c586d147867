"""Coordinates of the drawings: stacked bars, and for each kind of matrix one mark per block."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from cerwu_gpu.quantities import decimals, share
from cerwu_gpu.report_page.layers import Kind, Place

WIDTH, HEIGHT = 320.0, 40.0
"""Size of a chart in its own units; the page stretches it."""
LOSS_LEAST = 1e-9
"""Least relative loss that is drawn; lower ones are drawn there."""


@dataclass(frozen=True)
class Mark:
    """A rectangle with its words; `style` is its CSS class."""

    style: str
    x: float
    y: float
    width: float
    height: float
    words: str


@dataclass(frozen=True)
class Chart:
    """The marks of one kind of matrix, and the heights of the lines behind them."""

    label: str
    lines: tuple[float, ...]
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Axes:
    """Ranges of the axes of all charts.

    Attributes:
        blocks: number of blocks, side by side.
        bits: largest number of bits; that axis begins at 0.
        powers: whole powers of ten around all losses.
        gaps: least and largest gap, 0 included.
    """

    blocks: int
    bits: float
    powers: tuple[int, int]
    gaps: tuple[float, float]

    @classmethod
    def around(cls, kinds: Iterable[Kind]) -> "Axes":
        """Return the axes that have room for these kinds."""
        places = list(chain.from_iterable(kind.places for kind in kinds))
        gaps = [place.gap for place in places if place.gap is not None]
        losses = [max(place.loss, LOSS_LEAST) for place in places if place.loss is not None]
        low = math.floor(math.log10(min(losses, default=0.1)))
        high = math.ceil(math.log10(max(losses, default=0.1)))
        return cls(
            blocks=1 + max((place.block for place in places if place.block is not None), default=0),
            bits=max((place.bits for place in places), default=1.0),
            powers=(low, max(high, low + 1)),
            gaps=(min(0.0, *gaps, 0.0), max(0.01, *gaps, 0.01)),
        )

    def bits_chart(self, kind: Kind) -> Chart:
        """Return columns of the bits per weight."""
        return self._columns(kind, "bits", [place.bits for place in kind.places], 0.0, self.bits)

    def gap_chart(self, kind: Kind) -> Chart:
        """Return columns of the bits above the limit."""
        return self._columns(kind, "gap", [place.gap for place in kind.places], *self.gaps)

    def loss_chart(self, kind: Kind) -> Chart:
        """Return strokes at the losses, on a logarithmic axis with a line at each power of ten."""
        low, high = self.powers

        def height(exponent: float) -> float:
            return HEIGHT * (high - exponent) / (high - low)

        def span(loss: float) -> tuple[float, float]:
            middle = height(math.log10(max(loss, LOSS_LEAST)))
            return min(max(middle - 1.5, 0.0), HEIGHT - 3), 3.0

        losses = [place.loss for place in kind.places]
        lines = tuple(height(exponent) for exponent in range(low, high + 1))
        return Chart(f"{kind.name}: loss", lines, tuple(self._marks(kind, "level", losses, span)))

    def _columns(
        self, kind: Kind, what: str, values: Sequence[float | None], low: float, high: float
    ) -> Chart:
        """Return columns from 0 to the values, on an axis from `low` to `high`."""

        def height(value: float) -> float:
            return HEIGHT * (high - value) / ((high - low) or 1.0)

        def span(value: float) -> tuple[float, float]:
            top, bottom = sorted((height(value), height(0.0)))
            return top, max(bottom - top, 0.6)

        marks = tuple(self._marks(kind, "column", values, span))
        return Chart(f"{kind.name}: {what}", (height(0.0),), marks)

    def _marks(
        self,
        kind: Kind,
        style: str,
        values: Sequence[float | None],
        span: Callable[[float], tuple[float, float]],
    ) -> Iterator[Mark]:
        """Yield a mark for each known value; `span` returns its top and height."""
        pitch = WIDTH / self.blocks
        for place, value in zip(kind.places, values, strict=True):
            if value is None:
                continue
            top, height = span(value)
            x, width = 0.0, WIDTH  # outside the blocks: all of the chart
            if place.block is not None:
                x, width = (place.block + 0.1) * pitch, 0.8 * pitch
            yield Mark(style, x, top, width, height, _words(place))


def stacked(parts: Iterable[tuple[str, float, str]], total: float) -> list[Mark]:
    """Return parts (CSS class, amount, words) side by side; `total` is 100 units wide."""
    marks: list[Mark] = []
    x = 0.0
    for style, amount, words in parts:
        width = 100 * amount / total if total else 0.0
        marks.append(Mark(style, x, 0.0, width, 10.0, words))
        x += width
    return marks


def _words(place: Place) -> str:
    where = place.name if place.block is None else f"block {place.block}"
    bits, limit = decimals(place.bits, 3), decimals(place.limit, 2)
    return f"{where}: {bits} bits, limit {limit}, loss {share(place.loss)}"
