"""The table of a sweep: JSON Lines that survive a killed run.

One JSON object per finished point, appended, flushed and synced to the disk before the next point
begins. A line without its line break is incomplete.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_type_hints

from cerwu_gpu.errors import OutputError
from cerwu_gpu.files import atomic
from cerwu_gpu.report import STAGES, Stage, finite
from cerwu_gpu.sweep.points import Point
from cerwu_gpu.sweep.subject import JUDGEMENT, PREPARATION, Outcome, Quality

START = b'{"subject": '
"""Beginning of every line."""
QUALITIES = ("quality", "original_quality")
"""Fields that may be infinite or not a number, which JSON writes as null."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One finished point; a setting is None where the method has no such one."""

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
    distill: int = 0
    """Number of distillation steps; tables of earlier versions lack the column."""
    bits_per_weight: float
    directory_bytes: int
    original_bytes: int
    measure: Quality
    quality: float
    original_quality: float
    events: str
    """Deviations from the plan, sentences one after the other."""
    seconds: Mapping[Stage, float] = field(compare=False)
    """Seconds of all STAGES; rows are compared without them."""

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def preparation_seconds(self) -> float:
        """Seconds of the stages that all points share."""
        return sum(self.seconds[stage] for stage in PREPARATION)

    @property
    def compression_seconds(self) -> float:
        """Seconds without those of the evaluation."""
        return self.total_seconds - sum(self.seconds[stage] for stage in JUDGEMENT)

    def record(self) -> dict[str, Any]:
        """Return the fields by name, `seconds` by stage in a dictionary of its own."""
        return asdict(self)


def row_of(
    point: Point,
    outcome: Outcome,
    *,
    subject: str,
    fingerprint: str,
    measure: Quality,
    original: float,
) -> Row:
    """Return the row of a finished point."""
    settings: dict[str, Any] = point.settings()
    return Row(
        subject=subject,
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
        events=" ".join(" ".join(outcome.events).split()),
        seconds={stage: outcome.seconds.get(stage, 0.0) for stage in STAGES},
    )


class SweepTable:
    """The table of one subject, open for more rows.

    Attributes:
        rows: finished points, in the order of their completion.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`, or prepare to create it; an incomplete last line is removed.

        Raises:
            OutputError: it is no table of a sweep.
        """
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            self.rows = read_table(path)
            with path.open("rb+") as file:
                file.truncate(len(_whole_lines(path.read_bytes())))
                os.fsync(file.fileno())

    def append(self, row: Row) -> None:
        """Add a row and sync it to the disk.

        Raises:
            OutputError: the disk refuses it.
        """
        line = json.dumps(finite(row.record()), allow_nan=False) + "\n"
        try:
            with self.path.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written ({error.strerror}): free some space and start "
                "again; finished points are kept."
            ) from error
        self.rows.append(row)


def read_table(path: Path) -> list[Row]:
    """Return the rows of a table without an incomplete last line.

    Raises:
        OutputError: the file is no table of a sweep, or one of its lines is damaged.
    """
    content = path.read_bytes()
    if content[: len(START)] != START[: len(content)]:
        raise OutputError(f"{path} is no table of a sweep: name another file.")
    rows = []
    for number, line in enumerate(_whole_lines(content).split(b"\n")[:-1], start=1):
        try:
            rows.append(_parsed(line))
        except (KeyError, TypeError, ValueError, RecursionError):
            raise OutputError(f"line {number} of {path} is damaged: delete that line.") from None
    return rows


def write_parquet(rows: Sequence[Row], path: Path) -> bool:
    """Write the table as Parquet; return False where pyarrow is not installed or it is empty."""
    if find_spec("pyarrow") is None or not rows:
        return False
    import pyarrow
    from pyarrow import parquet

    with atomic(path) as temporary:
        parquet.write_table(pyarrow.Table.from_pylist([row.record() for row in rows]), temporary)
    return True


def _whole_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


def _parsed(line: bytes) -> Row:
    """Parse the row of a line.

    Raises:
        KeyError, TypeError, ValueError: it is no row.
    """
    record = json.loads(line)
    unmeasured = {name: math.nan for name in QUALITIES if record[name] is None}
    row = Row(**{**record, **unmeasured})
    for name, kind in get_type_hints(Row).items():
        value, allowed = getattr(row, name), get_args(kind) or (kind,)
        whole = type(value) is int and float in allowed
        if name != "seconds" and not (whole or type(value) in allowed or value in allowed):
            raise ValueError(name)
    if not row.seconds.keys() <= set(STAGES):
        raise ValueError("seconds")
    return replace(row, seconds={stage: float(row.seconds.get(stage, 0.0)) for stage in STAGES})
