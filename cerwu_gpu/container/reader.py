"""Reads compressed directories: checks everything before it believes anything."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from cerwu_gpu import backend
from cerwu_gpu.container.header import Entry, Manifest
from cerwu_gpu.container.matrix import StoredMatrix, unpack_matrix
from cerwu_gpu.container.shard import tensor_bytes
from cerwu_gpu.errors import CorruptionError, FormatError
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.spec import FORMAT_VERSION, METADATA_KEY

BATCH_WEIGHTS = {"cpu": 1 << 25, "cuda": 1 << 27}
"""Weights decoded together: enough lanes to be fast, few enough to stay small in memory."""
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


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
    """Where the bytes of a directory are; the entries add up to total_bytes."""

    format_version: int
    tensors: tuple[TensorEntry, ...]
    files: tuple[FileEntry, ...]
    total_bytes: int


@dataclass(frozen=True)
class _Shard:
    path: Path
    manifest: Manifest
    names: frozenset[str]

    def tensor(self, name: str) -> Tensor:
        try:
            with safe_open(self.path, framework="pt") as file:
                return file.get_tensor(name)  # type: ignore[no-any-return]
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{self.path.name}: {name} cannot be read ({error}).") from None


class CompressedDirectory:
    """An opened directory: its manifests are parsed and consistent, nothing is decoded yet."""

    def __init__(self, path: Path, shards: list[_Shard]) -> None:
        self.path = path
        self._shards = shards

    def plain(self, *, verify: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of everything that is stored as it is.

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
        """Name and decoded parameter, in the model's layout and stored dtype, on `device`.

        Raises:
            CorruptionError: a checksum or a stream is wrong.
            FormatError: what is stored contradicts the manifest.
        """
        total = sum(e.weights for s in self._shards for e in s.manifest.compressed.values())
        with tqdm(
            total=total, desc="decoding", unit="w", unit_scale=True, disable=not progress
        ) as bar:
            batch: list[tuple[str, Entry, list[StoredMatrix]]] = []
            waiting, enough = 0, BATCH_WEIGHTS.get(torch.device(device).type, 1 << 25)
            for shard in self._shards:
                for name, entry in shard.manifest.compressed.items():
                    batch.append((name, entry, _stored(shard, name, entry, device, verify)))
                    waiting += entry.weights
                    if waiting >= enough:
                        yield from _decoded(batch)
                        bar.update(waiting)
                        batch, waiting = [], 0
            yield from _decoded(batch)
            bar.update(waiting)

    def inventory(self) -> Inventory:
        """Where the bytes are."""
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
        return Inventory(FORMAT_VERSION, tuple(tensors), tuple(files), total)

    def compressed(self) -> dict[str, Entry]:
        """Manifest entry of every compressed weight."""
        return {n: e for shard in self._shards for n, e in shard.manifest.compressed.items()}


def open_directory(path: Path | str) -> CompressedDirectory:
    """Open a compressed directory and check its manifests against its files.

    Raises:
        FormatError: this is no compressed directory, a shard is missing, or they do not agree.
        VersionError: made by a newer cerwu_gpu.
    """
    path = Path(path)
    if not path.is_dir():
        raise FormatError(f"{path} is no directory: give one that cerwu-gpu compress wrote.")
    shards = [_open_shard(path / name) for name in _shard_names(path)]
    seen: set[str] = set()
    for shard in shards:
        own = set(shard.manifest.compressed) | set(shard.manifest.plain_sha256)
        if own & seen:
            raise FormatError(f"{shard.path.name}: {min(own & seen)} is stored twice.")
        seen |= own
    return CompressedDirectory(path, shards)


def inventory(path: Path | str) -> Inventory:
    """Where the bytes of the compressed directory `path` are."""
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


def _shard_names(path: Path) -> list[str]:
    index = path / INDEX_FILE
    if not index.is_file():
        if not (path / SINGLE_FILE).is_file():
            raise FormatError(f"{path} holds no {SINGLE_FILE}: it is no compressed model.")
        return [SINGLE_FILE]
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FormatError(f"{index.name} is malformed; get the file again.") from None
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise FormatError(f"{index.name} names {name!r}, which is not in the directory.")
    return names


def _open_shard(path: Path) -> _Shard:
    try:
        with safe_open(path, framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            names = frozenset(file.keys())
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path.name} is no readable safetensors file ({error}).") from None
    if METADATA_KEY not in metadata:
        raise FormatError(f"{path.name} has no cerwu manifest: it is no compressed model.")
    manifest = Manifest.from_json(metadata[METADATA_KEY], path.name)
    for name in manifest.compressed.keys() & manifest.plain_sha256.keys():
        raise FormatError(f"{path.name}: {name} is stored both compressed and as it is.")
    promised = set(manifest.plain_sha256)
    for name in manifest.compressed:
        promised |= {f"{name}.words", f"{name}.side"}
    if promised != names:
        odd = min(promised ^ names)
        raise FormatError(f"{path.name}: manifest and contents disagree on {odd}.")
    return _Shard(path, manifest, names)


def _check_digest(name: str, tensor: Tensor, digest: str) -> None:
    if hashlib.sha256(tensor_bytes(tensor)).hexdigest() != digest:
        raise CorruptionError(f"{name}: its bytes have changed since it was written; get it again.")


def _stored(
    shard: _Shard, name: str, entry: Entry, device: torch.device | str, verify: bool
) -> list[StoredMatrix]:
    """The parts of one compressed weight, checked against the manifest, ready to decode."""
    words, side = shard.tensor(f"{name}.words"), shard.tensor(f"{name}.side")
    expected = sum(part.words for part in entry.parts), sum(part.side for part in entry.parts)
    if words.dtype != torch.uint32 or side.dtype != torch.uint8:
        raise FormatError(f"{name}: words or side have the wrong dtype; the file is broken.")
    if (words.dim(), side.dim(), words.numel(), side.numel()) != (1, 1, *expected):
        raise FormatError(f"{name}: words or side have the wrong length; the file is broken.")
    if verify:
        _check_digest(f"{name}.words", words, entry.words_sha256)
        _check_digest(f"{name}.side", side, entry.side_sha256)
    matrices = []
    first_word = first_side = 0
    blob = np.asarray(side).tobytes()
    for number, part in enumerate(entry.parts):
        own = name if len(entry.parts) == 1 else f"{name}[{number}]"
        own_words = words[first_word : first_word + part.words]
        own_side = blob[first_side : first_side + part.side]
        matrices.append(unpack_matrix(own, part, own_words, own_side, device))
        first_word, first_side = first_word + part.words, first_side + part.side
    return matrices


def _decoded(batch: list[tuple[str, Entry, list[StoredMatrix]]]) -> Iterator[tuple[str, Tensor]]:
    """Decode all matrices of the batch together and put them into their parameters."""
    weights: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(entry.dtype for _, entry, _ in batch):
        own = [x for _, entry, matrices in batch if entry.dtype == dtype for x in matrices]
        decoded = backend.decode_weights(
            [x.coded for x in own], [x.rule for x in own], getattr(torch, dtype)
        )
        weights |= {id(x): weight for x, weight in zip(own, decoded, strict=True)}
    for name, entry, matrices in batch:
        layout = WeightLayout(name, entry.shape, len(entry.parts), entry.transposed)
        first = weights[id(matrices[0])]
        parameter = torch.empty(entry.shape, dtype=first.dtype, device=first.device)
        for part, matrix in enumerate(matrices):
            layout.store(parameter, part, weights.pop(id(matrix)))
        yield name, parameter


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
        dtype=str(tensor.dtype).removeprefix("torch."),
        quantizer=None,
        weights=tensor.numel(),
        bytes=size,
        bits_per_weight=8.0 * tensor.element_size(),
        relative_loss=None,
    )
