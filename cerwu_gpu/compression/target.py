"""Reach a requested rate, size or quality: a search on a sample, then a few full passes.

Bits fall and losses grow with lmbda, smoothly: at high rate half a bit per factor 4. A sample of
stacks, each reduced to a sample of its rows, gives both as functions of lmbda in seconds; the
measurements of full passes then correct its bias.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from cerwu_gpu.compression.estimate import (
    LMBDA_RANGE,
    Estimate,
    estimate,
    first_lmbda,
    sample_stacks,
)
from cerwu_gpu.compression.run import (
    Attempt,
    Run,
    directory_bytes,
    plain_bytes,
    plain_tensors,
    tensors_bytes,
)
from cerwu_gpu.config import Bits, CompressionConfig, MaxPerplexityIncrease, MaxSize
from cerwu_gpu.errors import ConfigError, TargetError

SMALL_MODEL, SMALL_PASSES = 4_000_000, 8
"""Number of weights below which side information of single matrices dominates, and of passes there:
the estimate is poor, but full passes are cheap."""
BITS_TOLERANCE = 0.02
SIZE_MARGIN, SIZE_LEAST = 0.995, 0.98
"""Share of a size limit that is aimed at, and the share that must be used."""
QUALITY_MARGIN, QUALITY_LEAST = 0.85, 0.6
"""Share of a loss increase that is aimed at, and the share that must be used."""
PLAIN_HEADER, PART_HEADER = 180, 640
"""Approximate bytes of a file's header per plain tensor and per coded matrix."""
MANIFEST_GROWTH = 16
"""Maximum bytes by which a matrix's entry in the header grows with its side data."""
TOLERANCE = 0.001
"""Relative accuracy of the search on the sample."""


@dataclass
class Goal:
    """A measured quantity, its aim, and the condition for an attempt to be accepted.

    Attributes:
        request: the request in words.
        on_sample: prediction by an estimate, in units of `aim`.
        on_attempt: measurement of a full pass.
        falls: whether the quantity falls with lmbda.
        aim: returns the value to steer for, after the passes so far.
        accepts: whether an attempt meets the request, given its measurement; the last pass may stay
            further below it.
        room: returns the most bytes by which an accepted attempt may grow; None: any number.
    """

    request: str
    on_sample: Callable[[Estimate], float]
    on_attempt: Callable[[Attempt], float]
    falls: bool
    aim: Callable[[], float]
    accepts: Callable[[Attempt, float, bool], bool]
    room: Callable[[Attempt], int | None] = lambda _: None


def to_target(run: Run, config: CompressionConfig) -> Attempt:
    """Return the attempt that meets config.target.

    Raises:
        ConfigError: a quality is requested, and the model has no loss.
        TargetError: the request cannot be met, or is not within the adapter's full passes
            (SMALL_PASSES).
    """
    adapter, clock, final = run.adapter, run.clock, config
    config = replace(config, distillation=None)  # which takes long, and only bytes that are left
    adapter.keep_originals()
    sensitivities = run.sensitivities(config)
    with clock.stage("calibrate"):
        probes = sample_stacks(adapter.blocks(config, sampling=True), config, sensitivities)
    with clock.stage("target"):
        goal = _goal(run, config)

    @cache
    def predicted(lmbda: float) -> float:
        return goal.on_sample(estimate(probes, config.at(lmbda)))

    drift = adapter.drifts and config.corrects_drift and goal.falls
    correction, measured = Correction(relative=not goal.falls, drift=drift), 0.0
    lmbda, step = first_lmbda(probes), math.log(4.0)
    passes = adapter.full_passes if _weights(run) > SMALL_MODEL else SMALL_PASSES
    for number in range(1, passes + 1):
        with clock.stage("target"):
            lmbda = _solved(goal, predicted, correction, lmbda, step)
        attempt = run.attempt(config.at(lmbda))
        with clock.stage("target"):
            measured = goal.on_attempt(attempt)
            accepted = goal.accepts(attempt, measured, number == passes)
        if accepted and final.distillation is not None:
            # Its blocks are in the journal.
            return run.attempt(final.at(lmbda), room=goal.room(attempt))
        if accepted:
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
    correction: "Correction",
    start: float,
    step: float,
) -> float:
    def measure(lmbda: float) -> float:
        return correction.apply(lmbda, predicted(lmbda))

    try:
        return solve(measure, goal.aim(), start, step, falls=goal.falls)
    except TargetError as error:
        raise TargetError(f"{goal.request} is out of reach: ask for another value.") from error


