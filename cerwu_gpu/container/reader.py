"""Reads compressed directories; everything is checked before it is used."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cerwu_gpu import backend
from cerwu_gpu.container.files import Shard, open_shards
from cerwu_gpu.container.header import Entry
from cerwu_gpu.container.matrix import StoredMatrix, unpack_matrix
from cerwu_gpu.container.shard import TORCH_NAMES
from cerwu_gpu.errors import CorruptionError, FormatError
from cerwu_gpu.files import checksum, dtype_name, local_path
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.progress import counted
from cerwu_gpu.threads import run

BATCH_WEIGHTS = {"cpu": 1 << 23, "cuda": 1 << 27}
"""Number of weights decoded together: streams enough for all workers, and little memory."""
BATCH_TABLES = 1 << 14
"""Number of tables laid out together: at some 4 KB each, 64 MB."""


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor; quantizer None: stored as it is."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    quantizer: str | None
    weights: int
    bytes: int
    bits_per_weight: float
    relative_loss: float | None


@dataclass(frozen=True)
class FileEntry:
    """Bytes that belong to no tensor: another file, or the header of a safetensors file."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Inventory:
    """Bytes of a directory by their place; the entries add up to total_bytes."""

    format_version: int
    tensors: tuple[TensorEntry, ...]
    files: tuple[FileEntry, ...]
    total_bytes: int


@dataclass(frozen=True)
class StoredWeight:
    """One compressed parameter in memory, checked, ready to decode on its device; its matrices in
    the order of entry.parts."""

    name: str
    entry: Entry
    matrices: tuple[StoredMatrix, ...]

    def to(self, device: torch.device | str) -> "StoredWeight":
        """Return the parameter with its tensors on `device`."""
        return replace(self, matrices=tuple(matrix.to(device) for matrix in self.matrices))

    def empty(self) -> Tensor:
        """Return memory for the parameter, in its shape and dtype on its device."""
        device = self.matrices[0].coded.words.device
        return torch.empty(self.entry.shape, dtype=getattr(torch, self.entry.dtype), device=device)

    def decode(self) -> Tensor:
        """Decode the parameter.

        Raises:
            CorruptionError: a stream is wrong.
        """
        return next(decode_stored([self]))[1]


