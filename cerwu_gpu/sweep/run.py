"""Run the points that a sweep's table lacks."""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cerwu_gpu import __version__
from cerwu_gpu.container.output import PARTIAL, check_apart
from cerwu_gpu.container.work import LOCK_FILE, locked
from cerwu_gpu.errors import CerwuError, ConfigError, OutputError
from cerwu_gpu.files import write_text
from cerwu_gpu.progress import counted
from cerwu_gpu.sweep.points import Point
from cerwu_gpu.sweep.subject import Outcome, Subject
from cerwu_gpu.sweep.table import Row, SweepTable, row_of, write_parquet

if TYPE_CHECKING:
    from cerwu_gpu.ranks import Ranks

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
    ranks: "Ranks | None" = None,
) -> list[Row]:
    """Run every point that the table in `folder` lacks, and return all rows in the points' order.

    A sweep that was killed resumes with the unfinished points. Later runs may add points.

    Args:
        folder: for sweep.jsonl, sweep.parquet (where pyarrow is installed), sweep.json (identity of
            the table), a lock and, while a point is run, points/KEY.partial.
        keep: keep the coded directories as points/KEY; a later run without it leaves them.
        progress: show a bar over the points on stderr.
        ranks: share the points; each of them makes this call and gets all rows, rank 0 alone
            writes the table. Those of other machines than rank 0's write in temporary directories.

    Raises:
        OutputError: `folder` holds the sweep of another subject, cannot be written, or is locked by
            another process.
        ConfigError: points of several machines are to be kept, or ranks have different subjects.
        RankError: another rank has ended; the points of finished rounds are in the table.
        CerwuError: a point cannot be run; those before it are in the table.
    """
    from cerwu_gpu.ranks import Ranks  # torch takes seconds

    ranks = ranks or Ranks()
    ranks.agree(partial(_check_keep, ranks, keep=keep))
    ranks.from_first(partial(check_folder, folder))
    with ExitStack() as stack:
        lock = locked(folder, partial(Path.mkdir, parents=True, exist_ok=True))
        ranks.from_first(lambda: stack.enter_context(lock))
        sweep = _Sweep(subject, folder, ranks, keep=keep)
        if not ranks.local:
            sweep.points = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return sweep.run(points, progress=progress and ranks.first)


class _Sweep:
    """A sweep in a locked folder.

    Attributes:
        points: directory for the points of this rank.
    """

    def __init__(self, subject: Subject, folder: Path, ranks: "Ranks", *, keep: bool) -> None:
        self._subject = subject
        self._folder = folder
        self._ranks = ranks
        self._keep = keep
        self._table: SweepTable | None = None  # on rank 0
        self._original: float | None = None  # on rank 0
        self.points = folder / DIRECTORIES

    def run(self, points: Sequence[Point], *, progress: bool) -> list[Row]:
        """Run the missing points in rounds, one point for each rank; the neighbours of a round take
        about the same time."""
        ranks = self._ranks
        identity = ranks.agree(lambda: {"cerwu_gpu": __version__, **self._subject.identity()})
        fingerprint = _fingerprint(identity)
        first = ranks.from_first(lambda: identity)
        ranks.agree(partial(_check_same, ranks, first, identity))
        rows = {row.point: row for row in ranks.from_first(partial(self._open, identity))}
        missing = [point for point in points if point.key not in rows]
        done = len(points) - len(missing)
        with counted(
            len(points), what="points", unit="point", shown=progress, interval=0, initial=done
        ) as bar:
            for begin in range(0, len(missing), ranks.count):
                together = missing[begin : begin + ranks.count]
                bar.set_description(together[0].label)
                outcomes = ranks.together(partial(self._attempt, together))
                for point, outcome in zip(together, outcomes, strict=False):
                    row = ranks.from_first(partial(self._append, point, outcome, fingerprint))
                    rows[point.key] = row
                    bar.update()
        if self._table is not None:
            write_parquet(self._table.rows, self._folder / PARQUET)
        return [rows[point.key] for point in points]

    def _open(self, identity: Mapping[str, str]) -> list[Row]:
        """Open the table, and return its rows."""
        table = _opened(self._folder, identity, _fingerprint(identity))
        _clear(self._folder / DIRECTORIES)
        if table.rows:
            self._original = table.rows[0].original_quality
        self._table = table
        return table.rows

    def _attempt(self, points: Sequence[Point]) -> Outcome | CerwuError | None:
        """Run this rank's point of a round and return its outcome or its error, so that the points
        before one that fails count; None where there is no point left."""
        ranks = self._ranks
        if ranks.index >= len(points):
            return None
        point = points[ranks.index]
        target = self.points / f"{point.key}{PARTIAL}"
        try:
            if ranks.first and self._original is None:
                self._original = self._subject.original()
            outcome = self._subject.run(point, target)
        except CerwuError as error:
            return error
        permanent = target.with_suffix("")
        if self._keep and not permanent.exists():
            target.rename(permanent)
        else:
            shutil.rmtree(target, ignore_errors=True)
        return outcome

    def _append(self, point: Point, outcome: Outcome | CerwuError | None, fingerprint: str) -> Row:
        """Return the row of a finished point, which is in the table.

        Raises:
            CerwuError: that of the point.
        """
        if isinstance(outcome, CerwuError):
            raise outcome
        assert outcome is not None and self._original is not None and self._table is not None
        row = row_of(
            point,
            outcome,
            subject=self._subject.name,
            fingerprint=fingerprint,
            measure=self._subject.quality,
            original=self._original,
        )
        self._table.append(row)
        return row


def _check_keep(ranks: "Ranks", *, keep: bool) -> None:
    """Refuse to keep points that another machine than rank 0's has.

    Raises:
        ConfigError: so it is.
    """
    if keep and not ranks.local:
        raise ConfigError(
            f"rank {ranks.index} runs on another machine than rank 0, where its points cannot be "
            "kept: drop keep, or start torchrun on one machine."
        )


def _check_same(ranks: "Ranks", first: Mapping[str, str], identity: Mapping[str, str]) -> None:
    """Refuse a subject that is not that of rank 0.

    Raises:
        ConfigError: so it is.
    """
    names = [name for name in first if first[name] != identity.get(name)]
    if names:
        raise ConfigError(
            f"rank {ranks.index} has another {', '.join(names)} than rank 0: give all machines the "
            "same model, texts and version."
        )


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
