"""The results of a sweep: a CSV file that holds every finished point, whatever happens to the run.

One row per point; a row is appended, flushed and synced to the disk before the next point begins.
No cell contains a line break, so that a row whose line break is missing was torn by a dying run.
"""

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from cerwu_gpu.errors import OutputError
from cerwu_gpu.files import atomic
from cerwu_gpu.sweep.points import Point
from cerwu_gpu.sweep.subject import JUDGEMENT, PREPARATION, STAGES, Outcome, Quality


@dataclass(frozen=True, kw_only=True)
class Row:
    """One finished point; the settings are None where the method does not know them."""

    subject: str
    fingerprint: str
    point: str
    label: str
    method: str
    quantizer: str | None
    levels: int | None
    lmbda: float | None
    rate_model: str | None
    scale: str | None
    sensitivity: str | None
    correct_drift: bool
    keep_head: bool
    qp: int | None
    bits_per_weight: float
    directory_bytes: int
    original_bytes: int
    measure: Quality
    quality: float
    original_quality: float
    events: str
    """Sentences one after the other."""
    seconds: Mapping[str, float] = field(compare=False)
    """Stage (STAGES) -> seconds; two runs with the same results are equal without them."""

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def preparation_seconds(self) -> float:
        """Seconds for what all later points share."""
        return sum(self.seconds[stage] for stage in PREPARATION)

    @property
    def compression_seconds(self) -> float:
        """Seconds without those that judge the result."""
        return self.total_seconds - sum(self.seconds[stage] for stage in JUDGEMENT)

    def record(self) -> dict[str, Any]:
        """Column -> value, as in COLUMNS."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        seconds = own.pop("seconds")
        return {**own, **{f"seconds_{stage}": seconds[stage] for stage in STAGES}}


def row_of(
    point: Point,
    outcome: Outcome,
    *,
    subject: str,
    fingerprint: str,
    measure: Quality,
    original: float,
) -> Row:
    """The row of a finished point."""
    settings: dict[str, Any] = point.settings()
    return Row(
        subject=_one_line(subject),
        fingerprint=fingerprint,
        point=point.key,
        label=point.label,
        **settings,
        bits_per_weight=outcome.bits_per_weight,
        directory_bytes=outcome.directory_bytes,
        original_bytes=outcome.original_bytes,
        measure=measure,
        quality=outcome.quality,
        original_quality=original,
        events=_one_line(" ".join(outcome.events)),
        seconds={stage: outcome.seconds.get(stage, 0.0) for stage in STAGES},
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _truth(cell: str) -> bool:
    return {"true": True, "false": False}[cell]


_PARSERS: dict[str, Callable[[str], Any]] = {
    "levels": int,
    "lmbda": float,
    "correct_drift": _truth,
    "keep_head": _truth,
    "qp": int,
    "bits_per_weight": float,
    "directory_bytes": int,
    "original_bytes": int,
    "quality": float,
    "original_quality": float,
}
_OPTIONAL = ("quantizer", "levels", "lmbda", "rate_model", "scale", "sensitivity", "qp")
COLUMNS = (
    *(each.name for each in fields(Row) if each.name != "seconds"),
    *(f"seconds_{stage}" for stage in STAGES),
)
"""The columns of a table, in order."""


class SweepTable:
    """The table of one subject, open for more rows.

    Attributes:
        rows: the finished points, in the order in which they were finished.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`, or prepare to make it; a torn last line is removed.

        Raises:
            OutputError: it is no table of a sweep.
        """
        self.path = path
        self.rows = read_table(path) if path.exists() else []
        if path.exists():
            whole = len(_whole_lines(path.read_bytes()))
            with path.open("rb+") as file:
                file.truncate(whole)
                os.fsync(file.fileno())

    def append(self, row: Row) -> None:
        """Add a row; when this returns it is on the disk.

        Raises:
            OutputError: the disk refuses it.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        if not self.path.exists() or self.path.stat().st_size == 0:
            writer.writeheader()
        writer.writerow({name: _cell(value) for name, value in row.record().items()})
        try:
            with self.path.open("ab") as file:
                file.write(text.getvalue().encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written ({error.strerror}): free some space and start "
                "again; finished points are kept."
            ) from None
        self.rows.append(row)


def read_table(path: Path) -> list[Row]:
    """The rows of a table; a torn last line is passed over.

    Raises:
        OutputError: the file is no table of a sweep, or one of its lines is damaged.
    """
    content = path.read_bytes()
    try:
        lines = _whole_lines(content).decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise OutputError(f"{path} is no table of a sweep: name another file.") from None
    if not lines and ",".join(COLUMNS).encode().startswith(content):  # torn in its first line
        return []
    if not lines or tuple(next(csv.reader(lines[:1]))) != COLUMNS:
        raise OutputError(f"{path} has other columns than a sweep's table: name another file.")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            (cells,) = csv.reader([line], strict=True)
            rows.append(_parsed(dict(zip(COLUMNS, cells, strict=True))))
        except (ValueError, KeyError, csv.Error):
            raise OutputError(f"line {number} of {path} is damaged: delete that line.") from None
    return rows


def write_parquet(rows: Sequence[Row], path: Path) -> bool:
    """The same table as Parquet, where pyarrow is installed; whether it is."""
    if find_spec("pyarrow") is None or not rows:
        return False
    import pyarrow
    from pyarrow import parquet

    with atomic(path) as temporary:
        parquet.write_table(pyarrow.Table.from_pylist([row.record() for row in rows]), temporary)
    return True


def _whole_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


def _cell(value: object) -> str:
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case float():
            return repr(value)
        case _:
            return str(value)


def _parsed(cells: Mapping[str, str]) -> Row:
    values: dict[str, Any] = {}
    for name, cell in cells.items():
        if name.startswith("seconds_"):
            continue
        absent = name in _OPTIONAL and cell == ""
        values[name] = None if absent else _PARSERS.get(name, str)(cell)
    if values["measure"] not in get_args(Quality):
        raise ValueError(values["measure"])
    seconds = {stage: float(cells[f"seconds_{stage}"]) for stage in STAGES}
    return Row(**values, seconds=seconds)
