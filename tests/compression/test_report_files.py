"""What a compression leaves beside its output, and that it can be repeated from it."""

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cerwu_gpu
from cerwu_gpu.config import from_settings
from cerwu_gpu.container.breakdown import breakdown
from cerwu_gpu.report_page.page import page
from tests.configs import compress_flat, configured
from tests.hf.toys import toy

FEW = ("--samples", "4", "--sequence-length", "32", "--quiet")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_report_lies_beside_the_output(compressed: tuple[Path, dict[str, Any]]) -> None:
    output, printed = compressed
    report = json.loads((output.parent / "small.report.json").read_text(encoding="utf-8"))
    assert {name: report[name] for name in printed} == printed
    assert sum(report["bytes"].values()) == report["directory_bytes"]
    assert report["bytes"] == breakdown(output)
    assert report["settings"]["samples"] == 4
    assert "samples" in report["changed"]
    drawn = (output.parent / "small.report.html").read_text(encoding="utf-8")
    assert drawn == page(report)
    for layer in report["layers"]:
        assert 0 <= layer["limit_bits"] < layer["bits_per_weight"]
    assert not [path for path in output.iterdir() if "report" in path.name]


def test_its_command_gives_the_same_bytes(
    command: Callable[..., Any], toy_directory: Path, toy_text: Path, tmp_path: Path
) -> None:
    settings = ("--grid=-1.5,-0.5,0,0.5,1.5", "--sensitivity", "none", "--lmbda", "1e-5")
    chosen = ("--include", "*.mlp.*", "--include", "*.q_proj.*", "--exclude", "*.layers.0.*")
    where = ("-o", tmp_path / "first one", "--calibration", toy_text, "--report", tmp_path / "said")
    outcome = command("compress", toy_directory, *where, *settings, *chosen, *FEW, "--card")
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first one", "said"]
    assert sorted(content(tmp_path / "said")) == ["report.html", "report.json"]
    report = json.loads((tmp_path / "said" / "report.json").read_text(encoding="utf-8"))
    first = content(tmp_path / "first one")
    program, *words = shlex.split(report["command"])
    assert program == "cerwu-gpu"
    assert command(*words, "--overwrite", "--quiet").code == 0
    assert content(tmp_path / "first one") == first
    assert len(first) > 3


def test_what_python_hands_over_has_no_command_but_its_settings(
    toy_tokenizer: Any, toy_text: Path, tmp_path: Path
) -> None:
    config = configured(lmbda=1e-4, samples=2, sequence_length=32, limit_columns=0)
    compress_flat(
        toy("llama"),
        tmp_path / "out",
        config=config,
        tokenizer=toy_tokenizer,
        text=toy_text.read_text(encoding="utf-8"),
        progress=False,
    )
    report = json.loads((tmp_path / "out.report.json").read_text(encoding="utf-8"))
    assert report["command"] is None
    assert report["model"] is None
    made = eval(report["python"], {"from_settings": from_settings})
    assert (made.lmbda, made.text.samples, made.limit_columns) == (1e-4, 2, 0)
    assert {layer["limit_bits"] for layer in report["layers"]} == {None}


def test_a_place_that_cannot_be_is_refused_before_anything_is_done(
    command: Callable[..., Any], toy_directory: Path, toy_text: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "out.report.html").mkdir()
    start = ("compress", toy_directory, "-o", tmp_path / "out", "--calibration", toy_text, *FEW)
    for options, part in (
        (("--report", tmp_path / "out" / "report"), "lies in the output"),
        (("--report", tmp_path / "file"), "is a file"),
        ((), "is a directory"),
    ):
        outcome = command(*start, *options)
        assert outcome.code == 2
        assert part in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_report_that_cannot_be_written_leaves_the_model(
    toy_tokenizer: Any, toy_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if ".report." in Path(target).name:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("cerwu_gpu.container.output.os.replace", full)
    report = compress_flat(
        toy("llama"),
        tmp_path / "out",
        config=configured(lmbda=1e-4, samples=2, sequence_length=32),
        tokenizer=toy_tokenizer,
        text=toy_text.read_text(encoding="utf-8"),
        progress=False,
    )
    assert report.events[-1].startswith("there is no report: ")
    assert "No space left" in report.events[-1]
    monkeypatch.undo()
    cerwu_gpu.verify(tmp_path / "out")
