"""Points of rate and loss: quantized layers, the search for asked bits, hulls to compare with."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor
from tqdm import tqdm

from cerwu_gpu.coding import side
from cerwu_gpu.config import CompressionConfig, Quantizer, from_settings
from cerwu_gpu.container.matrix import encode_matrix
from cerwu_gpu.quantize.layer import quantize_stack
from cerwu_gpu.quantize.limit import Limit

TOLERANCE = 0.01
"""Maximum difference of requested and stored bits."""
EVALUATIONS = 8
"""Maximum quantizations per layer, quantizer and rate."""
FIRST_GAP = 0.25
"""Bits above the limit at the start of the search for lmbda."""
LEVELS = (16, 32, 64, 128, 256, 512, 1024)
"""Numbers of levels |G| of the paper's method."""
AROUND = 1.0
"""Range in bits, below and above the requested ones, of the limit's slopes for which the paper's
method is run, lmbda doubling."""
SAMPLES = 8
"""Number of points drawn along an edge of a hull."""


@dataclass(frozen=True)
class Layer:
    """Matrices W [m, n] and H [n, n] float32, their limit, and tr(W H W^T)."""

    name: str
    weight: Tensor
    hessian: Tensor
    limit: Limit
    energy: float

    def limit_bits(self, relative_loss: float) -> float:
        return self.limit.bits(relative_loss * self.energy)

    def lmbda(self, limit_bits: float) -> float:
        """Return an ideal quantizer's lmbda: the slope of the limit."""
        return math.log(2) * self.limit.level(limit_bits)


@dataclass(frozen=True)
class Point:
    """One quantization: its trade-off, its stored bits per weight and its loss."""

    lmbda: float
    bits: float
    relative_loss: float
    words_bytes: int
    side_bytes: dict[str, int]
    levels: int | None = None


@dataclass(frozen=True)
class Result:
    """A point at the requested bits, the limit and the other methods' bits at equal loss."""

    layer: str
    quantizer: Quantizer
    asked: float
    evaluations: int
    point: Point
    limit: float
    others: dict[str, float | None]
    """Bits of each other method at this loss; None outside its measured range."""

    @property
    def gap(self) -> float:
        return self.point.bits - self.limit

    def ratio(self, other: str) -> float | None:
        bits = self.others.get(other)
        return None if bits is None else self.point.bits / bits


@dataclass(frozen=True)
class Hull:
    """Lower convex hull of points (bits, log loss), from the fewest bits to the least loss."""

    points: tuple[tuple[float, float], ...]

    @staticmethod
    def of(pairs: Iterable[tuple[float, float]]) -> "Hull":
        """Return the hull of pairs (bits, relative loss > 0)."""
        hull: list[tuple[float, float]] = []
        for point in sorted((bits, math.log(loss)) for bits, loss in pairs):
            if hull and point[1] >= hull[-1][1]:
                continue
            while len(hull) > 1 and _turns_right(hull[-2], hull[-1], point):
                hull.pop()
            hull.append(point)
        return Hull(tuple(hull))

    def bits(self, loss: float) -> float | None:
        """Return the bits at a relative loss, linear in log loss; None beyond the hull's ends."""
        height = math.log(loss)
        for (bits, upper), (more, lower) in pairwise(self.points):
            if lower <= height <= upper:
                return bits + (more - bits) * (upper - height) / (upper - lower)
        return None


def gaps(hull: Hull, layer: Layer) -> list[tuple[float, float]]:
    """Return points (bits, bits above the limit) along a hull."""
    line = []
    for (bits, upper), (more, lower) in pairwise(hull.points):
        for share in (k / SAMPLES for k in range(SAMPLES + 1)):
            at = bits + (more - bits) * share
            line.append((at, at - layer.limit_bits(math.exp(upper + (lower - upper) * share))))
    return line


def _turns_right(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[0] - a[0]) * (c[1] - a[1]) <= (b[1] - a[1]) * (c[0] - a[0])


def measure(layer: Layer, config: CompressionConfig) -> Point:
    """Quantize and code a layer."""
    stack = quantize_stack([layer.weight], layer.hessian, config)
    loss = stack.relative_losses[0]
    coded = encode_matrix(stack.matrices[0], loss)
    words = 4 * len(coded.words)
    bits = 8 * (words + len(coded.side)) / layer.weight.numel()
    arrays = side.sizes(coded.side, coded.part.rows, coded.part.columns)
    return Point(config.lmbda, bits, loss, words, arrays, getattr(config.grid, "levels", None))


