"""Run the points of a sweep that are not in its table yet."""

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
"""What a sweep's folder holds; subjects keep their Hessians in the last one."""
UNFINISHED = re.compile(r"[0-9a-f]{16}\.partial|\.[0-9a-f]{16}\.partial\.\w{8}\.partial")
"""Name of an unfinished point's directory, by its Point.key, or of one that is written for it."""


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
        folder: gets sweep.jsonl, sweep.parquet (where pyarrow is installed), sweep.json (what the
            table belongs to), a lock and, while a point is run, points/KEY.partial.
        keep: keep the coded directories as points/KEY; a later run without it keeps them, too.
        progress: show a bar over the points on stderr.

    Raises:
        OutputError: `folder` holds the sweep of something else, cannot be written, or another
            process is at work in it.
        CerwuError: a point cannot be run; those before it are in the table.
    """
    check_folder(folder)
    with locked(folder, partial(Path.mkdir, parents=True, exist_ok=True)):
        return _run(subject, points, folder, keep=keep, progress=progress)


def _run(
    subject: Subject, points: Sequence[Point], folder: Path, *, keep: bool, progress: bool
) -> list[Row]:
    """`run_sweep` in a folder that is locked."""
    identity = {"cerwu_gpu": __version__, **subject.identity()}
    fingerprint = _fingerprint(identity)
    table = _opened(folder, identity, fingerprint)
    done = {row.point: row for row in table.rows}
    _clear(folder / DIRECTORIES)
    missing = [point for point in points if point.key not in done]
    original = table.rows[0].original_quality if table.rows else None
    done_before = len(points) - len(missing)
    with counted(
        len(points), what="points", unit="point", shown=progress, every=0, initial=done_before
    ) as bar:
        for point in missing:
            bar.set_description(point.label)
            original = subject.original() if original is None else original
            target = folder / DIRECTORIES / f"{point.key}{PARTIAL}"
            outcome = subject.run(point, target)
            kept = target.with_suffix("")
            if keep and not kept.exists():
                target.rename(kept)
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
            done[point.key] = row
            bar.update()
    write_parquet(table.rows, folder / PARQUET)
    return [done[point.key] for point in points]


def check_folder(folder: Path, read: Mapping[str, str | Path | None] | None = None) -> None:
    """Refuse what cannot be a sweep's folder, before a model is loaded.

    Args:
        folder: where the sweep is to lie.
        read: what the sweep reads, as for `check_apart`.

    Raises:
        OutputError: it is a file, or a directory that holds anything but a sweep; it is, holds or
            lies in something that is read.
    """
    check_apart({"the output": folder}, read or {})
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file: choose a directory for the sweep.")
    begun = folder.is_dir() and any(path.name != LOCK_FILE for path in folder.iterdir())
    if begun and not _is_sweep(folder):
        raise OutputError(f"{folder} holds something else: choose an empty directory.")


def _is_sweep(folder: Path) -> bool:
    """Return whether there is a sweep.json of ours: one that states a version of cerwu_gpu."""
    try:
        content = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "cerwu_gpu" in content


def _fingerprint(identity: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _opened(folder: Path, identity: Mapping[str, str], fingerprint: str) -> SweepTable:
    """The table in `folder`, which belongs to this subject or is new.

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
    """In what the sweep that is there differs, in words."""
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        names = [name for name in identity if there.get(name) != identity[name]]
    except (OSError, ValueError, AttributeError):
        names = []
    return ", ".join(names) or "model, text or setting"


def _clear(folder: Path) -> None:
    """Remove what a run that died left in `folder`; nothing else there is ours to remove."""
    for path in folder.iterdir():
        if UNFINISHED.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
