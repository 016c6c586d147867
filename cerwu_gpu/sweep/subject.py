"""What a sweep is run on: anything that can be compressed with a point's settings and measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from cerwu_gpu.report import STAGES, Stage
from cerwu_gpu.sweep.points import Point

Quality = Literal["perplexity", "accuracy"]
"""Perplexity is better when lower, accuracy (a share of 1) when higher."""
PREPARATION: tuple[Stage, ...] = ("calibrate", "sensitivity")
"""Work that later points find done."""
JUDGEMENT: tuple[Stage, ...] = ("decode", "evaluate")
"""Work that is no part of compressing."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one point gave.

    Raises:
        ValueError: `seconds` has a stage that is not one of STAGES.
    """

    bits_per_weight: float
    """Over all quantized weights, everything stored for them counted."""
    directory_bytes: int
    """All that is needed to load the result."""
    original_bytes: int
    quality: float
    """Of the result as it is loaded from its file."""
    seconds: Mapping[Stage, float]
    """Those of stages that did not occur may be absent."""
    events: tuple[str, ...] = ()
    """What did not go as planned, one sentence each."""

    def __post_init__(self) -> None:
        if not self.seconds.keys() <= set(STAGES):
            raise ValueError(f"stages are {', '.join(STAGES)}, not {', '.join(self.seconds)}")


class Subject(Protocol):
    """One model with the data that calibrates and judges it.

    Attributes:
        name: what tables and pictures call it.
        quality: what is measured.
    """

    name: str
    quality: Quality

    def identity(self) -> Mapping[str, str]:
        """All that results depend on besides the point: digests of weights and data, settings.

        A table belongs to one identity.
        """
        ...

    def original(self) -> float:
        """Quality of the uncompressed model."""
        ...

    def run(self, point: Point, folder: Path) -> Outcome:
        """Compress the original model with the point's settings into `folder`, which does not
        exist yet, and measure what is loaded from there.

        The first call prepares what all points share (Hessians, sensitivities).

        Raises:
            CerwuError: a subclass that says what is wrong.
        """
        ...
