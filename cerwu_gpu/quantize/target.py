"""Find the lmbda that gives a wanted rate or quality, from a sample of the model's rows.

Bits fall and losses grow with lmbda, smoothly: at high rate half a bit per factor 4. A sample of
stacks, each reduced to some of its rows, gives both as functions of lmbda in seconds; what a full
pass then measures corrects the sample's bias.
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


def solve(
    measure: Callable[[float], float], goal: float, start: float, step: float = math.log(4.0)
) -> float:
    """lmbda with measure(lmbda) = goal, for a measure that falls or grows with lmbda throughout.

    Args:
        measure: positive; of a power of lmbda's kind, so that the search runs on logarithms.
        goal: positive.
        start: first lmbda to try.
        step: in log lmbda, to the second one.

    Raises:
        TargetError: the goal lies outside of what any lmbda gives.
    """
    tried: dict[float, float] = {}

    def gap(log_lmbda: float) -> float:
        lmbda = math.exp(log_lmbda)
        if not LMBDA_RANGE[0] <= lmbda <= LMBDA_RANGE[1]:
            raise TargetError(f"no lmbda reaches {goal:.4g}: ask for a value within reach.")
        tried[log_lmbda] = math.log(max(measure(lmbda), 1e-9 * goal) / goal)
        return tried[log_lmbda]

    here = math.log(start)
    first = gap(here)
    if abs(first) < TOLERANCE:
        return start
    beyond = gap(here + step)
    falling = beyond < first
    # Walk until the goal lies between two tried values, then halve or interpolate.
    low, high = (here, here + step)
    while (tried[low] > 0) == (tried[high] > 0):
        outward = (tried[high] > 0) == falling
        step *= 1.5
        edge = high + step if outward else low - step
        gap(edge)
        low, high = (high, edge) if outward else (edge, low)
    while high - low > 1e-3:
        share = tried[low] / (tried[low] - tried[high])
        middle = low + (high - low) * min(max(share, 0.1), 0.9)
        if abs(gap(middle)) < TOLERANCE:
            return math.exp(middle)
        if (tried[middle] > 0) == (tried[low] > 0):
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def with_lmbda(config: CompressionConfig, lmbda: float) -> CompressionConfig:
    """The same settings at another lmbda."""
    return replace(config, lmbda=lmbda)
