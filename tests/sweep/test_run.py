"""A sweep's table: what was finished stays, whatever happens to the run."""

import errno
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.errors import OutputError
from cerwu_gpu.sweep import run as module
from cerwu_gpu.sweep.points import Axes, Point, grid_points
from cerwu_gpu.sweep.run import run_sweep
from cerwu_gpu.sweep.subject import Outcome
from cerwu_gpu.sweep.table import START, Row, SweepTable, read_table, write_parquet
from tests.sweep.measured import OneMatrix

AXES = Axes(
    systems=("waterfilled", "cerwu", "rtn"),
    lmbdas=(1e-3, 1e-2),
    levels=(9, 17),
    uniform_lmbdas=(1e-3,),
)


@pytest.fixture
def points() -> list[Point]:
    return grid_points(AXES, CompressionConfig())


def test_every_point_has_a_row_and_the_table_reads_back(
    points: list[Point], tmp_path: Path
) -> None:
    subject = OneMatrix()
    rows = run_sweep(subject, points, tmp_path / "sweep")
    assert [row.point for row in rows] == [point.key for point in points]
    assert [row.label for row in rows] == [point.label for point in points]
    read = read_table(tmp_path / "sweep" / "sweep.jsonl")
    assert read == rows
    assert [row.seconds for row in read] == [row.seconds for row in rows]
    assert rows[0].preparation_seconds == 1.0 and rows[0].total_seconds == 1.25
    assert rows[0].events == "it has two lines. and, a comma."
    assert subject.judged == 1
    assert list((tmp_path / "sweep" / "points").iterdir()) == []


def test_a_finished_point_is_not_repeated_and_further_ones_join(
    points: list[Point], tmp_path: Path
) -> None:
    run_sweep(OneMatrix(), points[:3], tmp_path)
    again = OneMatrix()
    rows = run_sweep(again, points, tmp_path)
    assert again.ran == points[3:]
    assert again.judged == 0  # the table knows
    assert rows == run_sweep(OneMatrix(), points, tmp_path / "other")
    third = OneMatrix()
    assert run_sweep(third, points[2:4], tmp_path) == rows[2:4]
    assert third.ran == []


def test_a_run_that_fails_keeps_what_was_finished(points: list[Point], tmp_path: Path) -> None:
    class Dying(OneMatrix):
        def run(self, point: Point, folder: Path) -> Outcome:
            if len(self.ran) == 3:
                folder.mkdir()
                (folder / "half").touch()
                raise KeyboardInterrupt
            return super().run(point, folder)

    with pytest.raises(KeyboardInterrupt):
        run_sweep(Dying(), points, tmp_path)
    assert len(read_table(tmp_path / "sweep.jsonl")) == 3
    assert run_sweep(OneMatrix(), points, tmp_path) == run_sweep(
        OneMatrix(), points, tmp_path / "whole"
    )


def test_directories_stay_on_request(points: list[Point], tmp_path: Path) -> None:
    run_sweep(OneMatrix(), points[:2], tmp_path, keep=True)
    rows = run_sweep(OneMatrix(), points, tmp_path, keep=True)
    for row in rows:
        files = (tmp_path / "points" / row.point).iterdir()
        assert sum(file.stat().st_size for file in files) == row.directory_bytes


def test_directories_that_were_kept_stay(points: list[Point], tmp_path: Path) -> None:
    """A later run without `keep` adds none, and takes none away; nor anything else."""
    run_sweep(OneMatrix(), points[:2], tmp_path, keep=True)
    folder = tmp_path / "points"
    (folder / "notes.txt").write_text("mine")
    (folder / "photos").mkdir()
    (folder / f"{points[3].key}.partial").symlink_to(folder / "photos")
    (folder / "photos" / "photo.jpg").touch()
    kept = sorted(folder.rglob("*"))
    (folder / f"{points[2].key}.partial").mkdir()  # of a run that died
    (folder / f".{points[2].key}.partial.abcd_123.partial").mkdir()
    run_sweep(OneMatrix(), points[:3], tmp_path)
    assert sorted(folder.rglob("*")) == kept


