r"""Rate models of the search: one table of bits per level, frozen for a pass.

- histogram: -log2 of the share that the level had in the pass before (the default; its tables are
  the coder's own, by class: quantize/rate.py);
- gaussian: -log2 of the probability of the level's interval under N(0, mean square of the weights,
  and from the second pass on of what they became in the pass before);
- uniform: every level costs the same, so that rate plays no part but for the completed square.

The last two are the paper's simpler models, for comparison. Whatever the search believes, the
coder always charges with the histogram of what it codes.
"""

import math

import torch
from torch import Tensor

from cerwu_gpu.config import RateModel

LEAST_PROBABILITY = 1e-300
"""Minimum probability of an interval: keeps the bits of far levels finite, as lmbda may be 0."""


def histogram_bits(index: Tensor, size: int, added: float) -> Tensor:
    """Return -log2 of the shares of `size` levels in `index` (int64, any shape): [size] float64.

    Every count is raised by `added` > 0.
    """
    counts = torch.bincount(index.flatten(), minlength=size).to(torch.float64) + added
    return counts.sum().log2() - counts.log2()


def gaussian_bits(levels: Tensor, variance: float) -> Tensor:
    """Return -log2 P[interval of each level] under N(0, variance): [K] float64.

    An interval reaches halfway to the neighbours; the two outer ones reach as far outward as
    inward.

    Args:
        levels: [K] values, ascending, K >= 2.
        variance: >= 0; of 0 all mass is at 0.
    """
    levels = levels.to(torch.float64)
    half = levels.diff() / 2
    lower = levels - torch.cat([half[:1], half])
    upper = levels + torch.cat([half, half[-1:]])
    unit = math.sqrt(2 * max(variance, LEAST_PROBABILITY))
    # The difference of the tails on the interval's side keeps its digits far from 0.
    mirrored = upper + lower < 0
    near = torch.where(mirrored, -upper, lower) / unit
    far = torch.where(mirrored, -lower, upper) / unit
    probability = (torch.erfc(near) - torch.erfc(far)) / 2
    return -probability.clamp_min(LEAST_PROBABILITY).log2()


def uniform_bits(levels: Tensor) -> Tensor:
    """Return log2 K for each of the K levels: [K] float64."""
    return torch.full_like(levels, math.log2(len(levels)), dtype=torch.float64)


def model_bits(model: RateModel, levels: Tensor, values: Tensor) -> Tensor:
    """Return the bits [K] float32 of the levels [K] under a model with at most one parameter.

    Args:
        model: gaussian or uniform.
        levels: [K] values, ascending, in the units of `values`.
        values: [m, n] the weights, or their levels; the Gaussian takes their mean square.
    """
    if model == "uniform":
        return uniform_bits(levels).to(torch.float32)
    assert model == "gaussian", "a histogram's tables are made by class: quantize/rate.py"
    variance = float(values.to(torch.float64).square().mean())
    return gaussian_bits(levels, variance).to(torch.float32)