class CompressedDirectory:
    """An opened directory: its manifests are parsed and consistent, nothing is decoded yet."""

    def __init__(self, path: Path, shards: list[Shard]) -> None:
        self.path = path
        self._shards = shards

    def plain(self, *, verify: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor of everything that is stored uncompressed.

        Raises:
            CorruptionError: a checksum does not match (with `verify`).
        """
        for shard in self._shards:
            for name, digest in shard.manifest.plain_sha256.items():
                tensor = shard.tensor(name)
                if verify:
                    _check_digest(name, tensor, digest)
                yield name, tensor

    def weights(
        self,
        *,
        device: torch.device | str = "cpu",
        verify: bool = True,
        progress: bool = False,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield name and decoded parameter, in the model's layout and stored dtype, on `device`.

        Raises:
            CorruptionError: a checksum or a stream is wrong.
            FormatError: what is stored contradicts the manifest.
        """
        total = sum(e.weights for s in self._shards for e in s.manifest.compressed.values())
        with counted(total, what="decoding", unit="w", shown=progress, unit_scale=True) as bar:
            place = _indexed(device)
            for batch in self._batches(place):
                # A batch is read, compared with its checksums and decoded at once.
                reads = [partial(_stored, *source, place, verify) for source in batch]
                yield from decode_stored(run(reads))
                bar.update(sum(entry.weights for _, _, entry in batch))

    def _batches(self, device: torch.device) -> Iterator[list[tuple[Shard, str, Entry]]]:
        """Yield compressed weights to decode together, in the order of the files."""
        batch: list[tuple[Shard, str, Entry]] = []
        weights, enough = 0, BATCH_WEIGHTS.get(device.type, BATCH_WEIGHTS["cpu"])
        for shard in self._shards:
            for name, entry in shard.manifest.compressed.items():
                batch.append((shard, name, entry))
                weights += entry.weights
                if weights >= enough:
                    yield batch
                    batch, weights = [], 0
        if batch:
            yield batch

    def stored(
        self, name: str, *, device: torch.device | str = "cpu", verify: bool = True
    ) -> StoredWeight:
        """Read the compressed parameter `name` into the memory of `device`, without decoding it.

        Raises:
            KeyError: there is no such compressed parameter.
            CorruptionError: a checksum is wrong (with `verify`).
            FormatError: what is stored contradicts the manifest.
        """
        for shard in self._shards:
            if name in shard.manifest.compressed:
                return _stored(shard, name, shard.manifest.compressed[name], device, verify)
        raise KeyError(name)

    def coded(self, name: str) -> tuple[Tensor, Tensor]:
        """Return words [any] uint32 and side data [any] uint8 of the compressed parameter `name`.

        Raises:
            KeyError: there is no such compressed parameter.
        """
        for shard in self._shards:
            if name in shard.manifest.compressed:
                return shard.tensor(f"{name}.words"), shard.tensor(f"{name}.side")
        raise KeyError(name)

    def all_stored(
        self, names: Iterable[str], *, device: torch.device | str = "cpu", verify: bool = True
    ) -> list[StoredWeight]:
        """Read several compressed parameters, as `stored` does, side by side."""
        place = _indexed(device)
        return run(partial(self.stored, name, device=place, verify=verify) for name in names)

    def inventory(self) -> Inventory:
        """Return where the bytes are."""
        tensors: list[TensorEntry] = []
        files: list[FileEntry] = []
        seen = set()
        for shard in self._shards:
            stored = 0
            for name, entry in shard.manifest.compressed.items():
                size = sum(4 * part.words + part.side for part in entry.parts)
                stored += size
                tensors.append(_compressed_entry(name, entry, size))
            for name in shard.manifest.plain_sha256:
                tensor = shard.tensor(name)
                size = tensor.numel() * tensor.element_size()
                stored += size
                tensors.append(_plain_entry(name, tensor, size))
            files.append(
                FileEntry(f"{shard.path.name} (header)", shard.path.stat().st_size - stored)
            )
            seen.add(shard.path)
        for file in sorted(self.path.rglob("*")):
            if file.is_file() and file not in seen:
                files.append(FileEntry(str(file.relative_to(self.path)), file.stat().st_size))
        total = sum(t.bytes for t in tensors) + sum(f.bytes for f in files)
        version = max(shard.manifest.version for shard in self._shards)
        return Inventory(version, tuple(tensors), tuple(files), total)

    @property
    def files(self) -> tuple[Path, ...]:
        """Paths of the files with tensors."""
        return tuple(shard.path for shard in self._shards)

    def described(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of every parameter and plain tensor, without reading any; a dtype
        that torch does not have goes by the name that safetensors has for it."""
        found = {}
        for shard in self._shards:
            for name, entry in shard.manifest.compressed.items():
                found[name] = entry.dtype, entry.shape
            for name in shard.manifest.plain_sha256:
                dtype, shape = shard.tensors[name]
                found[name] = TORCH_NAMES.get(dtype, dtype), shape
        return found

    def compressed(self) -> dict[str, Entry]:
        """Return the manifest entry of every compressed weight."""
        return {n: e for shard in self._shards for n, e in shard.manifest.compressed.items()}


def open_directory(path: Path | str) -> CompressedDirectory:
    """Open a compressed directory and check its manifests against its files.

    Raises:
        FormatError: this is no compressed directory, a shard is missing, or they do not agree.
        VersionError: made by a newer cerwu_gpu.
    """
    path = local_path(path)
    if not os.path.isdir(path):  # unlike Path.is_dir it takes text too long for a name
        raise FormatError(f"{path} is no directory: give one that cerwu-gpu compress wrote.")
    return CompressedDirectory(path, open_shards(path))


def inventory(path: Path | str) -> Inventory:
    """Return where the bytes of the compressed directory `path` are."""
    return open_directory(path).inventory()


def verify(path: Path | str, *, progress: bool = False) -> None:
    """Check every checksum of the directory and decode every stream.

    Raises:
        FormatError: something is missing or malformed; CorruptionError: bytes have changed.
    """
    directory = open_directory(path)
    for _ in directory.plain():
        pass
    for _ in directory.weights(progress=progress):
        pass


def _indexed(device: torch.device | str) -> torch.device:
    """Return the device with its number: each worker has a current GPU of its own."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _check_digest(name: str, tensor: Tensor, digest: str) -> None:
    if checksum(tensor) != digest:
        raise CorruptionError(f"{name}: its bytes have changed since it was written; get it again.")


def _stored(
    shard: Shard, name: str, entry: Entry, device: torch.device | str, verify: bool
) -> StoredWeight:
    """Read the parts of one compressed weight and check them against the manifest."""
    words, side = shard.tensor(f"{name}.words"), shard.tensor(f"{name}.side")
    expected = sum(part.words for part in entry.parts), sum(part.side for part in entry.parts)
    if words.dtype != torch.uint32 or side.dtype != torch.uint8:
        raise FormatError(f"{name}: words or side have the wrong dtype; the file is broken.")
    if (words.dim(), side.dim(), words.numel(), side.numel()) != (1, 1, *expected):
        raise FormatError(f"{name}: words or side have the wrong length; the file is broken.")
    if verify:
        _check_digest(f"{name}.words", words, entry.words_sha256)
        _check_digest(f"{name}.side", side, entry.side_sha256)
    return stored_weight(name, entry, words, side, device)


def stored_weight(
    name: str, entry: Entry, words: Tensor, side: Tensor, device: torch.device | str = "cpu"
) -> StoredWeight:
    """Return a parameter of its entry, words [any] uint32 and side data [any] uint8, whose lengths
    are the entry's, checked and ready to decode on `device`.

    Raises:
        CorruptionError: a stream is wrong.
        FormatError: the side data is malformed or contradicts the entry.
    """
    matrices = []
    first_word = first_side = 0
    blob = np.asarray(side).tobytes()
    for number, part in enumerate(entry.parts):
        label = name if len(entry.parts) == 1 else f"{name}[{number}]"
        part_words = words[first_word : first_word + part.words]
        part_side = blob[first_side : first_side + part.side]
        matrices.append(unpack_matrix(label, part, part_words, part_side, device))
        first_word, first_side = first_word + part.words, first_side + part.side
    return StoredWeight(name, entry, tuple(matrices))


def decode_stored(
    batch: Sequence[StoredWeight], memory: Sequence[Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Decode a batch, straight into the memory of its parameters; yield their names with them.

    Args:
        batch: parameters on one device.
        memory: a tensor of `StoredWeight.empty` for each, to be written over; default: new ones.

    Raises:
        CorruptionError: a stream is wrong.
    """
    parameters = [stored.empty() for stored in batch] if memory is None else list(memory)
    for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
        matrices: list[StoredMatrix] = []
        places: list[Tensor] = []
        for stored, parameter in zip(batch, parameters, strict=True):
            if parameter.dtype == dtype:
                entry = stored.entry
                layout = WeightLayout(stored.name, entry.shape, len(entry.parts), entry.transposed)
                matrices += stored.matrices
                places += [layout.matrix(parameter, part) for part in range(layout.parts)]
        for part in _by_tables(matrices):
            backend.decode_weights(
                [matrix.coded for matrix in matrices[part]],
                [matrix.rule for matrix in matrices[part]],
                dtype,
                places[part],
            )
    parameters.reverse()
    for stored in batch:
        yield stored.name, parameters.pop()  # frees what the caller drops


def _by_tables(matrices: Sequence[StoredMatrix]) -> Iterator[slice]:
    """Yield runs of matrices of BATCH_TABLES tables together: a decoder lays out all of a run's."""
    first = tables = 0
    for number, matrix in enumerate(matrices):
        if tables > BATCH_TABLES:
            yield slice(first, number)
            first, tables = number, 0
        tables += len(matrix.coded.tables)
    yield slice(first, len(matrices))


def _compressed_entry(name: str, entry: Entry, size: int) -> TensorEntry:
    losses = [part.relative_loss for part in entry.parts if part.relative_loss is not None]
    return TensorEntry(
        name=name,
        shape=entry.shape,
        dtype=entry.dtype,
        quantizer=entry.parts[0].quantizer,
        weights=entry.weights,
        bytes=size,
        bits_per_weight=8 * size / entry.weights,
        relative_loss=sum(losses) / len(losses) if losses else None,
    )


def _plain_entry(name: str, tensor: Tensor, size: int) -> TensorEntry:
    return TensorEntry(
        name=name,
        shape=tuple(tensor.shape),
        dtype=dtype_name(tensor.dtype),
        quantizer=None,
        weights=tensor.numel(),
        bytes=size,
        bits_per_weight=8.0 * tensor.element_size(),
        relative_loss=None,
    )