def test_directories_that_were_kept_stay_where_the_table_is_gone(
    points: list[Point], tmp_path: Path
) -> None:
    run_sweep(OneMatrix(), points[:2], tmp_path, keep=True)
    folder = tmp_path / "points"

    def state() -> set[tuple[Path, int, int]]:
        return {(path, path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}

    kept = state()
    (tmp_path / "sweep.jsonl").unlink()
    run_sweep(OneMatrix(), points[1:3], tmp_path)
    run_sweep(OneMatrix(), points[:1], tmp_path, keep=True)
    assert state() == kept


def test_the_second_of_two_sweeps_is_refused(points: list[Point], tmp_path: Path) -> None:
    class Meeting(OneMatrix):
        def run(self, point: Point, folder: Path) -> Outcome:
            with pytest.raises(OutputError, match="another process"):
                run_sweep(OneMatrix(), points[1:], tmp_path)
            return super().run(point, folder)

    assert len(run_sweep(Meeting(), points[:1], tmp_path, keep=True)) == 1
    assert (tmp_path / "points" / points[0].key / "words").is_file()


def test_a_folder_that_could_not_be_begun_can_be_begun_again(
    points: list[Point], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("cerwu_gpu.container.output.os.replace", full)
    with pytest.raises(OutputError, match="free some space"):
        run_sweep(OneMatrix(), points[:1], tmp_path / "sweep")
    monkeypatch.undo()
    assert len(run_sweep(OneMatrix(), points[:1], tmp_path / "sweep")) == 1


def test_another_subject_is_refused_by_name_of_the_difference(
    points: list[Point], tmp_path: Path
) -> None:
    run_sweep(OneMatrix(), points[:1], tmp_path)
    before = (tmp_path / "sweep.jsonl").read_bytes()
    other = OneMatrix(seed=1)
    with pytest.raises(OutputError, match="another weights: choose another directory"):
        run_sweep(other, points, tmp_path)
    assert other.ran == []
    assert (tmp_path / "sweep.jsonl").read_bytes() == before
    run_sweep(OneMatrix(), points, tmp_path)  # sweep.json was not touched


def test_folders_that_hold_something_else_are_refused(points: list[Point], tmp_path: Path) -> None:
    (tmp_path / "letter.txt").touch()
    with pytest.raises(OutputError, match="something else"):
        run_sweep(OneMatrix(), points, tmp_path)
    with pytest.raises(OutputError, match="is a file"):
        run_sweep(OneMatrix(), points, tmp_path / "letter.txt")


@pytest.mark.parametrize("identity", ["", "[]", '{"program": "train.py", "method": "bayes"}'])
def test_a_sweep_of_another_tool_is_refused(
    identity: str, points: list[Point], tmp_path: Path
) -> None:
    (tmp_path / "sweep.json").write_text(identity)
    (tmp_path / "points").mkdir()
    (tmp_path / "points" / points[0].key).mkdir()
    with pytest.raises(OutputError, match="something else"):
        run_sweep(OneMatrix(), points, tmp_path)
    assert (tmp_path / "points" / points[0].key).is_dir()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], bytes]:
    """The rows of a finished sweep, and its table."""
    folder = tmp_path_factory.mktemp("whole")
    rows = run_sweep(OneMatrix(), grid_points(AXES, CompressionConfig()), folder)
    return rows, (folder / "sweep.jsonl").read_bytes()


@given(cut=st.integers(0, 10**6))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_table_torn_anywhere_keeps_its_whole_rows(
    cut: int, whole: tuple[list[Row], bytes], tmp_path: Path
) -> None:
    rows, content = whole
    torn = tmp_path / "torn.jsonl"
    length = cut % len(content)
    torn.write_bytes(content[:length])
    whole_rows = content[:length].count(b"\n")
    assert read_table(torn) == rows[:whole_rows]
    assert len(torn.read_bytes()) == length  # reading changes nothing
    table = SweepTable(torn)
    assert table.rows == rows[:whole_rows]
    for row in rows[len(table.rows) :]:
        table.append(row)
    assert torn.read_bytes() == content


