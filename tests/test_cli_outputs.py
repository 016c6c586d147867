"""No command writes over what it reads, or over what cerwu_gpu did not write.

What is ours, and which places overlap, is tested in tests/container; here every command and every
thing that it reads meets these rules, on real directories.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import cerwu_gpu
from cerwu_gpu import OutputError
from cerwu_gpu.container.output import REPLACED
from cerwu_gpu.container.work import work_path
from tests.configs import compress_flat, configured
from tests.test_cli_wrong_input import Command, assert_refused, contents

FEW = ("--samples", "4", "--sequence-length", "32", "--quiet")
Compressed = tuple[Path, dict[str, Any]]


@pytest.fixture
def place(compressed: Compressed, toy_directory: Path, toy_text: Path, tmp_path: Path) -> Path:
    """A folder with a model, its compressed directory `small`, a text and something else."""
    shutil.copytree(toy_directory, tmp_path / "model")
    shutil.copytree(compressed[0], tmp_path / "small")
    shutil.copyfile(toy_text, tmp_path / "text.txt")
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    return tmp_path


OUTPUTS = {
    "over": "small",
    "over-by-a-link": "link",
    "inside": "small/plain",
    "inside-by-a-link": "link/plain",
    "around": ".",
    "around-by-dots": "small/..",
}


@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["plain", "overwrite"])
@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
def test_decompress_keeps_its_input_and_all_beside_it(
    output: str, options: Sequence[str], command: Command, place: Path
) -> None:
    (place / "link").symlink_to(place / "small")
    before = contents(place)
    for source in ("small", "link"):
        outcome = command("decompress", place / source, "-o", place / output, *options)
        assert_refused(outcome, "the compressed model", "choose another output")
    assert contents(place) == before
    with pytest.raises(OutputError, match="the compressed model"):
        cerwu_gpu.decompress(place / "small", place / output, overwrite=bool(options))
    assert contents(place) == before


def test_decompress_keeps_files_that_its_input_links_to(command: Command, place: Path) -> None:
    """As in a cache of the Hub, where a snapshot is links to blobs."""
    linked = place / "linked"
    linked.mkdir()
    for file in (place / "small").iterdir():
        (linked / file.name).symlink_to(file)
    before = contents(place)
    outcome = command("decompress", linked, "-o", place / "small", "--overwrite")
    assert_refused(outcome, "the compressed model", "lies in the output")
    assert contents(place) == before


READ: dict[str, tuple[tuple[str, ...], str]] = {
    "model-over": (("model", "-o", "model"), "is the model"),
    "model-inside": (("model", "-o", "model/small"), "lies in the model"),
    "model-around": (("model", "-o", "."), "lies in the output"),
    "model-by-a-link": (("model-link", "-o", "model"), "is the model"),
    "text-around": (
        ("model", "-o", "texts", "--calibration", "texts/text.txt"),
        "text.txt lies in",
    ),
    "text-linked": (("model", "-o", "texts", "--calibration", "text-link.txt"), "calibration text"),
    "cache-inside": (("model", "-o", "cache/out", "--hessian-cache", "cache"), "Hessian cache"),
    "cache-around": (("model", "-o", "out", "--hessian-cache", "out/new"), "Hessian cache"),
    "cache-over": (("model", "-o", "new", "--hessian-cache", "new"), "is the Hessian cache"),
    "cache-in-work": (
        ("model", "-o", "out", "--hessian-cache", ".out.work/hessians"),
        "lies in the work directory",
    ),
    "report-around": (("model", "-o", "out", "--report", "out/report"), "lies in the output"),
    "report-in-work": (("model", "-o", "out", "--report", ".out.work"), "the work directory"),
    "model-in-work": ((".out.work/model", "-o", "out"), "lies in the work directory"),
    "grid-around": (("model", "-o", "texts", "--grid", "texts/grid.txt"), "the grid"),
    "grid-in-work": (("model", "-o", "out", "--grid", ".out.work/grid.txt"), "the grid"),
}


@pytest.mark.parametrize("case", READ)
def test_compress_keeps_what_it_reads(
    case: str, command: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "texts").mkdir()
    shutil.copyfile(place / "text.txt", place / "texts" / "text.txt")
    (place / ".out.work").mkdir()
    for folder in ("texts", ".out.work"):
        (place / folder / "grid.txt").write_text("-1 0 1", encoding="utf-8")
    (place / "text-link.txt").symlink_to(place / "texts" / "text.txt")
    (place / "model-link").symlink_to(place / "model")
    (place / "elsewhere").mkdir()
    shutil.copytree(place / "model", place / ".out.work" / "model")
    monkeypatch.chdir(place / "elsewhere")
    before = contents(place)
    words, part = READ[case]
    paths = {word for word in words if not word.startswith("-")}
    arguments = [str(place / word) if word in paths else word for word in words]
    if "--calibration" not in words:
        arguments += ["--calibration", str(place / "text.txt")]
    for more in ((), ("--overwrite",)):
        assert_refused(command("compress", *arguments, *FEW, *more), part)
    assert contents(place) == before


@pytest.mark.parametrize("foreign", ["link", "directory"])
def test_a_foreign_work_directory_is_kept(foreign: str, command: Command, place: Path) -> None:
    work = work_path(place / "out")
    if foreign == "link":
        (place / "photos").mkdir()
        work.symlink_to(place / "photos")
    else:
        work.mkdir()
    (work / "photo.jpg").write_text("mine", encoding="utf-8")
    before = contents(place)
    for more in ((), ("--restart",)):
        options = ("-o", place / "out", "--calibration", place / "text.txt", *FEW, *more)
        assert_refused(command("compress", place / "model", *options), str(work), "move it away")
    assert contents(place) == before


def notes(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_text("mine", encoding="utf-8")


def dense(folder: Path) -> None:
    folder.mkdir()
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")


def with_repository(folder: Path) -> None:
    shutil.copytree(folder.parent / "small", folder)
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("mine", encoding="utf-8")


@pytest.mark.parametrize("fill", [notes, dense, with_repository])
def test_overwrite_never_replaces_what_is_not_ours(
    fill: Callable[[Path], None], command: Command, place: Path
) -> None:
    output = place / "out"
    fill(output)
    before = contents(place)
    options = ("-o", output, "--overwrite")
    text = ("--calibration", place / "text.txt", *FEW)
    refusal = (str(output), "replaces nothing but compressed models")
    assert_refused(command("compress", place / "model", *options, *text), *refusal)
    assert_refused(command("decompress", place / "small", *options), *refusal)
    with pytest.raises(OutputError, match="nothing but compressed models"):
        compress_flat(
            nn.Sequential(nn.Linear(16, 16)),
            output,
            batches=[torch.randn(64, 16)],
            config=configured(sensitivity="none"),
            overwrite=True,
            progress=False,
        )
    assert contents(place) == before


def test_decompress_replaces_another_compressed_model_on_request(
    command: Command, place: Path
) -> None:
    shutil.copytree(place / "small", place / "other")
    options = ("-o", place / "other")
    assert_refused(command("decompress", place / "small", *options), "pass --overwrite")
    assert command("decompress", place / "small", *options, "--overwrite").code == 0
    config = json.loads((place / "other" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    assert contents(place / "small")["config.json"] is not None


LOOK_ALIKE = json.dumps(
    {k: "mine" for k in ("model", "output", "finished", "layers", "settings", "machine")}
).encode()


@pytest.mark.parametrize("name", ["report.json", "report.html"])
@pytest.mark.parametrize(
    "content", [b'{"tests": 12}', LOOK_ALIKE, b"<!DOCTYPE html><p>mine", b"\xff", b""]
)
def test_a_foreign_report_is_kept(name: str, content: bytes, command: Command, place: Path) -> None:
    """Beside the output by its name, or in a folder where another tool has its report."""
    (place / "reports").mkdir()
    for path in (place / f"out.{name}", place / "reports" / name):
        path.write_bytes(content)
        before = contents(place)
        where = ("--report", place / "reports") if path.parent.name == "reports" else ()
        options = ("-o", place / "out", "--calibration", place / "text.txt", *FEW, *where)
        outcome = command("compress", place / "model", *options)
        assert_refused(outcome, str(path), "no report of cerwu_gpu")
        assert contents(place) == before
        path.unlink()


def test_a_pipe_in_the_place_of_a_report_is_refused(command: Command, place: Path) -> None:
    os.mkfifo(place / "out.report.json")
    options = ("-o", place / "out", "--calibration", place / "text.txt", *FEW)
    assert_refused(command("compress", place / "model", *options), "no report of cerwu_gpu")
    assert not (place / "out").exists()


def test_a_report_that_came_while_a_run_worked_is_kept(
    command: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cerwu_gpu.container.writer import DirectoryWriter

    publish, report = DirectoryWriter.publish, place / "out.report.json"

    def published(writer: DirectoryWriter) -> None:
        publish(writer)
        report.write_text("{}", encoding="utf-8")

    monkeypatch.setattr(DirectoryWriter, "publish", published)
    options = ("-o", place / "out", "--calibration", place / "text.txt", *FEW)
    outcome = command("compress", place / "model", *options)
    assert outcome.code == 0  # the result counts
    assert "there is no report: " in outcome.out and "no report of cerwu_gpu" in outcome.out
    assert report.read_text(encoding="utf-8") == "{}"
    cerwu_gpu.verify(place / "out")


def test_an_old_output_goes_back_before_the_work_begins(
    command: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "small").rename(place / f".small.0123abcd{REPLACED}")
    monkeypatch.setattr("cerwu_gpu.api.load_kind", None)
    options = ("-o", place / "small", "--calibration", place / "text.txt", *FEW)
    assert_refused(command("compress", place / "model", *options), "not empty")
    cerwu_gpu.verify(place / "small")


def test_our_own_report_is_replaced(command: Command, place: Path) -> None:
    options = ("-o", place / "out", "--calibration", place / "text.txt", *FEW)
    reports = []
    for more in ((), ("--overwrite", "--lmbda", "1e-7")):
        assert command("compress", place / "model", *options, *more).code == 0
        reports.append((place / "out.report.json").read_bytes())
    assert reports[0] != reports[1]


SWEEPS: dict[str, tuple[tuple[str, ...], str]] = {
    "in-the-model": (("model", "-o", "model/sweep"), "lies in the model"),
    "around-the-model": (("model", "-o", "."), "lies in the output"),
    "around-the-text": (("model", "-o", "sweep", "--text", "sweep/points/x"), "evaluation text"),
    "around-the-calibration": (
        ("model", "-o", "sweep", "--calibration", "sweep/points/x"),
        "calibration text",
    ),
}


@pytest.mark.parametrize("case", SWEEPS)
def test_sweep_keeps_what_it_reads(case: str, command: Command, place: Path) -> None:
    (place / "sweep" / "points").mkdir(parents=True)
    shutil.copyfile(place / "text.txt", place / "sweep" / "points" / "x")
    (place / "sweep" / "sweep.json").write_text('{"cerwu_gpu": "0"}', encoding="utf-8")
    before = contents(place)
    words, part = SWEEPS[case]
    arguments = [word if word.startswith("-") else str(place / word) for word in words]
    for option in ("--text", "--calibration"):
        if option not in words:
            arguments += [option, str(place / "text.txt")]
    assert_refused(command("sweep", *arguments, "--quiet"), part)
    assert contents(place) == before