def _goal(run: Run, config: CompressionConfig) -> Goal:
    match config.target:
        case Bits(bits):
            return _bits_goal(run, bits)
        case MaxSize(size):
            return _size_goal(run, size)
        case MaxPerplexityIncrease(share):
            return _quality_goal(run, share)
        case None:
            raise ValueError("a configuration without a target has no goal")


def _bits_goal(run: Run, bits: float) -> Goal:
    weights = _weights(run)

    def room(attempt: Attempt) -> int:
        return int((bits + BITS_TOLERANCE) * weights / 8) - attempt.coded_bytes

    return Goal(
        request=f"bits {bits:g}",
        on_sample=lambda sample: sample.bits,
        on_attempt=lambda attempt: attempt.bits_per_weight,
        falls=True,
        aim=lambda: bits,
        accepts=lambda _, value, __: abs(value - bits) <= BITS_TOLERANCE,
        room=room,
    )


def _size_goal(run: Run, limit: int) -> Goal:
    """Return the goal of a size: bits for the weights in the room that all other bytes leave. Those
    are estimated before the first pass and known after it."""
    weights = _weights(run)
    least, fixed = _fixed_bytes(run)
    if fixed > limit * SIZE_MARGIN:
        fixed = least  # the first pass shows how much the headers really take
    request = f"max_size {limit}"

    def aim() -> float:
        room = limit * SIZE_MARGIN - fixed
        if room <= 0:
            raise TargetError(
                f"{request} is out of reach: what is not quantized takes {fixed} bytes."
            )
        return 8 * room / weights

    def on_attempt(attempt: Attempt) -> float:
        nonlocal fixed
        fixed = attempt.directory_bytes - attempt.coded_bytes
        return attempt.bits_per_weight

    def accepts(attempt: Attempt, _: float, last: bool) -> bool:
        least = 0.0 if last else SIZE_LEAST * limit
        return least <= attempt.directory_bytes <= limit

    def room(attempt: Attempt) -> int:
        return limit - attempt.directory_bytes - MANIFEST_GROWTH * len(attempt.layers)

    aim()
    return Goal(
        request=request,
        on_sample=lambda sample: sample.bits,
        on_attempt=on_attempt,
        falls=True,
        aim=aim,
        accepts=accepts,
        room=room,
    )


def _quality_goal(run: Run, increase: float) -> Goal:
    """Return the goal of a perplexity: growth of the held-out loss, which the weighted loss of a
    sample predicts."""
    before = run.adapter.loss()
    if before is None:
        raise ConfigError(
            "max_perplexity_increase needs a loss on held-out data, which this model has not: "
            "give a loss, or ask for bits or a size."
        )
    limit = math.log1p(increase)

    def on_attempt(attempt: Attempt) -> float:
        after = run.adapter.loss()
        assert after is not None
        return max(after - before, 1e-6)

    def accepts(_: Attempt, value: float, last: bool) -> bool:
        return (0.0 if last else limit * QUALITY_LEAST) <= value <= limit

    return Goal(
        request=f"max_perplexity_increase {increase:g}",
        on_sample=lambda sample: sample.loss,
        on_attempt=on_attempt,
        falls=False,
        aim=lambda: limit * QUALITY_MARGIN,
        accepts=accepts,
    )


