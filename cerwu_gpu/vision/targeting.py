"""Reach a wanted rate or size: a search on a sample of the layers' rows, then a few full passes."""

import math
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from cerwu_gpu.attempt import Attempt, plain_bytes
from cerwu_gpu.blocks import Blocks
from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.errors import TargetError
from cerwu_gpu.pipeline import estimate_model, sample_stacks
from cerwu_gpu.quantize.target import Correction, first_lmbda, solve, with_lmbda
from cerwu_gpu.vision.writing import Writing

FULL_PASSES = 6
"""Networks for images are small: a full pass takes seconds, single tables weigh in."""
BITS_TOLERANCE = 0.02
SIZE_MARGIN, SIZE_LEAST = 0.995, 0.98
"""Sizes aim at the first share of the limit; the second one must be used."""


def to_target(
    writing: Writing,
    blocks: Blocks,
    gradients: Mapping[tuple[str, int], Tensor],
    config: CompressionConfig,
) -> Attempt:
    """The attempt that meets config.bits or config.max_size.

    Raises:
        TargetError: it cannot be met, or FULL_PASSES do not meet it.
    """
    clock = writing.clock
    parameters = {name: writing.module.get_parameter(name) for name in writing.layouts}
    originals = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    weights = sum(parameter.numel() for parameter in parameters.values())
    with clock.stage("target"):
        probes = sample_stacks(blocks, config, gradients)
    beside = float(plain_bytes(writing.module, writing.layouts))
    request = f"bits {config.bits:g}" if config.bits else f"max_size {config.max_size}"

    @cache
    def predicted(lmbda: float) -> float:
        return estimate_model(probes, with_lmbda(config, lmbda)).bits

    correction = Correction(relative=False, drift=False)

    def bits(lmbda: float) -> float:
        return correction.apply(lmbda, predicted(lmbda))

    lmbda, step, reached = first_lmbda(probes), math.log(4.0), 0.0
    for number in range(1, FULL_PASSES + 1):
        with clock.stage("target"):
            aim = _aim(config, beside, weights, request)
            lmbda = _solved(bits, aim, lmbda, step, request)
        _put_back(parameters, originals)
        attempt = writing.attempt(blocks, gradients, with_lmbda(config, lmbda))
        correction.learn(lmbda, predicted(lmbda), attempt.bits_per_weight)
        beside = float(attempt.directory_bytes - attempt.coded_bytes)
        reached = attempt.bits_per_weight if config.bits else float(attempt.directory_bytes)
        if _accepted(config, reached, last=number == FULL_PASSES):
            return attempt
        step = 0.2
    raise TargetError(
        f"{request} was missed after {FULL_PASSES} full passes (reached {reached:.6g}): "
        "ask for a little more room."
    )


def _aim(config: CompressionConfig, beside: float, weights: int, request: str) -> float:
    """Bits per weight to steer for; `beside`: bytes of all that is not coded."""
    if config.bits is not None:
        return config.bits
    assert config.max_size is not None
    room = config.max_size * SIZE_MARGIN - beside
    if room <= 0:
        raise TargetError(
            f"{request} is out of reach: what is not quantized takes {beside:.0f} bytes."
        )
    return 8 * room / weights


def _solved(
    bits: Callable[[float], float], aim: float, start: float, step: float, request: str
) -> float:
    try:
        return solve(bits, aim, start, step, falls=True)
    except TargetError:
        raise TargetError(f"{request} is out of reach: ask for another value.") from None


def _accepted(config: CompressionConfig, reached: float, *, last: bool) -> bool:
    if config.bits is not None:
        return abs(reached - config.bits) <= BITS_TOLERANCE
    assert config.max_size is not None
    least = 0.0 if last else SIZE_LEAST * config.max_size
    return least <= reached <= config.max_size


@torch.no_grad()
def _put_back(parameters: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(originals[name])
