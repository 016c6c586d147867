"""Collects coded and plain tensors and turns them into a finished directory, or into nothing."""

import json
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from cerwu_gpu.container.header import Entry, Manifest, Part
from cerwu_gpu.container.output import new_directory, put_in_place
from cerwu_gpu.container.shard import SAFETENSORS_NAMES, write_shard
from cerwu_gpu.errors import ModelError
from cerwu_gpu.files import TEMPORARY, checksum, dtype_name, written
from cerwu_gpu.spec import INDEX_FILE, SINGLE_FILE, WEIGHTS_PER_BYTE

SHARD_BYTES = 5_000_000_000
"""Maximum bytes of a file's tensors, as on the Hub."""


def check_storable(compressed: Collection[str], plain: Mapping[str, torch.dtype]) -> None:
    """Refuse names and dtypes that the format cannot hold, before the work.

    Args:
        compressed: names of parameters to compress.
        plain: name of every other tensor -> its dtype.

    Raises:
        ModelError: the first of them.
    """
    taken = {f"{name}.{what}" for name in compressed for what in ("words", "side")}
    for name in (*compressed, *plain):
        if not name.isprintable():
            raise ModelError(f"the name {name!r} cannot be stored: rename the layer.")
    for name, dtype in plain.items():
        if name in taken or name == "__metadata__":
            raise ModelError(f"the name {name} has another use in the format: rename the layer.")
        if dtype not in SAFETENSORS_NAMES:
            raise ModelError(f"{name} is {dtype_name(dtype)}, which cannot be stored: cast it.")


class DirectoryWriter:
    """An unfinished compressed directory: it appears under its name when it is complete.

    Used as a context manager; leaving it by an exception removes everything written so far.

    Raises:
        OutputError: the output must not be replaced (output.check_output), or its parent cannot be
            written.
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
        """Make the hidden directory, in `inside` (on the same disk) or beside the output."""
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
        self._sides: dict[str, Tensor] = {}
        self._outdated: set[str] = set()

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
        self._plain[name] = checksum(tensor)
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
        self._compressed[name] = Entry(
            tuple(shape), dtype_name(dtype), transposed, parts, checksum(words), checksum(side)
        )
        self._sides[name] = side
        self._add({f"{name}.words": words, f"{name}.side": side})

    @property
    def sides(self) -> Mapping[str, tuple[Entry, Tensor]]:
        """Entry and side data [any] uint8 of every compressed weight so far, by name."""
        return {name: (self._compressed[name], side) for name, side in self._sides.items()}

    def words(self, name: str) -> Tensor:
        """Return the words [any] uint32 of a compressed weight."""
        key = f"{name}.words"
        if key in self._tensors:
            return self._tensors[key]
        path = next(path for path, names, _ in self._shards if key in names)
        with safe_open(path, framework="pt") as file:
            words: Tensor = file.get_tensor(key)
        return words

    def replace_side(self, name: str, parts: tuple[Part, ...], side: Tensor) -> None:
        """Give a compressed weight other side data; files that hold it are written anew at the
        end, its words as they are."""
        key, entry = f"{name}.side", self._compressed[name]
        self._compressed[name] = replace(entry, parts=parts, side_sha256=checksum(side))
        if key in self._tensors:
            self._bytes += side.numel() - self._tensors[key].numel()
            self._tensors[key] = side
        else:
            self._outdated.add(name)
        self._sides[name] = side

    def complete(self) -> None:
        """Write the remaining tensors and the index: the directory is whole, but still hidden."""
        self._renew()
        # A directory of matrices that take next to no bits must not look like an attack.
        weights = sum(entry.weights for entry in self._compressed.values())
        written_bytes = sum(path.stat().st_size for path, _, _ in self._shards)
        self._flush(least=-(-weights // WEIGHTS_PER_BYTE) - written_bytes)
        count = len(self._shards)
        weight_map = {}
        for number, (path, names, _) in enumerate(self._shards, start=1):
            name = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            path.rename(self.folder / name)
            weight_map.update(dict.fromkeys(names, name))
        if count > 1:
            index = {
                "metadata": {"total_size": sum(size for _, _, size in self._shards)},
                "weight_map": dict(sorted(weight_map.items())),
            }
            text = json.dumps(index, indent=2) + "\n"
            path = self.folder / INDEX_FILE
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

    def _flush(self, least: int = 0) -> None:
        """Write the collected tensors to a file of at least `least` bytes."""
        path = self.folder / f"shard-{len(self._shards)}{TEMPORARY}"
        self._write(path, self._tensors, least)
        self._shards.append((path, list(self._tensors), self._bytes))
        self._tensors, self._bytes = {}, 0

    def _write(self, path: Path, tensors: Mapping[str, Tensor], least: int = 0) -> None:
        compressed = {n: e for n, e in self._compressed.items() if f"{n}.words" in tensors}
        plain = {n: digest for n, digest in self._plain.items() if n in tensors}
        manifest = Manifest(self.generator, compressed, plain)
        with written(path):
            write_shard(path, tensors, manifest.to_json(), least=least)

    def _renew(self) -> None:
        """Write files again that hold outdated side data."""
        for index, (path, names, _) in enumerate(self._shards):
            outdated = [name for name in self._outdated if f"{name}.side" in names]
            if outdated:
                tensors = load_file(path)
                tensors |= {f"{name}.side": self._sides[name] for name in outdated}
                renewed = path.with_name(f"renewed-{index}{TEMPORARY}")
                self._write(renewed, tensors)
                size = sum(x.numel() * x.element_size() for x in tensors.values())
                del tensors
                with written(path):
                    renewed.replace(path)
                self._shards[index] = path, names, size
        self._outdated = set()
