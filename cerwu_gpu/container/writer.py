"""Collects coded and plain tensors and turns them into a finished directory, or into nothing."""

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
from cerwu_gpu.spec import METADATA_KEY

SHARD_BYTES = 5_000_000_000
"""Files are cut at this size, as on the Hub."""


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
    ) -> None:
        self.output = output
        self.generator = generator
        self.shard_bytes = shard_bytes
        self._overwrite = overwrite
        self._stack = ExitStack()
        self.folder = self._stack.enter_context(new_directory(output, overwrite=overwrite))
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
            (self.folder / "model.safetensors.index.json").write_text(text)

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
        path = self.folder / f"shard-{len(self._shards)}.tmp"
        metadata = {"format": "pt", METADATA_KEY: manifest.to_json()}
        try:
            write_shard(path, self._tensors, metadata)
        except OSError as error:
            raise OutputError(f"cannot write {path.name}: {error.strerror}.") from None
        self._shards.append((path, list(self._tensors), self._bytes))
        self._tensors, self._bytes = {}, 0


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that would destroy something.

    Raises:
        OutputError: `output` is a file, or a non-empty directory and `overwrite` is not given.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file: choose a directory for the output.")
    if output.is_dir() and output.resolve() == Path.cwd():
        raise OutputError(f"{output} is the current directory: choose another for the output.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise OutputError(f"{output} exists and is not empty: choose another or pass --overwrite.")


@contextmanager
def new_directory(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A hidden directory beside `output` to be filled; what is still there at the end is removed.

    Raises:
        OutputError: `output` must not be replaced, or its parent cannot be written.
    """
    check_output(output, overwrite=overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent)
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
    try:
        for file in made.iterdir():
            _flush_to_disk(file)
        _flush_to_disk(made)
        old = made.with_suffix(".old")
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
    except OSError as error:
        raise OutputError(f"cannot put {output} in place: {error.strerror}.") from None


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
