"""Estimate a model's rate and loss at a given lmbda from a sample of its rows, in seconds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cerwu_gpu.compression.blocks import Blocks, InputStatistics, Matrix
from cerwu_gpu.compression.pipeline import (
    stack_sensitivities,
    stacks,
    used_hessian,
    with_additions,
)
from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.container.matrix import encode_matrix
from cerwu_gpu.errors import CerwuError
from cerwu_gpu.quantize.layer import quantize_stack
from cerwu_gpu.quantize.objective import quadratic_error
from cerwu_gpu.quantize.sensitivity import Sensitivities

SAMPLED_BLOCKS = 8
"""Number of blocks in an estimate's sample."""
ROWS_PER_STACK = 256
"""Number of rows of a stack in an estimate's sample."""
LMBDA_RANGE = (1e-14, 1e4)


@dataclass(frozen=True)
class Probe:
    """A sample of the rows of one stack.

    Attributes:
        name: of its first matrix, for errors.
        weight: [k, n] float32.
        hessian: [n, n], undamped.
        sensitivity: [k] float32.
        tokens: number of tokens of the Hessian; None: it is of none.
        weights, matrices: numbers of weights and matrices of the model that it represents.
    """

    name: str
    weight: Tensor
    hessian: Tensor
    sensitivity: Tensor
    tokens: int | None
    weights: float
    matrices: float


@dataclass(frozen=True)
class Estimate:
    """Rate and loss of the model at one lmbda, as a sample predicts them.

    Attributes:
        bits: per weight, including side information.
        loss: half the sum of sensitivity-weighted squared output errors, over the whole model.
    """

    bits: float
    loss: float


def sample_stacks(
    blocks: Blocks, config: CompressionConfig, sensitivities: Sensitivities
) -> list[Probe]:
    """Return samples of rows of stacks that are spread over the model.

    All blocks are iterated over, so that a cache behind them is complete afterwards.
    """
    taken: dict[int, list[Probe]] = {}
    weights: dict[int, int] = {}
    stride = max(1, len(blocks) // SAMPLED_BLOCKS)
    for index, block in enumerate(blocks):
        group = min(index // stride, (len(blocks) - 1) // stride)
        statistics = with_additions(block.statistics(), sensitivities)
        matrices = block.matrices()
        size = sum(matrix.weight.numel() for matrix in matrices)
        weights[group] = weights.get(group, 0) + size
        if group not in taken:
            taken[group] = [
                _probe(stack, statistics, config, sensitivities) for stack in stacks(matrices)
            ]
    probes = []
    for group, members in taken.items():
        scale = weights[group] / max(1.0, sum(member.weights for member in members))
        probes += [
            replace(probe, weights=probe.weights * scale, matrices=probe.matrices * scale)
            for probe in members
        ]
    return probes


def _probe(
    stack: Sequence[Matrix],
    statistics: Mapping[str, InputStatistics],
    config: CompressionConfig,
    sensitivities: Sensitivities,
) -> Probe:
    """Return a probe of one stack, in tensors of its own: it outlives the block."""
    hessian = used_hessian(statistics[stack[0].input])
    alphas = stack_sensitivities(stack, statistics, config, sensitivities)
    weight, alpha = torch.cat([matrix.weight for matrix in stack]), torch.cat(alphas)
    rows = torch.arange(0, len(weight), max(1, len(weight) // ROWS_PER_STACK), device=weight.device)
    return Probe(
        stack[0].name,
        weight[rows].clone(),
        hessian.clone(),
        alpha[rows].clone(),
        statistics[stack[0].input].tokens or None,
        weight.numel(),
        len(stack),
    )


def estimate(probes: Iterable[Probe], config: CompressionConfig) -> Estimate:
    """Return bits and loss of the model at config.lmbda; the bits of a matrix's words grow with its
    rows, those of its side information do not."""
    bits = loss = total = 0.0
    for probe in probes:
        try:
            stack = quantize_stack(
                [probe.weight], probe.hessian, config, [probe.sensitivity], probe.tokens
            )
        except CerwuError as error:
            raise type(error)(f"{probe.name}: {error}") from error
        matrix = stack.matrices[0]
        share = probe.weights / probe.weight.numel()
        encoded = encode_matrix(matrix, 0.0)
        bits += share * 32.0 * len(encoded.words) + probe.matrices * 8.0 * len(encoded.side)
        difference = probe.weight - matrix.weight(torch.float32)
        errors = quadratic_error(difference, probe.hessian)
        loss += share * 0.5 * float((probe.sensitivity * errors).sum())
        total += probe.weights
    return Estimate(bits / total, loss)


def first_lmbda(probes: Iterable[Probe]) -> float:
    """Return the start of a search: about two bits for the mean of the sampled weights.

    A rate R of independent weights costs theta = E 2^(-2R) each of their weighted output energy E,
    and theta = lmbda / ln 2 (quantize/limit.py); E is a geometric mean over the probes.
    """
    total = weights = 0.0
    for probe in probes:
        energy = float((probe.sensitivity * quadratic_error(probe.weight, probe.hessian)).mean())
        if energy > 0:
            total += probe.weights * math.log(energy / probe.weight.shape[1])
            weights += probe.weights
    mean = math.exp(total / weights) if weights else 1.0
    return min(max(math.log(2) * mean / 16, LMBDA_RANGE[0]), LMBDA_RANGE[1])
