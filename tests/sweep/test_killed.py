"""A sweep that is killed in the middle and started again, as real processes on a real model."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cerwu_gpu.sweep.table import read_table

ROOT = Path(__file__).resolve().parents[2]
GRID = (
    "--methods waterfilled,rtn --lmbda 1e-8,1e-7 --levels 8,16 --context-length 64 --max-windows 4"
)
FEW = "--samples 4 --sequence-length 64 --device cpu --quiet"
PATIENCE = 240
"""Seconds until a process that makes no progress fails the test."""


@pytest.fixture
def arguments(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """Model, texts and grid: the 260K stories where they are, else the toy."""
    folder = os.environ.get("CERWU_GPU_DATA")
    model: Path = (
        Path(folder) / "stories260k" if folder else request.getfixturevalue("toy_directory")
    )
    source = model / "stories.txt" if folder else request.getfixturevalue("toy_text")
    text = tmp_path / "text.txt"
    text.write_text(source.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    data = ["--text", str(text), "--calibration", str(text)]
    return ["sweep", str(model), *data, *GRID.split(), *FEW.split()]


def lines(table: Path) -> list[bytes]:
    """The whole lines of a table that may be in the making."""
    return table.read_bytes().splitlines(keepends=True) if table.exists() else []


@pytest.mark.slow
def test_killing_a_sweep_costs_no_finished_point(
    arguments: list[str], command: Callable[..., Any], tmp_path: Path
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-m", "cerwu_gpu", *arguments, "-o", killed],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    limit = time.monotonic() + PATIENCE
    while len(lines(killed / "sweep.jsonl")) < 2 and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    before = lines(killed / "sweep.jsonl")
    assert 2 <= len(before) < 4  # some but not all of the four points

    assert command(*arguments, "-o", killed).code == 0
    assert lines(killed / "sweep.jsonl")[: len(before)] == before
    assert command(*arguments, "-o", whole).code == 0
    assert read_table(killed / "sweep.jsonl") == read_table(whole / "sweep.jsonl")
    assert list((killed / "points").iterdir()) == []

    rows = read_table(whole / "sweep.jsonl")
    # The second lmbda finds the Hessians and sensitivities; reading them takes next to nothing.
    assert rows[0].preparation_seconds > 2 * rows[1].preparation_seconds