def approach(
    evaluate: Callable[[float], Point],
    asked: float,
    known: list[Point],
    first: float,
    slope: Callable[[float], float],
) -> Point:
    """Return the point nearest to `asked` bits, by secants in log lmbda, within TOLERANCE if
    possible.

    Args:
        evaluate: returns the point at lmbda; its bits fall with lmbda.
        known: points evaluated so far, to which new ones are added.
        first: initial lmbda without known points.
        slope: approximate d(bits) / d(log2 lmbda) at lmbda, for steps from a single point.
    """
    for _ in range(EVALUATIONS):
        if any(abs(point.bits - asked) <= TOLERANCE for point in known):
            break
        known.append(evaluate(next_lmbda(asked, known, first, slope)))
    return min(known, key=lambda point: abs(point.bits - asked))


def next_lmbda(
    asked: float, known: Sequence[Point], first: float, slope: Callable[[float], float]
) -> float:
    """Return the next lmbda: a secant from the nearest two points, kept between the neighbours."""
    if not known:
        return first
    nearest, *further = sorted(known, key=lambda point: abs(point.bits - asked))
    steepness = slope(nearest.lmbda)
    if further and further[0].lmbda != nearest.lmbda:
        run = math.log2(further[0].lmbda / nearest.lmbda)
        steepness = (further[0].bits - nearest.bits) / run
    octaves = (asked - nearest.bits) / min(steepness, -0.05)
    at = math.log2(nearest.lmbda) + max(-8.0, min(8.0, octaves))
    dearer = [math.log2(point.lmbda) for point in known if point.bits > asked]
    cheaper = [math.log2(point.lmbda) for point in known if point.bits <= asked]
    if dearer and cheaper:
        low, high = max(dearer), min(cheaper)
        margin = 0.05 * (high - low)
        at = max(low + margin, min(high - margin, at))
    return float(2.0**at)


def baseline(layer: Layer, bits: Sequence[float], settings: dict[str, Any]) -> list[Point]:
    """Run the paper's method for all LEVELS, and for lmbda that fit rates around `bits`."""
    lowest = layer.lmbda(max(bits) + AROUND)
    octaves = math.ceil(math.log2(layer.lmbda(max(min(bits) - AROUND, min(bits) / 4)) / lowest))
    ladder = [lowest * 2**k for k in range(octaves + 1)]
    configs = [
        from_settings(method="cerwu", scale="per-tensor", levels=k, lmbda=lmbda, **settings)
        for k in LEVELS
        for lmbda in ladder
    ]
    bar = tqdm(configs, desc=f"{layer.name} baseline", leave=False, disable=None)
    return [measure(layer, config) for config in bar]


def solve(
    layer: Layer,
    quantizers: Sequence[Quantizer],
    bits: Sequence[float],
    settings: dict[str, Any],
    hulls: dict[str, Hull],
) -> list[Result]:
    """Quantize a layer with every quantizer at every rate; `hulls` are those of other methods."""
    results: list[Result] = []
    solved: dict[float, float] = {}
    bar = tqdm(total=len(quantizers) * len(bits), desc=layer.name, leave=False, disable=None)
    for quantizer in quantizers:
        known: list[Point] = []

        def evaluate(lmbda: float, quantizer: Quantizer = quantizer) -> Point:
            config = from_settings(quantizer=quantizer, lmbda=lmbda, **settings)
            return measure(layer, config)

        for asked in bits:
            before = len(known)
            first = solved.get(asked) or layer.lmbda(max(asked - FIRST_GAP, asked / 2))
            point = approach(
                evaluate, asked, known, first, lambda x: layer.limit.slope(x / math.log(2))
            )
            solved[asked] = point.lmbda
            results.append(
                Result(
                    layer=layer.name,
                    quantizer=quantizer,
                    asked=asked,
                    evaluations=len(known) - before,
                    point=point,
                    limit=layer.limit_bits(point.relative_loss),
                    others={k: hull.bits(point.relative_loss) for k, hull in hulls.items()},
                )
            )
            bar.update()
    bar.close()
    return results
