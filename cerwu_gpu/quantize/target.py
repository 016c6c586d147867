"""Find the lmbda that gives a wanted rate or quality, from a sample of the model's rows.

Bits fall and losses grow with lmbda, smoothly: at high rate half a bit per factor 4. A sample of
stacks, each reduced to some of its rows, gives both as functions of lmbda in seconds; what full
passes then measure corrects the sample's bias.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.errors import CerwuError, TargetError
from cerwu_gpu.quantize.layer import quantize_stack
from cerwu_gpu.quantize.objective import quadratic_error
from cerwu_gpu.quantize.symbols import QuantizedMatrix

SAMPLE_ROWS = 256
"""Rows of a stack that an estimate looks at."""
LMBDA_RANGE = (1e-14, 1e4)
TOLERANCE = 0.001
"""Relative accuracy of the search on the sample."""


@dataclass(frozen=True)
class Probe:
    """Some rows of one stack.

    Attributes:
        name: of its first matrix, for errors.
        weight: [k, n] float32.
        hessian: [n, n], undamped.
        sensitivity: [k] float32.
        weights: how many weights of the model it stands for.
        matrices: how many matrices of the model it stands for.
    """

    name: str
    weight: Tensor
    hessian: Tensor
    sensitivity: Tensor
    weights: float
    matrices: float


StoredBits = Callable[[QuantizedMatrix], tuple[float, float]]
"""Bits of a matrix's words, which grow with its rows, and of what is stored beside them."""


@dataclass(frozen=True)
class Estimate:
    """What the sample says about the model at one lmbda.

    Attributes:
        bits: per weight, everything stored counted.
        loss: half the sum of sensitivity-weighted squared output errors, over the whole model.
    """

    bits: float
    loss: float


def probe(
    name: str, weights: Sequence[Tensor], hessian: Tensor, sensitivities: Sequence[Tensor]
) -> Probe:
    """A probe of a stack of matrices [m_k, n] that stands for it alone; it outlives the block."""
    weight, sensitivity = torch.cat(list(weights)), torch.cat(list(sensitivities))
    keep = torch.arange(0, len(weight), max(1, len(weight) // SAMPLE_ROWS), device=weight.device)
    return Probe(
        name,
        weight[keep].clone(),
        hessian.clone(),
        sensitivity[keep].clone(),
        weight.numel(),
        len(weights),
    )


def estimate(probes: Iterable[Probe], config: CompressionConfig, stored: StoredBits) -> Estimate:
    """Bits and loss of the model at config.lmbda."""
    bits = loss = total = 0.0
    for each in probes:
        try:
            stack = quantize_stack([each.weight], each.hessian, config, [each.sensitivity])
        except CerwuError as error:
            raise type(error)(f"{each.name}: {error}") from None
        matrix = stack.matrices[0]
        share = each.weights / each.weight.numel()
        words, side = stored(matrix)
        bits += share * words + each.matrices * side
        difference = each.weight - matrix.weight(torch.float32)
        errors = quadratic_error(difference, each.hessian)
        loss += share * 0.5 * float((each.sensitivity * errors).sum())
        total += each.weights
    return Estimate(bits / total, loss)


class Correction:
    """What full passes say about predictions: an offset that depends on lmbda.

    After one pass it is a constant, or with `drift`, of which a sample knows nothing, in proportion
    to lmbda, as errors of earlier layers are. After two it is the line in log lmbda through the
    last ones, followed no further than their distance on either side.
    """

    def __init__(self, *, relative: bool, drift: bool) -> None:
        """`relative`: predictions are off by a factor, as losses are, instead of by a sum."""
        self._relative, self._drift = relative, drift
        self._seen: list[tuple[float, float]] = []

    def learn(self, lmbda: float, predicted: float, measured: float) -> None:
        """A full pass at lmbda measured this where that had been predicted."""
        place = math.log(lmbda)
        self._seen = [seen for seen in self._seen[-1:] if seen[0] != place]
        offset = math.log(measured / predicted) if self._relative else measured - predicted
        self._seen.append((place, offset))

    def apply(self, lmbda: float, predicted: float) -> float:
        """The prediction set right."""
        offset = self._offset(math.log(lmbda))
        return predicted * math.exp(offset) if self._relative else predicted + offset

    def _offset(self, place: float) -> float:
        if not self._seen:
            return 0.0
        if len(self._seen) == 1:
            (before, offset), *_ = self._seen
            return offset * math.exp(min(place - before, 1.0)) if self._drift else offset
        (before, offset), (last, last_offset) = self._seen
        share = min(max((place - before) / (last - before), -1.0), 2.0)
        return offset + (last_offset - offset) * share


def first_lmbda(probes: Iterable[Probe]) -> float:
    """Where a search may begin: about two bits for the mean of the sampled weights.

    A rate R of independent weights costs theta = E 2^(-2R) each of their weighted output energy E,
    and theta = lmbda / ln 2 (quantize/limit.py); E is a geometric mean over the probes.
    """
    total = weights = 0.0
    for each in probes:
        energy = float((each.sensitivity * quadratic_error(each.weight, each.hessian)).mean())
        if energy > 0:
            total += each.weights * math.log(energy / each.weight.shape[1])
            weights += each.weights
    mean = math.exp(total / weights) if weights else 1.0
    return min(max(math.log(2) * mean / 16, LMBDA_RANGE[0]), LMBDA_RANGE[1])


def solve(
    measure: Callable[[float], float],
    goal: float,
    start: float,
    step: float = math.log(4.0),
    *,
    falls: bool,
) -> float:
    """lmbda with measure(lmbda) = goal.

    Args:
        measure: positive; of a power of lmbda's kind, so that the search runs on logarithms. It
            may be flat where lmbda is far too small or too large.
        goal: positive.
        start: first lmbda to try.
        step: in log lmbda, to the second one.
        falls: whether the measure falls with lmbda, as bits do, or grows, as losses do.

    Raises:
        TargetError: the goal lies outside of what any lmbda gives.
    """
    tried: dict[float, float] = {}
    least, most = (math.log(edge) for edge in LMBDA_RANGE)

    def gap(log_lmbda: float) -> float:
        if log_lmbda not in tried:
            tried[log_lmbda] = math.log(max(measure(math.exp(log_lmbda)), 1e-9 * goal) / goal)
        return tried[log_lmbda]

    low = high = math.log(start)
    if abs(gap(low)) < TOLERANCE:
        return start
    # Walk until the goal lies between two tried values, then halve or interpolate.
    upwards = (gap(low) > 0) == falls
    while (gap(low) > 0) == (gap(high) > 0):
        if upwards:
            low, high = high, min(high + step, most)
        else:
            low, high = max(low - step, least), low
        if low == high:
            raise TargetError(f"no lmbda reaches {goal:.4g}: ask for a value within reach.")
        step *= 1.5
    while high - low > 1e-3:
        share = gap(low) / (gap(low) - gap(high))
        middle = low + (high - low) * min(max(share, 0.1), 0.9)
        if abs(gap(middle)) < TOLERANCE:
            return math.exp(middle)
        if (gap(middle) > 0) == (gap(low) > 0):
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def with_lmbda(config: CompressionConfig, lmbda: float) -> CompressionConfig:
    """The same settings at another lmbda."""
    return replace(config, lmbda=lmbda)
