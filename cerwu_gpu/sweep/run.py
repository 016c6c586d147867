"""Run the points of a sweep that are not in its table yet."""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from cerwu_gpu import __version__
from cerwu_gpu.errors import OutputError
from cerwu_gpu.progress import counted
from cerwu_gpu.sweep.points import Point
from cerwu_gpu.sweep.subject import Subject
from cerwu_gpu.sweep.table import Row, SweepTable, row_of, write_parquet

TABLE, PARQUET, IDENTITY = "sweep.csv", "sweep.parquet", "sweep.json"
DIRECTORIES, HESSIANS = "points", "hessians"
"""What a sweep's folder holds; subjects keep their Hessians in the last one."""


def run_sweep(
    subject: Subject,
    points: Sequence[Point],
    folder: Path,
    *,
    keep: bool = False,
    progress: bool = False,
) -> list[Row]:
    """Run every point that the table in `folder` lacks; all rows of `points`, in their order.

    Killed at any moment and started again it goes on with the point that was in work. Further
    points may be asked for later: they join the table.

    Args:
        folder: gets sweep.csv, sweep.parquet (where pyarrow is installed), sweep.json (what the
            table belongs to) and, while a point is in work or with `keep`, points/KEY.
        keep: leave the coded directories.
        progress: show a bar over the points on stderr.

    Raises:
        OutputError: `folder` holds the sweep of something else, or cannot be written.
        CerwuError: a point cannot be run; those before it are in the table.
    """
    identity = {"cerwu_gpu": __version__, **subject.identity()}
    fingerprint = _fingerprint(identity)
    table = _opened(folder, identity, fingerprint)
    done = {row.point: row for row in table.rows}
    _clear(folder / DIRECTORIES, done.keys() if keep else ())
    missing = [point for point in points if point.key not in done]
    original = table.rows[0].original_quality if table.rows else None
    done_before = len(points) - len(missing)
    with counted(
        len(points), what="points", unit="point", shown=progress, every=0, initial=done_before
    ) as bar:
        for point in missing:
            bar.set_description(point.label)
            original = subject.original() if original is None else original
            target = folder / DIRECTORIES / point.key
            outcome = subject.run(point, target)
            row = row_of(
                point,
                outcome,
                subject=subject.name,
                fingerprint=fingerprint,
                measure=subject.quality,
                original=original,
            )
            table.append(row)
            done[point.key] = row
            if not keep:
                shutil.rmtree(target, ignore_errors=True)
            bar.update()
    write_parquet(table.rows, folder / PARQUET)
    return [done[point.key] for point in points]


def check_folder(folder: Path) -> None:
    """Refuse what cannot be a sweep's folder, before a model is loaded.

    Raises:
        OutputError: it is a file, or a directory that holds anything but a sweep.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file: choose a directory for the sweep.")
    if folder.is_dir() and not (folder / IDENTITY).exists() and any(folder.iterdir()):
        raise OutputError(f"{folder} holds something else: choose an empty directory.")


def _fingerprint(identity: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _opened(folder: Path, identity: Mapping[str, str], fingerprint: str) -> SweepTable:
    """The table in `folder`, which belongs to this subject or is new.

    Raises:
        OutputError: it belongs to another one, or `folder` cannot be written.
    """
    check_folder(folder)
    try:
        (folder / DIRECTORIES).mkdir(parents=True, exist_ok=True)
        table = SweepTable(folder / TABLE)
        if any(row.fingerprint != fingerprint for row in table.rows):
            raise OutputError(
                f"{folder} holds the sweep of another {_difference(folder / IDENTITY, identity)}: "
                "choose another directory, or delete this one."
            )
        _write(folder / IDENTITY, json.dumps(identity, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror}.") from None
    return table


def _difference(path: Path, identity: Mapping[str, str]) -> str:
    """In what the sweep that is there differs, in words."""
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        names = [name for name in identity if there.get(name) != identity[name]]
    except (OSError, ValueError, AttributeError):
        names = []
    return ", ".join(names) or "model, text or setting"


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _clear(folder: Path, kept: Collection[str]) -> None:
    """Remove what a run that died, or one that kept its directories, left behind."""
    for path in folder.iterdir():
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
