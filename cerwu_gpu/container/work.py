"""The work directory of an output: the finished blocks of an unfinished run, and its fingerprint.

`.OUTPUT.work` holds a marker, a lock, the fingerprint of the run, and whatever the run wants to
find again. It is removed when the output is in its place. A directory of that name without the
marker is somebody else's and is never touched.
"""

import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from secrets import token_hex

from filelock import lock_descriptor

from cerwu_gpu.container.output import PARTIAL
from cerwu_gpu.errors import CerwuError, OutputError, RankError
from cerwu_gpu.files import TEMPORARY, flush_to_disk, read_json, refused, write_text

MARKER_FILE, LOCK_FILE, FINGERPRINT_FILE = "cerwu_gpu-work", "lock", "fingerprint.json"
MARKER = "cerwu_gpu keeps the work of an unfinished run in this directory (docs/resume.md).\n"
"""Content of the marker file: only a directory with it is ever cleared or removed."""

Fingerprint = Mapping[str, str]
"""Inputs that a run's bytes depend on: "lmbda" -> "1e-09", "the weights" -> a checksum."""
OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
"""Error numbers of a rename onto something that is there."""
ATTEMPTS = 20
"""Number of tries to make a work directory while other processes make and remove it."""
READABLE = 80
"""Maximum length of a value that is printed."""

log = logging.getLogger("cerwu_gpu")


