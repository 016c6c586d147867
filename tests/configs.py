"""Configurations of flat settings, and `compress` with calibration data as arguments."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import cerwu_gpu
from cerwu_gpu import Report
from cerwu_gpu.config import Batches, Calibration, CompressionConfig, Text, from_settings


def configured(**given: Any) -> CompressionConfig:
    """The configuration of flat settings; `sequential` and `correct_drift` are short for drifts,
    and without a grid the methods cerwu and cerwu-gamma0 for completing the square or not."""
    bounded = given.get("levels") is not None or given.get("grid") is not None
    if given.pop("sequential", False):
        given["drift"] = "sequential"
    corrected = given.pop("correct_drift", None)
    if corrected is not None:
        given["drift"] = "correct" if corrected else "ignore"
    if not bounded and given.get("method") in ("cerwu", "cerwu-gamma0"):
        given["complete_square"] = given.pop("method") == "cerwu"
    return from_settings(**given)


def compress_flat(
    model: Any,
    output: Path,
    *,
    config: CompressionConfig | None = None,
    batches: Any = None,
    loss: Any = None,
    text: str | None = None,
    tokenizer: Any = None,
    hessian_cache: Path | None = None,
    verify: bool = True,
    **options: Any,
) -> Report:
    """`cerwu_gpu.compress` with what calibrates as arguments."""
    config = config or CompressionConfig()
    if batches is not None:
        data: Any = Batches(inputs=batches, loss=loss, seed=config.seed)
        config = replace(config, calibration=data)
    else:
        known = config.calibration
        assert isinstance(known, Calibration)
        source = known.source if text is None else Text(text)
        config = replace(config, calibration=replace(known, source=source, tokenizer=tokenizer))
    config = replace(config, hessian_cache=hessian_cache, verify=verify)
    return cerwu_gpu.compress(model, output, config=config, **options)
