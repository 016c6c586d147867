"""One exception per way to be wrong; each message names the thing and the remedy."""

import errno
import re

_SHORTAGES = {
    "memory": (
        (errno.ENOMEM,),
        "allocate memory|out of memory|bad_alloc|enough memory|failed to map|start new thread",
    ),
    "room on the disk": (
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        "no space left|quota exceeded|file too large",
    ),
    "files that may be open (ulimit -n)": ((errno.EMFILE, errno.ENFILE), "too many open files"),
}
"""Resource of a process -> error numbers and words in other libraries' messages of a shortage."""


def printable(text: str) -> str:
    """Return one line in which every character that does not print (a terminal's control sequence,
    a mark that turns the direction of writing) is written as a Python escape, "\\x1b"."""
    if text.isprintable():
        return text
    line = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


class CerwuError(Exception):
    """The root of every error that cerwu_gpu raises on purpose; its message is `printable`."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class ConfigError(CerwuError, ValueError):
    """A setting is outside its range, or two settings contradict each other."""


class ModelError(CerwuError):
    """The model or its tokenizer cannot be found, read or compressed."""


class CalibrationError(CerwuError):
    """The calibration or evaluation text cannot be used."""


class OutputError(CerwuError):
    """The output cannot be written where it was asked for."""


class RankError(CerwuError):
    """Another process of a run on several ranks has ended, or cannot be reached."""


class FactorizationError(CerwuError):
    """A Hessian has no Cholesky factor, even with more damping."""


class TargetError(CerwuError):
    """A requested size, bit rate or quality cannot be reached."""


class FormatError(CerwuError):
    """A compressed directory is not what docs/format.md says it must be."""


class CorruptionError(FormatError):
    """Stored bytes differ from what their checksum or their streams promise."""


class VersionError(FormatError):
    """A compressed directory was made by a newer cerwu_gpu."""


def reason(error: BaseException) -> str:
    """Return what another library's exception says, short enough for one sentence of ours: the
    first line of its message that has words in it, or else the exception's kind."""
    lines = (line.strip().rstrip(".:") for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def shortage(error: BaseException) -> str | None:
    """Return what the system has run out of, if an exception of any library or one of its causes
    says so: memory, room on the disk, open files."""
    seen: BaseException | None = error
    for _ in range(20):
        if seen is None:
            return None
        if isinstance(seen, MemoryError):
            return "memory"
        for what, (numbers, words) in _SHORTAGES.items():
            if isinstance(seen, OSError) and seen.errno in numbers:
                return what
            if isinstance(seen, Exception) and re.search(words, str(seen), re.IGNORECASE):
                return what
        seen = seen.__cause__ or seen.__context__
    return None
