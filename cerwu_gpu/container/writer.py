"""Collects coded and plain tensors and turns them into a finished directory, or into nothing."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from cerwu_gpu.container.header import Entry, Manifest, Part
from cerwu_gpu.container.shard import tensor_bytes, write_shard
from cerwu_gpu.errors import OutputError

SHARD_BYTES = 5_000_000_000
"""Files are cut at this size, as on the Hub."""
PARTIAL, REPLACED, TEMPORARY = ".partial", ".old", ".tmp"
"""Suffixes: of a directory in the making, of the one it replaces, of a file in the making."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


class DirectoryWriter:
    """A compressed directory in the making: it appears under its name when it is complete.

    Used as a context manager; leaving it by an exception removes everything written so far.

    Raises:
        OutputError: the output exists and is not empty (without `overwrite`), or its parent cannot
            be written.
    """

    def __init__(
        self,
        output: Path,
        *,
        generator: str,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
        inside: Path | None = None,
    ) -> None:
        """`inside`: where it lies until it is complete, on the same disk; default: beside it."""
        self.output = output
        self.generator = generator
        self.shard_bytes = shard_bytes
        self._overwrite = overwrite
        self._stack = ExitStack()
        self.folder = self._stack.enter_context(
            new_directory(output, overwrite=overwrite, inside=inside)
        )
        self._tensors: dict[str, Tensor] = {}
        self._compressed: dict[str, Entry] = {}
        self._plain: dict[str, str] = {}
        self._bytes = 0
        self._shards: list[tuple[Path, list[str], int]] = []

    def __enter__(self) -> "DirectoryWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def add_plain(self, name: str, tensor: Tensor) -> None:
        """Store a tensor as it is."""
        self._plain[name] = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        self._add({name: tensor.detach().to("cpu")})

    def add_compressed(
        self,
        name: str,
        *,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        transposed: bool,
        parts: tuple[Part, ...],
        words: Tensor,
        side: Tensor,
    ) -> None:
        """Store a compressed weight: `words` uint32 and `side` uint8 of all its parts."""
        words_sha256, side_sha256 = (
            hashlib.sha256(tensor_bytes(tensor)).hexdigest() for tensor in (words, side)
        )
        self._compressed[name] = Entry(
            tuple(shape), dtype_name(dtype), transposed, parts, words_sha256, side_sha256
        )
        self._add({f"{name}.words": words, f"{name}.side": side})

    def complete(self) -> None:
        """Write what is left and the index; the directory is then whole, under its hidden name."""
        self._flush()
        count = len(self._shards)
        weight_map = {}
        for number, (path, names, _) in enumerate(self._shards, start=1):
            single = "model.safetensors"
            name = single if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            path.rename(self.folder / name)
            weight_map.update(dict.fromkeys(names, name))
        if count > 1:
            index = {
                "metadata": {"total_size": sum(size for _, _, size in self._shards)},
                "weight_map": dict(sorted(weight_map.items())),
            }
            text = json.dumps(index, indent=2) + "\n"
            path = self.folder / "model.safetensors.index.json"
            with written(path):
                path.write_text(text, encoding="utf-8")

    def publish(self) -> None:
        """Flush everything to the disk and put the directory in its place."""
        put_in_place(self.folder, self.output, overwrite=self._overwrite)

    def _add(self, tensors: dict[str, Tensor]) -> None:
        """Add tensors that belong into one file."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._tensors and self._bytes + size > self.shard_bytes:
            self._flush()
        self._tensors.update(tensors)
        self._bytes += size

    def _flush(self) -> None:
        compressed = {n: e for n, e in self._compressed.items() if f"{n}.words" in self._tensors}
        plain = {n: digest for n, digest in self._plain.items() if n in self._tensors}
        manifest = Manifest(self.generator, compressed, plain)
        path = self.folder / f"shard-{len(self._shards)}{TEMPORARY}"
        with written(path):
            write_shard(path, self._tensors, manifest.to_json())
        self._shards.append((path, list(self._tensors), self._bytes))
        self._tensors, self._bytes = {}, 0


def refused(path: Path, error: OSError) -> OutputError:
    """What to tell the user when the disk does not take `path`."""
    remedy = (
        "free some space and start again" if error.errno in FULL else "choose another place for it"
    )
    return OutputError(f"cannot write {path} ({error.strerror}): {remedy}.")


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Say in one sentence that `path` could not be written.

    Raises:
        OutputError: the system refused it.
    """
    try:
        yield
    except OSError as error:
        raise refused(path, error) from None


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that would destroy something.

    Raises:
        OutputError: `output` is a file, holds the current directory, or is a non-empty directory
            and `overwrite` is not given.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file: choose a directory for the output.")
    if output.is_dir() and Path.cwd().is_relative_to(output.resolve()):
        raise OutputError(f"{output} is or holds the current directory: choose another output.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise OutputError(f"{output} exists and is not empty: choose another or pass --overwrite.")


def check_apart(output: Path, source: Path, what: str) -> None:
    """Refuse an output that is, holds or lies in what it is made from (`what`, in words).

    Raises:
        OutputError: it is so.
    """
    output, source = output.resolve(), source.resolve()
    if output.is_relative_to(source) or source.is_relative_to(output):
        raise OutputError(f"{output} is, holds or lies in {what} {source}: choose another output.")


@contextmanager
def new_directory(output: Path, *, overwrite: bool, inside: Path | None = None) -> Iterator[Path]:
    """A hidden directory to be filled, beside `output` or `inside` a directory of the same disk;
    what is still there at the end is removed.

    Raises:
        OutputError: `output` must not be replaced, or the place cannot be written.
    """
    check_output(output, overwrite=overwrite)
    place = inside or output.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix=f".{output.name}.", suffix=PARTIAL, dir=place)
    except OSError as error:
        raise OutputError(f"cannot write beside {output}: {error.strerror}.") from None
    try:
        Path(made).chmod(0o755)
        yield Path(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def put_in_place(made: Path, output: Path, *, overwrite: bool) -> None:
    """Flush a filled directory to the disk and give it its name, by one rename.

    Raises:
        OutputError: `output` must not be replaced, or the disk refuses.
    """
    with written(output):
        for file in made.rglob("*"):
            _flush_to_disk(file)
        _flush_to_disk(made)
        old = made.with_suffix(REPLACED)
        if output.exists():
            check_output(output, overwrite=overwrite)
            output.rename(old)
        try:
            os.replace(made, output)
        except OSError:
            if old.exists():
                old.rename(output)
            raise
        _flush_to_disk(output.parent)
        shutil.rmtree(old, ignore_errors=True)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
