"""The grid of a sweep: points with a configuration each."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from itertools import product
from typing import Literal, cast, get_args

from cerwu_gpu.config import (
    CompressionConfig,
    Distillation,
    GridMethod,
    Quantizer,
    RateModel,
    Scale,
    Sensitivity,
    Uniform,
    Waterfilled,
    setting,
    settings,
)
from cerwu_gpu.errors import ConfigError

System = Literal[
    "waterfilled", "cerwu", "cerwu-gamma0", "optq", "rtn", "nncodec", "nncodec-dependent"
]
"""Kinds of methods. waterfilled: steps by column that follow from lmbda; cerwu to rtn: uniform
grids, cerwu as in the paper; nncodec: its own quantizer and coder."""
UNIFORM: tuple[System, ...] = ("cerwu", "cerwu-gamma0", "optq", "rtn")
RATED: tuple[System, ...] = ("cerwu", "cerwu-gamma0")
"""Methods on uniform grids that use lmbda."""
USUAL_SCALE: dict[System, Scale] = {
    "cerwu": "per-tensor",
    "cerwu-gamma0": "per-tensor",
    "optq": "per-row",
    "rtn": "per-row",
}
NAMES: dict[System, str] = {"cerwu": "cerwu (paper)", "nncodec-dependent": "nncodec dependent"}
SHARED = (
    *("calibration", "samples", "sequence_length", "batch_size", "seed", "strict"),
    "limit_columns",
)
"""Settings that all points share: those of the calibration, which are part of a subject's identity,
and of the report."""

Setting = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of the grid.

    Attributes:
        system: kind of method.
        config: how to compress; of nncodec only the selection of weights.
        qp: NNCodec's step; None for all others.
    """

    system: System
    config: CompressionConfig
    qp: int | None = None

    @property
    def dependent(self) -> bool:
        """Whether NNCodec's trellis is used."""
        return self.system == "nncodec-dependent"

    @property
    def label(self) -> str:
        """Kind of method in words; points that differ in rate alone share it."""
        config, grid = self.config, self.config.grid
        parts = [NAMES.get(self.system, self.system)]
        if self.system == "waterfilled" and isinstance(grid, Waterfilled):
            parts = [f"waterfilled {grid.quantizer}"]
            if config.objective.sensitivity != "row":
                parts.append(f"sensitivity {config.objective.sensitivity}")
            if config.drift == "correct":
                parts.append("drift")
        elif isinstance(grid, Uniform):
            if grid.scale != USUAL_SCALE[self.system]:
                parts.append(grid.scale)
            if grid.rate_model != "histogram":
                parts.append(f"{grid.rate_model} rate")
        if config.keep_head:
            parts.append("head kept")
        if config.distillation is not None:
            parts.append(f"distilled {config.distillation.steps}")
        return ", ".join(parts)

    @property
    def key(self) -> str:
        """Digest of all settings of the point, 16 hexadecimal digits."""
        values = {name: v for name, v in settings(self.config).items() if name not in SHARED}
        text = json.dumps([self.system, values, self.qp], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def settings(self) -> dict[str, Setting]:
        """Return the settings in a table's row by name; None where the method has no such one."""
        config, grid = self.config, self.config.grid
        uniform = grid if isinstance(grid, Uniform) else None
        rated = self.qp is None and self.system not in ("optq", "rtn")
        quantizer = grid.quantizer if isinstance(grid, Waterfilled) else "scalar"
        return {
            "method": self.system,
            "quantizer": quantizer if self.qp is None else None,
            "levels": None if uniform is None else uniform.levels,
            "lmbda": config.lmbda if rated else None,
            "rate_model": config.rate_model if rated else None,
            "scale": None if uniform is None else uniform.scale,
            "sensitivity": config.objective.sensitivity if rated else None,
            "correct_drift": config.drift == "correct",
            "keep_head": config.keep_head,
            "qp": self.qp,
            "distill": 0 if config.distillation is None else config.distillation.steps,
        }


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The values of a grid; an axis applies to the systems that have it.

    Raises:
        ConfigError: an axis that a system needs is empty, or a system is unknown.
    """

    systems: tuple[System, ...] = setting(
        ("waterfilled", "cerwu", "cerwu-gamma0", "optq", "rtn"), "Methods.", name="methods"
    )
    quantizers: tuple[Quantizer, ...] = setting(
        ("scalar",), "Quantizers for waterfilled.", name="quantizer"
    )
    lmbdas: tuple[float, ...] = setting(
        (3e-10, 1e-9, 3e-9, 1e-8),
        "Rate-distortion trade-offs for waterfilled: loss accepted to save one bit.",
        name="lmbda",
    )
    sensitivities: tuple[Sensitivity, ...] = setting(
        ("row",),
        "Error weightings for waterfilled, which set the unit of lmbda.",
        name="sensitivity",
    )
    levels: tuple[int, ...] = setting(
        (8, 16, 32, 64), "Numbers of levels of the uniform grids (cerwu, cerwu-gamma0, optq, rtn)."
    )
    uniform_lmbdas: tuple[float, ...] = setting(
        (1e-6, 1e-5, 1e-4),
        "Trade-offs for cerwu and cerwu-gamma0: mean square of a layer's output error per bit.",
        name="uniform_lmbda",
    )
    rate_models: tuple[RateModel, ...] = setting(
        ("histogram",), "Rate models for cerwu and cerwu-gamma0.", name="rate_model"
    )
    scales: tuple[Scale, ...] = setting(
        (),
        "Scopes of abs-max of uniform grids; default: per-tensor for cerwu and cerwu-gamma0, "
        "per-row for optq and rtn.",
        name="scale",
    )
    qps: tuple[int, ...] = setting(
        (-36, -32, -28, -24, -20),
        "Quantization parameters for nncodec; adding 4 doubles the step size.",
        name="qp",
    )
    drifts: tuple[bool, ...] = setting(
        (False,),
        "Drift correction for waterfilled: ignore, correct, or both; correct repeats the "
        "calibration for each point.",
        name="drift",
    )
    keep_heads: tuple[bool, ...] = setting(
        (False,), "Embedding and output head: quantize, keep, or both.", name="head"
    )
    distillations: tuple[int, ...] = setting(
        (0,),
        "Numbers of distillation steps, for all methods but nncodec; 0: none.",
        name="distill",
    )

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "scales" and not getattr(self, field.name):
                raise ConfigError(f"{field.name} has no value: give at least one.")
        for system in self.systems:
            if system not in get_args(System):
                raise ConfigError(
                    f"method {system!r} is unknown: choose from {', '.join(get_args(System))}."
                )


def grid_points(axes: Axes, base: CompressionConfig) -> list[Point]:
    """Return all distinct points of the grid, in the order of the systems.

    Args:
        base: settings that are no axis (damping, passes, include, calibration and so on).

    Raises:
        ConfigError: a value is outside its range, or `base` has a target.
    """
    if base.target is not None:
        raise ConfigError("a sweep sets lmbda itself: drop bits, max_size or the like.")
    plain = replace(base, grid=Waterfilled(), drift="ignore")
    points = [
        distilled
        for keep_head in axes.keep_heads
        for system in axes.systems
        for point in _of_system(system, axes, replace(plain, keep_head=keep_head))
        for distilled in _distilled(point, axes)
    ]
    return list({point.key: point for point in points}.values())


def _distilled(point: Point, axes: Axes) -> Iterator[Point]:
    """Yield a point with each number of distillation steps."""
    for steps in axes.distillations if point.qp is None else (0,):
        distillation = Distillation(steps=steps) if steps else None
        yield replace(point, config=replace(point.config, distillation=distillation))


def _of_system(system: System, axes: Axes, plain: CompressionConfig) -> Iterator[Point]:
    if system == "waterfilled":
        for drift, quantizer, sensitivity, lmbda in product(
            axes.drifts, axes.quantizers, axes.sensitivities, axes.lmbdas
        ):
            config = replace(
                plain,
                grid=Waterfilled(quantizer=quantizer),
                objective=replace(plain.objective, sensitivity=sensitivity, lmbda=lmbda),
                drift="correct" if drift else "ignore",
            )
            yield Point(system=system, config=config)
    elif system in UNIFORM:
        scales = axes.scales or (USUAL_SCALE[system],)
        lmbdas = axes.uniform_lmbdas if system in RATED else (0.0,)
        models: tuple[RateModel, ...] = axes.rate_models if system in RATED else ("histogram",)
        method = cast(GridMethod, system)
        for model, scale, levels, lmbda in product(models, scales, axes.levels, lmbdas):
            grid = Uniform(levels=levels, method=method, scale=scale, rate_model=model)
            objective = replace(plain.objective, sensitivity="none", lmbda=lmbda)
            yield Point(system=system, config=replace(plain, grid=grid, objective=objective))
    else:
        for qp in axes.qps:
            yield Point(system=system, config=plain, qp=qp)


def check_available(points: list[Point]) -> None:
    """Refuse points whose package is not installed, before any work is done.

    Raises:
        ConfigError: nncodec is needed and missing.
    """
    if any(point.qp is not None for point in points) and find_spec("nncodec") is None:
        raise ConfigError(
            "method nncodec needs the package nncodec: pip install --no-deps nncodec, "
            "or leave the method out."
        )
