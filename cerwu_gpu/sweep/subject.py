"""The subject of a sweep: a model that can be compressed at any point and measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from cerwu_gpu.report import STAGES, Stage
from cerwu_gpu.sweep.points import Point

Quality = Literal["perplexity", "accuracy"]
"""Measure of quality: perplexity is better when lower, accuracy (a share of 1) when higher."""
PREPARATION: tuple[Stage, ...] = ("calibrate", "sensitivity")
"""Stages that are run once for all points."""
JUDGEMENT: tuple[Stage, ...] = ("decode", "evaluate")
"""Stages that are no part of compressing."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one point.

    Raises:
        ValueError: `seconds` has a stage that is not one of STAGES.
    """

    bits_per_weight: float
    """Average over all quantized weights, including side information."""
    directory_bytes: int
    """Bytes of everything that is needed to load the result."""
    original_bytes: int
    quality: float
    """Quality of the result, loaded from its file."""
    seconds: Mapping[Stage, float]
    """Seconds by stage; stages that did not occur may be absent."""
    events: tuple[str, ...] = ()
    """Deviations from the plan, one sentence each."""

    def __post_init__(self) -> None:
        if not self.seconds.keys() <= set(STAGES):
            raise ValueError(f"stages are {', '.join(STAGES)}, not {', '.join(self.seconds)}")


class Subject(Protocol):
    """A model with its calibration and evaluation data.

    Attributes:
        name: of the model in tables and pictures.
        quality: name of the measure.
    """

    name: str
    quality: Quality

    def identity(self) -> Mapping[str, str]:
        """Return what results depend on besides the point: digests of weights and data, settings.

        A table belongs to one identity.
        """
        ...

    def original(self) -> float:
        """Return the quality of the uncompressed model."""
        ...

    def run(self, point: Point, folder: Path) -> Outcome:
        """Compress the original model with the point's settings into a new `folder`, and measure
        the model that is loaded from there.

        The first call prepares Hessians and sensitivities for all points.

        Raises:
            CerwuError: a subclass that names the error.
        """
        ...
