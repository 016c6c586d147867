"""Files that appear whole or not at all, and the bytes, digests and dtypes of tensors."""

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

from cerwu_gpu.errors import OutputError

if TYPE_CHECKING:  # the command line writes files, and torch takes seconds
    import torch
    from torch import Tensor

TEMPORARY = ".tmp"
"""Suffix of an unfinished file."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a disk without room."""
WINDOWS = os.name == "nt"


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
    """Turn the system's refusal to write `path` into one sentence.

    Raises:
        OutputError: the system refused it.
    """
    try:
        yield
    except OSError as error:
        raise refused(path, error) from error


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
