"""Run the points that a sweep's table lacks."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from cerwu_gpu import __version__
from cerwu_gpu.container.output import PARTIAL, check_apart
from cerwu_gpu.container.work import LOCK_FILE, locked
from cerwu_gpu.errors import OutputError
from cerwu_gpu.files import write_text
from cerwu_gpu.progress import counted
from cerwu_gpu.sweep.points import Point
from cerwu_gpu.sweep.subject import Subject
from cerwu_gpu.sweep.table import Row, SweepTable, row_of, write_parquet

TABLE, PARQUET, IDENTITY = "sweep.jsonl", "sweep.parquet", "sweep.json"
DIRECTORIES, HESSIANS = "points", "hessians"
"""Subdirectories of a sweep's folder: compressed points, and the subject's Hessian cache."""
UNFINISHED = re.compile(r"[0-9a-f]{16}\.partial|\.[0-9a-f]{16}\.partial\.\w{8}\.partial")
"""Names of an unfinished point's directories."""


def run_sweep(
    subject: Subject,
    points: Sequence[Point],
    folder: Path,
    *,
    keep: bool = False,
    progress: bool = False,
) -> list[Row]:
    """Run every point that the table in `folder` lacks, and return all rows in the points' order.

    A sweep that was killed resumes with the unfinished point. Later runs may add points.

    Args:
        folder: for sweep.jsonl, sweep.parquet (where pyarrow is installed), sweep.json (identity of
            the table), a lock and, while a point is run, points/KEY.partial.
        keep: keep the coded directories as points/KEY; a later run without it leaves them.
        progress: show a bar over the points on stderr.

    Raises:
        OutputError: `folder` holds the sweep of another subject, cannot be written, or is locked by
            another process.
        CerwuError: a point cannot be run; those before it are in the table.
    """
    check_folder(folder)
    with locked(folder, partial(Path.mkdir, parents=True, exist_ok=True)):
        return _run(subject, points, folder, keep=keep, progress=progress)


def _run(
    subject: Subject, points: Sequence[Point], folder: Path, *, keep: bool, progress: bool
) -> list[Row]:
    """Run the sweep in a locked folder."""
    identity = {"cerwu_gpu": __version__, **subject.identity()}
    fingerprint = _fingerprint(identity)
    table = _opened(folder, identity, fingerprint)
    rows = {row.point: row for row in table.rows}
    _clear(folder / DIRECTORIES)
    missing = [point for point in points if point.key not in rows]
    original = table.rows[0].original_quality if table.rows else None
    with counted(
        len(points),
        what="points",
        unit="point",
        shown=progress,
        interval=0,
        initial=len(points) - len(missing),
    ) as bar:
        for point in missing:
            bar.set_description(point.label)
            original = subject.original() if original is None else original
            target = folder / DIRECTORIES / f"{point.key}{PARTIAL}"
            outcome = subject.run(point, target)
            permanent = target.with_suffix("")
            if keep and not permanent.exists():
                target.rename(permanent)
            else:
                shutil.rmtree(target, ignore_errors=True)
            row = row_of(
                point,
                outcome,
                subject=subject.name,
                fingerprint=fingerprint,
                measure=subject.quality,
                original=original,
            )
            table.append(row)
            rows[point.key] = row
            bar.update()
    write_parquet(table.rows, folder / PARQUET)
    return [rows[point.key] for point in points]


def check_folder(folder: Path, read: Mapping[str, str | Path | None] | None = None) -> None:
    """Refuse a path that cannot be a sweep's folder, before a model is loaded.

    Args:
        folder: of the sweep.
        read: paths that the sweep reads, as for `check_apart`.

    Raises:
        OutputError: it is a file, or a directory that holds anything but a sweep; it is, holds or
            lies in a path of `read`.
    """
    check_apart({"the output": folder}, read or {})
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file: choose a directory for the sweep.")
    begun = folder.is_dir() and any(path.name != LOCK_FILE for path in folder.iterdir())
    if begun and not _is_sweep(folder):
        raise OutputError(f"{folder} holds something else: choose an empty directory.")


def _is_sweep(folder: Path) -> bool:
    """Return whether there is a sweep.json with a version of cerwu_gpu."""
    try:
        content = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "cerwu_gpu" in content


def _fingerprint(identity: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _opened(folder: Path, identity: Mapping[str, str], fingerprint: str) -> SweepTable:
    """Open the table in `folder`, which belongs to this subject or is new.

    Raises:
        OutputError: it belongs to another one, or `folder` cannot be written.
    """
    try:
        table = SweepTable(folder / TABLE)
        if any(row.fingerprint != fingerprint for row in table.rows):
            raise OutputError(
                f"{folder} holds the sweep of another {_difference(folder / IDENTITY, identity)}: "
                "choose another directory, or delete this one."
            )
        write_text(folder / IDENTITY, json.dumps(identity, indent=2) + "\n")
        (folder / DIRECTORIES).mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror}.") from error
    return table


def _difference(path: Path, identity: Mapping[str, str]) -> str:
    """Return the names in which the identity of the present sweep differs, in words."""
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        names = [name for name in identity if there.get(name) != identity[name]]
    except (OSError, ValueError, AttributeError):
        names = []
    return ", ".join(names) or "model, text or setting"


def _clear(folder: Path) -> None:
    """Remove the unfinished directories of a killed run from `folder`, and nothing else."""
    for path in folder.iterdir():
        if UNFINISHED.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
