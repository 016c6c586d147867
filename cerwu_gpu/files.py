"""Files that appear whole or not at all, and the bytes, digests and dtypes of tensors."""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, BinaryIO

from cerwu_gpu.errors import CerwuError, OutputError, shortage

if TYPE_CHECKING:  # the command line writes files, and torch takes seconds
    import torch
    from torch import Tensor

TEMPORARY = ".tmp"
"""Suffix of an unfinished file."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a disk without room."""
WINDOWS = os.name == "nt"
TEXT_LIMIT = 100_000_000
"""Maximum bytes of a file that is read whole: the limit of safetensors' own library for headers."""
TEXT_SUFFIXES = (".json", ".jinja", ".md", ".model", ".py", ".tiktoken", ".txt")
"""Suffixes of the files of a model that are read whole, by us or by transformers."""


def local_path(name: str | Path) -> Path:
    """Return the path that a name of something on the disk stands for: `~` is the user's home.

    A `~` that is no user's stays as it is, since it can begin a file's name.
    """
    return Path(os.path.expanduser(name))


def refused(path: Path, error: OSError) -> OutputError:
    """Return the error to raise when the disk does not take `path`."""
    remedy = (
        "free some space and start again" if error.errno in FULL else "choose another place for it"
    )
    return OutputError(f"cannot write {path} ({error.strerror}): {remedy}.")


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write `path` into one sentence, also where another library
    reports a full disk by an exception of its own.

    Raises:
        OutputError: the system refused it.
    """
    try:
        yield
    except OSError as error:
        raise refused(path, error) from error
    except Exception as error:
        if isinstance(error, CerwuError) or shortage(error) != "room on the disk":
            raise
        raise refused(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error


def resolved(path: str | Path) -> Path:
    """Return the absolute path of an output, links and ~ resolved.

    Raises:
        OutputError: the links lead in a circle, or there is no such user.
    """
    place = local_path(path)
    try:
        target = place.resolve()
    except (OSError, RuntimeError, ValueError):
        target = place
    if "\0" in str(place) or any(map(os.path.islink, (target, *target.parents))):
        raise OutputError(f"{place} cannot be resolved: its links lead in a circle.")
    return target


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary name for a file that is to be at `path` whole or not at all.

    The file is flushed and renamed at the end, and removed after an exception.

    Raises:
        OSError: the system refuses it.
    """
    temporary = path.with_name(f".{path.name}.{token_hex(4)}{TEMPORARY}")
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        OutputError: the system refuses it.
    """
    with written(path), atomic(path) as temporary:
        temporary.write_bytes(text.encode())


@contextmanager
def opened(path: Path, limit: int = TEXT_LIMIT) -> Iterator[BinaryIO]:
    """Open a regular file, or a link to one, of at most `limit` bytes for reading.

    Raises:
        OSError: it is a pipe, a device or a directory, it is larger, or the system refuses it.
    """
    # A pipe that nobody writes to would block without the flag.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"it is larger than {limit:,} bytes", str(path))
        yield file


def read_text(path: Path) -> str:
    """Return the text of a regular file of at most TEXT_LIMIT bytes.

    Raises:
        OSError: as `opened`; UnicodeDecodeError: it is not UTF-8.
    """
    with opened(path) as file:
        content = file.read(TEXT_LIMIT + 1)  # a file may grow, and /proc has none of a size
    if len(content) > TEXT_LIMIT:
        raise OSError(errno.EFBIG, f"it is larger than {TEXT_LIMIT:,} bytes", str(path))
    return content.decode("utf-8")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of at most TEXT_LIMIT bytes.

    Raises:
        OSError: as `opened`; ValueError: it is no JSON, or nested too deep.
    """
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def unreadable(folder: Path) -> str | None:
    """Return the name of a file of a model's directory that must not be opened, and why: a pipe, a
    device, a directory in the place of JSON or a template, or text of more than TEXT_LIMIT bytes;
    None where there is none."""
    for path in sorted(folder.iterdir()):
        try:
            status = path.stat()
        except OSError:
            continue  # a link that leads nowhere
        is_text = path.suffix in TEXT_SUFFIXES[:2]
        if stat.S_ISDIR(status.st_mode) and is_text:
            return f"{path.name}, which is a directory"
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            return f"{path.name}, which is no regular file"
        if path.suffix in TEXT_SUFFIXES and status.st_size > TEXT_LIMIT:
            return f"{path.name}, which is larger than {TEXT_LIMIT:,} bytes"
    return None


def lies_inside(path: Path, folder: Path) -> bool:
    """Return whether a file of `folder` is a regular one that lies there, or in the blobs of the
    Hub's cache whose snapshot `folder` is; links are resolved."""
    place, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    return place.is_file() and any(place.is_relative_to(one) for one in homes)


def may_be_copied(path: Path, folder: Path) -> bool:
    """Return whether a file of `folder` lies inside (`lies_inside`) and has at most TEXT_LIMIT
    bytes."""
    return lies_inside(path, folder) and path.stat().st_size <= TEXT_LIMIT


def copy_inside(names: Iterable[str], folder: Path, target: Path) -> list[str]:
    """Copy files of `folder`, given by their relative paths, into the directory `target`; return
    those that are left out (`may_be_copied`).

    Raises:
        OSError: the system refuses it.
    """
    left = []
    for name in names:
        path = folder / name
        if not may_be_copied(path, folder):
            left.append(name)
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with opened(path) as source, (target / name).open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return left


def flush_to_disk(path: Path) -> None:
    """Return when the content of a file or directory is on the disk.

    Windows can neither flush a directory nor a file that is open for reading only.
    """
    if WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensor_bytes(tensor: "Tensor") -> memoryview:
    """Return the tensor's bytes, row-major, little-endian; a view where it can be one."""
    import torch  # here, where there is a tensor already

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def checksum(tensor: "Tensor") -> str:
    """Return the SHA-256 (hexadecimal) of the tensor's bytes alone."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def digest(tensors: "Iterable[Tensor]") -> str:
    """Return the SHA-256 (hexadecimal) of dtype, shape and bytes of all tensors in order."""
    sha256 = hashlib.sha256()
    for tensor in tensors:
        sha256.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        sha256.update(tensor_bytes(tensor))
    return sha256.hexdigest()


def dtype_name(dtype: "torch.dtype") -> str:
    """Return "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")