def _weights(run: Run) -> int:
    return sum(math.prod(layout.shape) for layout in run.adapter.layouts.values())


def _within(lmbda: float) -> float:
    """Return lmbda, which an exponential may take out of its range by one rounding."""
    return min(max(lmbda, LMBDA_RANGE[0]), LMBDA_RANGE[1])


def _fixed_bytes(run: Run) -> tuple[int, int]:
    """Return the bytes besides coded weights, which are plain tensors and other files, and those
    with approximate headers."""
    module, layouts = run.adapter.module, run.adapter.layouts
    parts = sum(layout.parts for layout in layouts.values())
    with tempfile.TemporaryDirectory() as folder:
        run.adapter.write_files(Path(folder))
        files = directory_bytes(Path(folder))
    carried = run.adapter.carried
    count = len(plain_tensors(module, layouts)) + len(carried)
    headers = count * PLAIN_HEADER + parts * PART_HEADER
    least = plain_bytes(module, layouts) + tensors_bytes(carried.values()) + files
    return least, least + headers


class Correction:
    """The offset between predictions and full passes, as a function of lmbda.

    After one pass it is constant, or with `drift`, which a sample does not show, proportional to
    lmbda, as errors of earlier layers are. After two it is the line in log lmbda through the last
    ones, extrapolated by at most their distance.
    """

    def __init__(self, *, relative: bool, drift: bool) -> None:
        """Start without passes; with `relative` the offset is a factor, as for losses."""
        self._relative, self._drift = relative, drift
        self._passes: list[tuple[float, float]] = []

    def learn(self, lmbda: float, predicted: float, measured: float) -> None:
        """Add the measurement of a full pass at lmbda and its prediction."""
        place = math.log(lmbda)
        self._passes = [before for before in self._passes[-1:] if before[0] != place]
        offset = math.log(measured / predicted) if self._relative else measured - predicted
        self._passes.append((place, offset))

    def apply(self, lmbda: float, predicted: float) -> float:
        """Return a corrected prediction."""
        offset = self._offset(math.log(lmbda))
        return predicted * math.exp(offset) if self._relative else predicted + offset

    def _offset(self, place: float) -> float:
        if not self._passes:
            return 0.0
        if len(self._passes) == 1:
            (before, offset), *_ = self._passes
            return offset * math.exp(min(place - before, 1.0)) if self._drift else offset
        (before, offset), (last, last_offset) = self._passes
        share = min(max((place - before) / (last - before), -1.0), 2.0)
        return offset + (last_offset - offset) * share


def solve(
    measure: Callable[[float], float],
    goal: float,
    start: float,
    step: float = math.log(4.0),
    *,
    falls: bool,
) -> float:
    """Return lmbda with measure(lmbda) = goal.

    Args:
        measure: positive, about a power of lmbda, so that the search runs on logarithms; it may be
            flat where lmbda is far too small or too large.
        goal: positive.
        start: first lmbda to try.
        step: in log lmbda, to the second lmbda.
        falls: whether the measure falls with lmbda, as bits do, or grows, as losses do.

    Raises:
        TargetError: no lmbda in LMBDA_RANGE reaches the goal.
    """
    tried: dict[float, float] = {}
    least, most = (math.log(edge) for edge in LMBDA_RANGE)

    def gap(log_lmbda: float) -> float:
        if log_lmbda not in tried:
            lmbda = _within(math.exp(log_lmbda))
            tried[log_lmbda] = math.log(max(measure(lmbda), 1e-9 * goal) / goal)
        return tried[log_lmbda]

    low = high = math.log(start)
    if abs(gap(low)) < TOLERANCE:
        return start
    # Step until the goal lies between two values, then bisect or interpolate.
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
            return _within(math.exp(middle))
        if (gap(middle) > 0) == (gap(low) > 0):
            low = middle
        else:
            high = middle
    return _within(math.exp((low + high) / 2))
