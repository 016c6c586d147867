"""The work directory beside an output: what an unfinished run keeps, and whose run it is.

`.OUTPUT.work` holds a lock, the fingerprint of the run, and whatever the run wants to find again.
It is removed when the output is in its place.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cerwu_gpu.container.writer import PARTIAL, REPLACED, TEMPORARY, refused
from cerwu_gpu.errors import CerwuError, OutputError

LOCK_FILE = "lock"
FINGERPRINT_FILE = "fingerprint.json"

Fingerprint = Mapping[str, str]
"""What a run's bytes depend on: "lmbda" -> "1e-09", "the weights" -> a checksum."""
READABLE = 80
"""A value longer than that is not printed."""

log = logging.getLogger("cerwu_gpu")


class WorkDirectory:
    """The work directory of one output, locked (`work_directory` makes it).

    Attributes:
        output: what the run is for.
        path: the directory.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = work_path(output)

    def expect(self, fingerprint: Fingerprint) -> None:
        """Refuse to go on with what another run has kept; parts of a fingerprint may be given.

        Raises:
            OutputError: the kept run differs in one of the entries of `fingerprint`.
        """
        kept = self._fingerprint() or {}
        for name, value in fingerprint.items():
            if name in kept and kept[name] != value:
                difference = _difference(name, kept[name], value)
                raise OutputError(
                    f"{self.path} keeps an unfinished run with {difference}: repeat that "
                    "run as it was, or pass --restart (restart=True) to drop it."
                )

    def begin(self, fingerprint: Fingerprint) -> None:
        """Say whose work this is from now on, and that it is continued where it is.

        Raises:
            OutputError: as `expect`, or the directory cannot be written.
        """
        self.expect(fingerprint)
        if self._fingerprint() is not None:
            found = sum(1 for _ in self.path.glob("*/block-*"))
            log.warning("%s is continued; finished blocks: %d.", self.path, found)
            return
        path = self.path / FINGERPRINT_FILE
        temporary = path.with_suffix(TEMPORARY)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(fingerprint, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise refused(path, error) from None

    def clear(self) -> None:
        """Drop what is kept, its fingerprint first, so that nothing half is ever believed."""
        (self.path / FINGERPRINT_FILE).unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.name != LOCK_FILE:
                _remove(path)

    def tidy(self) -> None:
        """Undo what a killed run was amid: a replacement, files in the making."""
        for path in list(self.path.rglob("*")):
            if path.suffix == REPLACED and not self.output.exists():
                path.rename(self.output)
            elif path.suffix in (PARTIAL, REPLACED, TEMPORARY):
                _remove(path)
        if not self.kept:
            self.clear()

    @property
    def kept(self) -> bool:
        """Whether there is anything to continue from."""
        return self._fingerprint() is not None and any(self.path.glob("*/*"))

    def _fingerprint(self) -> Fingerprint | None:
        path = self.path / FINGERPRINT_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise OutputError(f"{path} is damaged ({error}): delete {self.path}.") from None
        return {str(name): str(value) for name, value in content.items()}


def work_path(output: Path) -> Path:
    """Where an unfinished run for `output` keeps its work."""
    return output.parent / f".{output.name}.work"


@contextmanager
def work_directory(output: Path, *, restart: bool = False) -> Iterator[WorkDirectory]:
    """The locked work directory of `output`, removed at the end if that is a success.

    It is kept when the run is interrupted or the disk refuses; an error that the same arguments
    would only meet again removes it. `restart` drops what is there.

    Raises:
        OutputError: it cannot be written, or another process is at work in it.
        KeyboardInterrupt: with the sentence that says how to go on.
    """
    work = WorkDirectory(output)
    with _locked(work.path):
        if restart:
            work.clear()
        work.tidy()
        try:
            yield work
        except KeyboardInterrupt:
            work.tidy()
            how = f"{work.path} keeps what is finished: start it again to continue."
            raise KeyboardInterrupt(how if work.kept else "nothing is kept.") from None
        except OutputError:
            work.tidy()
            raise
        except CerwuError:
            work.clear()
            raise
        else:
            work.clear()
        finally:
            if not work.kept:
                shutil.rmtree(work.path, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Make the directory `path` and be the only one in it; the system frees a dead one's lock."""
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # the one before has just removed its directory
        except OSError as error:
            raise refused(path, error) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same(descriptor, path / LOCK_FILE):
                break
            os.close(descriptor)
        except OSError:
            os.close(descriptor)
            raise OutputError(
                f"another process is writing {path}: wait for it, or choose another output."
            ) from None
    try:
        yield
    finally:
        os.close(descriptor)


def _same(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _difference(name: str, kept: str, value: str) -> str:
    """ "lmbda 1e-09 instead of 2e-09"; checksums and long lists are not worth reading."""
    if name.startswith("the ") or max(len(kept), len(value)) > READABLE:
        return f"another {name.removeprefix('the ')}"
    return f"{name} {kept} instead of {value}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
