"""Reach a wanted rate, size or quality: a search on a sample, then one to three full passes."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cerwu_gpu.attempt import Attempt, directory_bytes, plain_bytes, plain_tensors
from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.errors import TargetError
from cerwu_gpu.hf.attempt import Attempts, write_companions
from cerwu_gpu.hf.evaluation import mean_loss
from cerwu_gpu.hf.source import Source
from cerwu_gpu.pipeline import estimate_model, sample_stacks
from cerwu_gpu.progress import Clock
from cerwu_gpu.quantize.target import Correction, Estimate, first_lmbda, solve, with_lmbda

FULL_PASSES = 3
SMALL_MODEL, SMALL_PASSES = 4_000_000, 8
"""Of so few weights single tables weigh in, an estimate is rough, and a full pass takes seconds."""
BITS_TOLERANCE = 0.02
SIZE_MARGIN = 0.995
"""Sizes aim at this share of the limit; at least SIZE_LEAST of it must be used."""
SIZE_LEAST = 0.99
QUALITY_MARGIN = 0.85
PLAIN_HEADER, PART_HEADER = 180, 640
"""Bytes of a file's header for a plain tensor and for a coded matrix, about."""


@dataclass(frozen=True)
class Goal:
    """What is measured, on the sample and on an attempt, and when an attempt will do.

    Attributes:
        on_sample: what an estimate predicts, in units of `aim`.
        on_attempt: the same quantity of a full pass.
        falls: whether it falls with lmbda.
        aim: value to steer for.
        accepts: whether a measured value meets the request.
        within: whether it does not overshoot, should this be the last pass.
        request: what was asked for, in words.
    """

    on_sample: Callable[[Estimate], float]
    on_attempt: Callable[[Attempt], float]
    falls: bool
    aim: float
    accepts: Callable[[float], bool]
    within: Callable[[float], bool]
    request: str


def to_target(attempts: Attempts, config: CompressionConfig, clock: Clock) -> Attempt:
    """The attempt that meets config.bits, max_size or max_perplexity_increase.

    Raises:
        TargetError: it cannot be met, or FULL_PASSES (SMALL_PASSES) do not meet it.
    """
    source = attempts.source
    with clock.stage("calibrate"):
        probes = sample_stacks(
            source.sample_blocks(attempts.gradients()), config, attempts.gradients()
        )
    with clock.stage("target"):
        goal = _goal(source, config)

    @cache
    def predicted(lmbda: float) -> float:
        return goal.on_sample(estimate_model(probes, with_lmbda(config, lmbda)))

    drift = bool(config.correct_drift) and goal.falls
    correction, measured = Correction(relative=not goal.falls, drift=drift), 0.0
    lmbda, step = first_lmbda(probes), math.log(4.0)
    passes = FULL_PASSES if _weights(source) > SMALL_MODEL else SMALL_PASSES
    for number in range(1, passes + 1):
        with clock.stage("target"):
            lmbda = _solved(goal, predicted, correction, lmbda, step)
        attempt = attempts.run(with_lmbda(config, lmbda))
        with clock.stage("target"):
            measured = goal.on_attempt(attempt)
        if goal.accepts(measured) or (number == passes and goal.within(measured)):
            return attempt
        with clock.stage("target"):
            correction.learn(lmbda, predicted(lmbda), measured)
        step = 0.2
    raise TargetError(
        f"{goal.request} was missed after {passes} full passes (reached {measured:.4g}): "
        "ask for a little more room."
    )


def _solved(
    goal: Goal,
    predicted: Callable[[float], float],
    correction: Correction,
    start: float,
    step: float,
) -> float:
    def measure(lmbda: float) -> float:
        return correction.apply(lmbda, predicted(lmbda))

    try:
        return solve(measure, goal.aim, start, step, falls=goal.falls)
    except TargetError:
        raise TargetError(f"{goal.request} is out of reach: ask for another value.") from None


def _goal(source: Source, config: CompressionConfig) -> Goal:
    if config.bits is not None:
        bits = config.bits

        def near(value: float) -> bool:
            return abs(value - bits) <= BITS_TOLERANCE

        return Goal(
            on_sample=lambda found: found.bits,
            on_attempt=lambda attempt: attempt.bits_per_weight,
            falls=True,
            aim=bits,
            accepts=near,
            within=near,
            request=f"bits {bits:g}",
        )
    if config.max_size is not None:
        return _size_goal(source, config.max_size)
    assert config.max_perplexity_increase is not None
    return _quality_goal(source, config.max_perplexity_increase)


def _size_goal(source: Source, limit: int) -> Goal:
    """Bytes of the directory; all that is not coded is the same at every lmbda, nearly."""
    weights = _weights(source)
    fixed = _fixed_bytes(source)
    if fixed >= limit * SIZE_MARGIN:
        raise TargetError(
            f"max_size {limit} is out of reach: what is not quantized takes {fixed} bytes."
        )
    return Goal(
        on_sample=lambda found: fixed + found.bits * weights / 8,
        on_attempt=lambda attempt: float(attempt.directory_bytes),
        falls=True,
        aim=limit * SIZE_MARGIN,
        accepts=lambda value: SIZE_LEAST * limit <= value <= limit,
        within=lambda value: value <= limit,
        request=f"max_size {limit}",
    )


def _weights(source: Source) -> int:
    return sum(math.prod(layout.shape) for layout in source.layouts.values())


def _fixed_bytes(source: Source) -> int:
    """About what a directory takes besides coded weights: plain tensors, other files, headers."""
    model, layouts = source.loaded.model, source.layouts
    parts = sum(layout.parts for layout in layouts.values())
    with tempfile.TemporaryDirectory() as folder:
        write_companions(source.loaded, Path(folder))
        files = directory_bytes(Path(folder))
    headers = len(plain_tensors(model, layouts)) * PLAIN_HEADER + parts * PART_HEADER
    return plain_bytes(model, layouts) + files + headers


def _quality_goal(source: Source, increase: float) -> Goal:
    """Growth of the log perplexity on held-out text, which the weighted loss predicts."""
    model, tokens = source.loaded.model, source.held_out
    before = mean_loss(model, tokens)
    limit = math.log1p(increase)

    def on_attempt(attempt: Attempt) -> float:
        return max(mean_loss(model, tokens) - before, 1e-6)

    return Goal(
        on_sample=lambda found: found.loss,
        on_attempt=on_attempt,
        falls=False,
        aim=limit * QUALITY_MARGIN,
        accepts=lambda value: limit * 0.6 <= value <= limit,
        within=lambda value: value <= limit,
        request=f"max_perplexity_increase {increase:g}",
    )