def test_a_row_is_on_the_disk_before_the_next_point_begins(
    points: list[Point], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cerwu_gpu.sweep import table

    synced: list[int] = []
    monkeypatch.setattr(table.os, "fsync", synced.append)

    class Looking(OneMatrix):
        def run(self, point: Point, folder: Path) -> Outcome:
            found = tmp_path / "sweep.jsonl"
            assert len(read_table(found) if found.exists() else []) == len(self.ran)
            assert len(synced) >= len(self.ran)
            return super().run(point, folder)

    run_sweep(Looking(), points, tmp_path)


def test_a_full_disk_is_told(
    points: list[Point], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cerwu_gpu.sweep import table

    rows = run_sweep(OneMatrix(), points[:2], tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    opened = SweepTable(tmp_path / "sweep.jsonl")
    monkeypatch.setattr(table.os, "fsync", full)
    with pytest.raises(OutputError, match="free some space"):
        opened.append(rows[0])
    assert opened.rows == rows


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda text: text.replace('"subject"', '"topic"', 1), "no table of a sweep"),
        (lambda text: text.replace('"levels"', '"steps"', 1), "line 1"),
        (lambda text: text.replace('"keep_head": false', '"keep_head": 0', 1), "line 1"),
        (lambda text: text.replace('"accuracy"', '"beauty"', 1), "line 1"),
        (lambda text: text.replace('"levels": 9', '"levels": true', 1), "line 3"),
        (lambda text: text.replace('"quantize": ', '"nap": ', 1), "line 1"),
        (lambda text: text.replace("}}", "}", 1), "line 1"),
        (lambda text: text + '{"subject": "matrix"}\n', "line 7"),
        (lambda text: text + "[]\n", "line 7"),
        (lambda text: text + 100_000 * "[" + "\n", "line 7"),
        (lambda text: text + "\n", "line 7"),
    ],
    ids=[
        *("subject", "columns", "truth", "measure", "levels", "stages", "brace", "short"),
        *("list", "deep", "empty"),
    ],
)
def test_a_damaged_table_is_refused(
    points: list[Point], tmp_path: Path, damage: Callable[[str], str], part: str
) -> None:
    run_sweep(OneMatrix(), points, tmp_path)
    path = tmp_path / "sweep.jsonl"
    path.write_text(damage(path.read_text()))
    with pytest.raises(OutputError, match=part):
        run_sweep(OneMatrix(), points, tmp_path)


def test_a_table_torn_in_its_first_line_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    path.write_bytes(START[:-1])
    assert SweepTable(path).rows == []
    assert path.read_bytes() == b""


@pytest.mark.parametrize("content", [b"mine", b"mine\n", b"\xff\n", b"\xff"])
def test_a_file_that_is_no_table_is_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    path.write_bytes(content)
    with pytest.raises(OutputError, match="name another file"):
        SweepTable(path)
    assert path.read_bytes() == content


def test_a_quality_that_is_no_number_is_null(points: list[Point], tmp_path: Path) -> None:
    (row,) = run_sweep(OneMatrix(), points[:1], tmp_path / "sweep")
    table = SweepTable(tmp_path / "sweep.jsonl")
    table.append(replace(row, quality=math.inf, lmbda=0))
    line = (tmp_path / "sweep.jsonl").read_text()
    record = json.loads(line, parse_constant=pytest.fail)
    assert record["quality"] is None
    assert record == {**row.record(), "quality": None, "lmbda": 0}
    (read,) = read_table(tmp_path / "sweep.jsonl")
    assert math.isnan(read.quality)
    assert replace(read, quality=row.quality, lmbda=row.lmbda) == row


def test_parquet_has_the_same_cells(points: list[Point], tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = run_sweep(OneMatrix(), points, tmp_path)
    found = parquet.read_table(tmp_path / "sweep.parquet").to_pylist()
    assert found == [row.record() for row in rows]


def test_no_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cerwu_gpu.sweep import table

    monkeypatch.setattr(table, "find_spec", lambda name: None)
    assert not write_parquet([], tmp_path / "sweep.parquet")
    assert list(tmp_path.iterdir()) == []


def test_another_version_is_another_table(
    points: list[Point], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_sweep(OneMatrix(), points[:1], tmp_path)
    monkeypatch.setattr(module, "__version__", "99")
    with pytest.raises(OutputError, match="another cerwu_gpu"):
        run_sweep(OneMatrix(), points[:1], tmp_path)


def test_stages_are_known(points: list[Point], tmp_path: Path) -> None:
    outcome = OneMatrix().run(points[0], tmp_path / "point")
    with pytest.raises(ValueError, match="nap"):
        replace(outcome, seconds={"nap": 1.0})
