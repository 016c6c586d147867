"""scripts/plot.py: which pictures are drawn from which tables, what is in them, wrong input."""

import importlib
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.sweep.points import Axes, grid_points
from cerwu_gpu.sweep.run import run_sweep
from cerwu_gpu.sweep.table import Row, SweepTable
from tests.sweep.measured import OneMatrix

ROOT = Path(__file__).resolve().parents[2]
matplotlib = pytest.importorskip("matplotlib")
with pytest.MonkeyPatch.context() as patch:
    # The script puts the checkout in place of its own folder, the first entry.
    patch.setattr(sys, "path", [str(ROOT), *sys.path])
    plot = importlib.import_module("scripts.plot")
    pictures = importlib.import_module("scripts.plot_pictures")

AXES = Axes(
    systems=("waterfilled", "cerwu", "rtn"),
    quantizers=("scalar", "trellis8"),
    lmbdas=(1e-4, 1e-3, 1e-2),
    levels=(5, 17),
    uniform_lmbdas=(1e-4,),
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    points = grid_points(AXES, CompressionConfig())
    return run_sweep(OneMatrix(), points, tmp_path_factory.mktemp("plot"))


def table(path: Path, rows: Sequence[Row], **changes: Any) -> Path:
    written = SweepTable(path)
    for row in rows:
        written.append(replace(row, **changes))
    return path


def language(rows: Sequence[Row]) -> list[Row]:
    """The same points as if they were of a language model."""
    return [
        replace(
            row,
            subject="model",
            fingerprint="other",
            measure="perplexity",
            quality=math.inf if row.levels == 5 else 20 * math.exp(5 * (1 - row.quality)),
            original_quality=20.0,
            original_bytes=10**8,
        )
        for row in rows
    ]


def test_all_pictures_of_several_networks(
    rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = [
        table(tmp_path / "matrix.jsonl", rows),
        table(tmp_path / "model.jsonl", language(rows)),
    ]
    assert plot.main([*map(str, tables), "-o", str(tmp_path / "pictures")]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.stem for path in written] == ["rate", "minimum", "time", "language"]
    for path in written:
        image = matplotlib.image.imread(path)
        assert image.shape[0] > 300 and image.shape[1] > 500
        assert image[..., :3].std() > 0.05  # not blank
    assert sorted((tmp_path / "pictures").iterdir()) == sorted(written)


def test_no_language_model_no_picture_of_it(
    rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path / "matrix.jsonl", rows)
    options = ["--pictures", "rate", "language", "--prefix", "a-", "--methods", "rtn"]
    assert plot.main([str(path), "-o", str(tmp_path), *options]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "a-rate.png")]


def test_a_picture_shows_the_fronts_and_the_original(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(pictures.pyplot, "close", figures.append)
    pictures.draw_rate({"matrix": rows}, tmp_path / "rate.png")
    axes = figures[0].axes[0]
    lines = [line.get_xydata().tolist() for line in axes.get_lines()]
    for own in pictures.by_label(rows).values():
        front = [[row.bits_per_weight, row.quality] for row in pictures.front_rows(own)]
        assert front in lines
    assert [[0.0, 1.0], [1.0, 1.0]] in lines  # the original's quality, all along
    names = {text.get_text() for text in axes.get_legend().get_texts()}
    assert names == {row.label for row in rows}
    monkeypatch.undo()
    pictures.pyplot.close(figures[0])


def test_first_and_later_seconds(rows: list[Row]) -> None:
    label = rows[0].label
    later = pictures.later_seconds(rows, label)
    assert later == 0.25  # measured.OneMatrix
    assert pictures.first_seconds(rows, label) == later + 1.0
    uncalibrated = [replace(row, qp=-20, label="nncodec") for row in rows]
    assert pictures.first_seconds(uncalibrated, "nncodec") == later


@given(places=st.lists(st.floats(0, 1), max_size=8).map(sorted))
def test_names_beside_a_panel_do_not_overlap(places: list[float]) -> None:
    moved = pictures.spread(places, 0.1)
    assert len(moved) == len(places)
    assert all(after - before >= 0.1 - 1e-9 for before, after in pairwise(moved))
    if all(after - before >= 0.1 for before, after in pairwise(places)):
        assert moved == pytest.approx(places)


@pytest.mark.parametrize(
    ("tables", "options", "part"),
    [
        (("missing.jsonl",), (), "missing.jsonl"),
        (("empty.jsonl",), (), "no finished point"),
        (("text.jsonl",), (), "no table of a sweep"),
        (("matrix.jsonl", "other.jsonl"), (), "differ in weights or data"),
        (("matrix.jsonl",), ("--methods", "gptq"), "gptq"),
    ],
    ids=["missing", "empty", "text", "mixed", "method"],
)
def test_wrong_input_is_one_sentence(
    rows: list[Row],
    tables: Sequence[str],
    options: Sequence[str],
    part: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table(tmp_path / "matrix.jsonl", rows)
    table(tmp_path / "other.jsonl", rows, fingerprint="other")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "text.jsonl").write_text("a,b\n1,2\n")
    paths = [str(tmp_path / name) for name in tables]
    assert plot.main([*paths, "-o", str(tmp_path / "pictures"), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1 and part in err
    assert not (tmp_path / "pictures").exists()
