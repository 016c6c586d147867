"""cerwu-gpu sweep from end to end, and wrong input to it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cerwu_gpu.sweep.table import read_table

ROOT = Path(__file__).resolve().parents[1]
Command = Callable[..., Any]


@pytest.fixture
def sweep(command: Command, toy_directory: Path, toy_text: Path, tmp_path: Path) -> Command:
    """`cerwu-gpu sweep` of the toy into tmp_path/sweep, with these options."""
    texts = ("--text", toy_text, "--calibration", toy_text, "--context-length", 64)
    few = ("--max-windows", 3, "--samples", 4, "--sequence-length", 32, "--device", "cpu")

    def run(*options: str | Path) -> Any:
        output = () if "-o" in options else ("-o", tmp_path / "sweep")
        return command("sweep", toy_directory, *output, *texts, *few, "--quiet", *options)

    return run


GRID = ("--methods", "waterfilled,rtn", "--lmbda", "1e-7, 1e-6", "--levels", "3,15")


def test_a_sweep_ends_with_its_tables(sweep: Command, tmp_path: Path) -> None:
    code, out, _ = sweep(*GRID)
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[2:7]] == [
        "waterfilled",
        "waterfilled",
        "rtn",
        "rtn",
        "original",
    ]
    assert "fewest bits at" in out
    assert "1.01x the perplexity" in out
    assert "calibration and sensitivities" in out
    assert out.rstrip().endswith(str(tmp_path / "sweep" / "sweep.jsonl"))


def test_json_has_points_fronts_and_minimum(sweep: Command, tmp_path: Path) -> None:
    sweep(*GRID[:4], "--levels", "3")
    before = (tmp_path / "sweep" / "sweep.jsonl").read_bytes()
    summary = json.loads(sweep(*GRID, "--json").out)
    rows = read_table(tmp_path / "sweep" / "sweep.jsonl")
    assert (tmp_path / "sweep" / "sweep.jsonl").read_bytes().startswith(before)
    assert summary["points"] == [row.record() for row in rows]
    keys = {row.label: {r.point for r in rows if r.label == row.label} for row in rows}
    assert summary["fronts"].keys() == keys.keys() == {"waterfilled scalar", "rtn"}
    assert all(set(front) <= keys[label] for label, front in summary["fronts"].items())
    assert [each["target"] for each in summary["minimum"]] == [1.01, 1.05, 2.0] * 2
    assert summary["original_quality"] == rows[0].original_quality
    assert summary["seconds"]["first_point"] == rows[0].total_seconds
    assert summary["seconds"]["later_points"] == rows[1].total_seconds
    assert summary["seconds"]["later_compressions"] == rows[1].compression_seconds
    assert summary["seconds"]["later_compressions"] < summary["seconds"]["later_points"]


def test_distilled_points_join_a_table(sweep: Command, tmp_path: Path) -> None:
    few = ("--methods", "waterfilled", "--lmbda", "1e-5")
    assert sweep(*few).code == 0
    code, out, err = sweep(*few, "--distill", "0,3")
    assert code == 0, err
    rows = read_table(tmp_path / "sweep" / "sweep.jsonl")
    assert [(row.distill, row.seconds["distill"] > 0) for row in rows] == [(0, False), (3, True)]
    assert "waterfilled scalar, distilled 3" in out


WRONG: tuple[tuple[Sequence[str], str], ...] = (
    (("--methods", "gptq"), "gptq"),
    (("--distill", "-1"), "distill"),
    (("--methods", "waterfilled,"), "methods"),
    (("--quantizer", "trellis64"), "trellis64"),
    (("--lmbda", "1e-9,small"), "lmbda"),
    (("--lmbda", "-1"), "lmbda"),
    (("--lmbda", "nan"), "lmbda"),
    (("--uniform-lmbda", ""), "uniform_lmbda"),
    (("--levels", "16.5"), "levels"),
    (("--levels", "1"), "levels"),
    (("--scale", "per-column"), "per-column"),
    (("--rate-model", "laplace"), "laplace"),
    (("--sensitivity", "rows"), "rows"),
    (("--head", "maybe"), "maybe"),
    (("--qp", "low"), "qp"),
    (("--samples", "0"), "samples"),
    (("--max-windows", "0"), "max_windows"),
    (("--context-length", "1"), "context_length"),
    (("--include", "no.such.weight"), "no.such.weight"),
    (("--text", "no-such-text.txt"), "no-such-text.txt"),
    (("--calibration", "no-such-text.txt"), "no-such-text.txt"),
    (("--device", "no-such-device"), "no-such-device"),
)


@pytest.mark.parametrize(("options", "part"), WRONG, ids=lambda value: " ".join(value))
def test_wrong_input_is_one_sentence(
    sweep: Command, options: Sequence[str], part: str, tmp_path: Path
) -> None:
    code, out, err = sweep(*options)
    assert code == 2, err
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("cerwu-gpu: ") and err.strip().endswith(".")
    assert part in err
    assert not (tmp_path / "sweep" / "sweep.jsonl").exists()


def test_another_text_is_refused(sweep: Command, tmp_path: Path) -> None:
    sweep("--methods", "rtn", "--levels", "3")
    other = tmp_path / "other.txt"
    other.write_text("Something else is written here, and it is long enough. " * 20)
    code, out, err = sweep("--methods", "rtn", "--levels", "3", "--text", other)
    assert (code, out) == (2, "")
    assert "another evaluation text" in err


def test_a_folder_with_something_else_is_refused(sweep: Command, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").touch()
    code, _, err = sweep("-o", tmp_path)
    assert code == 2
    assert "something else" in err


def test_the_script_is_the_command(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "sweep.py", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "Usage: cerwu-gpu sweep" in result.stdout