class WorkDirectory:
    """The work directory of one output, locked (`work_directory` makes it).

    Attributes:
        output: the output of the run.
        path: the directory.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = work_path(output)

    def expect(self, fingerprint: Fingerprint) -> None:
        """Refuse to continue the work of another run; parts of a fingerprint may be given.

        Raises:
            OutputError: the kept run differs in one of the entries of `fingerprint`.
        """
        recorded = self._fingerprint() or {}
        for name, value in fingerprint.items():
            if name in recorded and recorded[name] != value:
                difference = _difference(name, recorded[name], value)
                raise OutputError(
                    f"{self.path} keeps an unfinished run with {difference}: repeat that "
                    "run as it was, or pass --restart (restart=True) to drop it."
                )

    def begin(self, fingerprint: Fingerprint) -> None:
        """Record whose work this is; warn if the work of an earlier run is continued.

        Raises:
            OutputError: as `expect`, or the directory cannot be written.
        """
        self.expect(fingerprint)
        if self._fingerprint() is not None:
            blocks = sum(1 for _ in self.path.glob("*/block-*"))
            log.warning("%s is continued; finished blocks: %d.", self.path, blocks)
            return
        write_text(self.path / FINGERPRINT_FILE, json.dumps(dict(fingerprint), indent=2))

    def clear(self) -> None:
        """Delete the kept work, its fingerprint first, so that half of it is never continued."""
        (self.path / FINGERPRINT_FILE).unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.name not in (MARKER_FILE, LOCK_FILE):
                _remove(path)

    def tidy(self) -> None:
        """Delete the temporary files and directories of a killed run."""
        for path in list(self.path.rglob("*")):
            if path.suffix in (PARTIAL, TEMPORARY):
                _remove(path)
        if not self.kept:
            self.clear()

    def remove(self) -> None:
        """Drop everything; the directory goes by one rename, so that its marker is never missing.

        Where the system refuses that, a work directory without work stays, which the next run
        takes.
        """
        removed = self.path.with_name(f"{self.path.name}.{token_hex(4)}{PARTIAL}")
        interrupt = None
        for step in (self.clear, partial(_rename, self.path, removed), partial(_empty, removed)):
            try:
                step()
            except KeyboardInterrupt as error:  # half a step would stay for ever
                interrupt = error
                step()
        if interrupt is not None:
            raise interrupt

    @property
    def kept(self) -> bool:
        """Whether there is work to continue from."""
        return self._fingerprint() is not None and any(self.path.glob("*/*"))

    def _fingerprint(self) -> Fingerprint | None:
        path = self.path / FINGERPRINT_FILE
        try:
            content = read_json(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise OutputError(f"{path} is damaged ({error}): delete {self.path}.") from error
        if not isinstance(content, dict):
            raise OutputError(f"{path} is damaged (no JSON object): delete {self.path}.")
        return {str(name): str(value) for name, value in content.items()}


def work_path(output: Path) -> Path:
    """Return where an unfinished run for `output` keeps its work."""
    return output.parent / f".{output.name}.work"


def output_places(output: Path) -> dict[str, Path]:
    """Return the places that a run for `output` writes and clears, by name (output.check_apart)."""
    return {"the output": output, "the work directory": work_path(output)}


@contextmanager
def work_directory(output: Path, *, restart: bool = False) -> Iterator[WorkDirectory]:
    """Lock the work directory of `output`; remove it at the end if that is a success.

    It is kept when the run is interrupted, a rank dies or the disk refuses; an error that the same
    arguments would only meet again removes it. `restart` drops what is there.

    Raises:
        OutputError: it cannot be written, another process works in it, or something else has its
            name.
        KeyboardInterrupt: with the sentence that says how to go on.
    """
    work = WorkDirectory(output)
    with locked(work.path, _make):
        if restart:
            work.clear()
        work.tidy()
        try:
            yield work
        except BaseException as error:
            if isinstance(error, CerwuError) and not isinstance(error, OutputError | RankError):
                work.remove()
                raise
            work.tidy()
            continues = work.kept
            if not continues:
                work.remove()
            if isinstance(error, KeyboardInterrupt):
                how = f"{work.path} keeps what is finished: start it again to continue."
                raise KeyboardInterrupt(how if continues else "nothing is kept.") from error
            raise
        work.remove()


@contextmanager
def locked(folder: Path, make: Callable[[Path], None]) -> Iterator[None]:
    """Make a directory and be the only process in it; the system frees a dead one's lock.

    Args:
        folder: the directory; it gets a file with the name LOCK_FILE.
        make: makes it; does nothing where it is.

    Raises:
        OutputError: another process is at work there, or the system refuses it.
    """
    descriptor = None
    while descriptor is None:  # None: the process before has just removed its directory
        try:
            make(folder)
            descriptor = _acquire(folder)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise refused(folder, error) from error
    try:
        yield
    finally:
        os.close(descriptor)


def _acquire(folder: Path) -> int | None:
    """Lock a directory; return the lock's descriptor, or None if the directory is gone by now.

    Raises:
        OutputError: another process has the lock.
        OSError: the system refuses the lock's file.
    """
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not lock_descriptor(descriptor, blocking=False):
            raise OutputError(
                f"another process is writing {folder}: wait for it, or choose another output."
            )
        if _same(descriptor, folder / LOCK_FILE):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _make(path: Path) -> None:
    """Make the directory `path` with its marker, by one rename; one that has the marker will do.

    Raises:
        OutputError: there is a file, a link, or a directory without the marker.
        OSError: the system refuses.
    """
    for _ in range(ATTEMPTS):
        if _is_ours(path):
            return
        if path.is_symlink() or path.is_file() or (path.is_dir() and any(path.iterdir())):
            continue  # look again: another process may have made it meanwhile
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f"{path.name}.", suffix=PARTIAL, dir=path.parent))
        try:
            made.chmod(0o755)
            (made / MARKER_FILE).write_bytes(MARKER.encode())
            flush_to_disk(made / MARKER_FILE)
            flush_to_disk(made)
            made.rename(path)  # refused where anything but an empty directory is
            return
        except OSError as error:
            if error.errno not in OCCUPIED:
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    raise OutputError(
        f"{path}, where this run would keep its work, holds something else (it is a link, or has "
        f"no {MARKER_FILE} of ours in it): move it away, or choose another output."
    )


def _is_ours(path: Path) -> bool:
    """Return whether `path` is a directory, no link, with our marker in it."""
    marker = path / MARKER_FILE
    try:
        if path.is_symlink() or marker.is_symlink() or not marker.is_file():
            return False
        with marker.open(encoding="utf-8") as file:
            return file.read(len(MARKER)) == MARKER
    except (OSError, ValueError):
        return False


def _same(descriptor: int, path: Path) -> bool:
    """Return whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _difference(name: str, recorded: str, value: str) -> str:
    """Return "lmbda 1e-09 instead of 2e-09", without checksums and long lists."""
    if name.startswith("the ") or max(len(recorded), len(value)) > READABLE:
        return f"another {name.removeprefix('the ')}"
    return f"{name} {recorded} instead of {value}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        # What is left where too few files may be open: this walk opens one at a time.
        for folder, folders, files in os.walk(path, topdown=False):
            links = [name for name in folders if Path(folder, name).is_symlink()]
            with suppress(OSError):
                for name in (*files, *links):
                    Path(folder, name).unlink()
                Path(folder).rmdir()
    else:
        path.unlink(missing_ok=True)


def _rename(path: Path, target: Path) -> None:
    with suppress(OSError):
        path.rename(target)


def _empty(removed: Path) -> None:
    """Delete a work directory without work; unlike rmtree without opening a file, of which there
    may be too many."""
    with suppress(OSError):
        for name in (MARKER_FILE, LOCK_FILE):
            (removed / name).unlink(missing_ok=True)
        removed.rmdir()
