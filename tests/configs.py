"""Configurations of flat settings, and `compress` with calibration data as arguments."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cerwu_gpu
from cerwu_gpu import Report
from cerwu_gpu.config import Batches, Calibration, CompressionConfig, Text, from_settings
from cerwu_gpu.container.journal import Journal
from tests.conftest import TEXT


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


def toy_calibration(tokenizer: Any) -> Calibration:
    """Return calibration by six short windows of the tests' text."""
    return Calibration(
        source=Text(TEXT * 8), tokenizer=tokenizer, samples=6, sequence_length=32, batch_size=2
    )


def check_resumed(run: Callable[[Path], Any], folder: Path) -> None:
    """Check that a run that is interrupted before its second block is written is continued there,
    and ends in the bytes of a whole run."""
    run(folder / "whole")
    write, written = Journal.write, []

    def interrupted(self: Journal, index: int, weights: Any) -> None:
        written.append(index)
        if len(written) == 2:
            raise KeyboardInterrupt
        write(self, index, weights)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Journal, "write", interrupted)
        with pytest.raises(KeyboardInterrupt, match="keeps what is finished"):
            run(folder / "resumed")
        patched.setattr(Journal, "write", lambda *given: (written.append(given[1]), write(*given)))
        run(folder / "resumed")
    assert written[1] == written[2] != written[0]
    name = "model.safetensors"
    assert (folder / "resumed" / name).read_bytes() == (folder / "whole" / name).read_bytes()


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
