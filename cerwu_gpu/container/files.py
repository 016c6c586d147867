"""The files of a compressed directory: index, headers and manifests, checked against each other.

No tensor is read here: contradictions in the metadata are found before anything is allocated
(docs/format.md, "Checks before allocation").
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cerwu_gpu.container.header import Manifest, read_header, strict_json
from cerwu_gpu.container.shard import header_digest
from cerwu_gpu.errors import CorruptionError, FormatError
from cerwu_gpu.files import read_text
from cerwu_gpu.spec import (
    HEADER_KEY,
    INDEX_FILE,
    METADATA_KEY,
    SINGLE_FILE,
    SLOTS_FREE,
    SLOTS_PER_BYTE,
    WEIGHTS_PER_BYTE,
)

_OF_TORCH = (RuntimeError, TypeError, ValueError, LookupError)
"""Exceptions of torch for impossible dtypes and offsets, which safetensors lets through."""


@dataclass(frozen=True)
class Shard:
    """One safetensors file whose manifest agrees with the names of its tensors.

    Attributes:
        tensors: name of every tensor -> its dtype, as safetensors calls it, and its shape.
    """

    path: Path
    manifest: Manifest
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    _file: Any
    """The open file: it is mapped into memory once, not once for every tensor."""

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            FormatError: it cannot be read.
        """
        try:
            tensor: Tensor = self._file.get_tensor(name)
            aligned = tensor.data_ptr() % tensor.element_size() == 0  # the format promises nothing
            return tensor if aligned else tensor.clone()
        except (SafetensorError, OSError, *_OF_TORCH) as error:
            raise FormatError(f"{self.path.name}: {name} cannot be read ({error}).") from error


def open_shards(path: Path) -> list[Shard]:
    """Open the files of the directory `path` and check them against each other.

    Raises:
        FormatError: a file is missing or malformed, they disagree, or their claimed content is
            out of proportion to their size.
        CorruptionError: a header has changed since it was written.
        VersionError: made by a newer cerwu_gpu.
    """
    places = _index(path)
    files = [SINGLE_FILE] if places is None else sorted(set(places.values()))
    shards = [_open_shard(path / name) for name in files]
    parameters: set[str] = set()
    tensors: set[str] = set()
    for shard in shards:
        names = {*shard.manifest.compressed, *shard.manifest.plain_sha256}
        twice = names & parameters | shard.names & tensors
        if twice:
            raise FormatError(f"{shard.path.name}: {min(twice)} is stored twice.")
        parameters |= names
        tensors |= shard.names
    if places is not None:
        stored = {name: shard.path.name for shard in shards for name in shard.names}
        if stored != places:
            name = min(name for name, _ in stored.items() ^ places.items())
            raise FormatError(f"{INDEX_FILE} and the files disagree on {name!r}; get them again.")
    _check_proportion(shards)
    return shards


def format_version(path: Path) -> int:
    """Return the least version of the format that has all that the directory `path` holds; 1 for
    one without tensors yet.

    Raises:
        FormatError: as `open_shards`.
    """
    if not any((path / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        return 1
    return max(shard.manifest.version for shard in open_shards(path))


def _index(path: Path) -> dict[str, str] | None:
    """Return tensor -> file, as the index has it; None without an index."""
    index = path / INDEX_FILE
    if not index.is_file():
        if not (path / SINGLE_FILE).is_file():
            if any(path.glob("model-*-of-*.safetensors")):
                raise FormatError(f"{path} lacks {INDEX_FILE} of its files: get it again.")
            raise FormatError(f"{path} holds no {SINGLE_FILE}: it is no compressed model.")
        return None
    try:
        content = strict_json(read_text(index), INDEX_FILE)
        places = content["weight_map"]
    except (OSError, ValueError, KeyError, TypeError):
        raise FormatError(f"{INDEX_FILE} is malformed; get the file again.") from None
    if not (isinstance(places, dict) and places):
        raise FormatError(f"{INDEX_FILE} names no file; get the file again.")
    for name in places.values():
        inside = isinstance(name, str) and name.isprintable() and not {"/", "\\"} & set(name)
        if not inside or not os.path.isfile(path / name):  # unlike is_file it takes any length
            raise FormatError(f"{INDEX_FILE} names {name!r}, which is not in the directory.")
    return places


def _open_shard(path: Path) -> Shard:
    try:
        # The library checks that the tensors fill the file, without overlap and without holes.
        file = safe_open(path, framework="pt")
        names = frozenset(file.keys())  # type: ignore[no-untyped-call]
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path.name} is no readable safetensors file ({error}).") from None
    header = read_header(path)
    metadata = header.get("__metadata__")
    if not isinstance(metadata, Mapping) or METADATA_KEY not in metadata:
        raise FormatError(f"{path.name} has no cerwu manifest: it is no compressed model.")
    manifest = Manifest.from_json(metadata[METADATA_KEY], path.name)
    for name in manifest.compressed.keys() & manifest.plain_sha256.keys():
        raise FormatError(f"{path.name}: {name} is stored both compressed and as it is.")
    promised = set(manifest.plain_sha256)
    for name in manifest.compressed:
        if promised & {f"{name}.words", f"{name}.side"}:
            raise FormatError(f"{path.name}: {name} has parts that are tensors of their own.")
        promised |= {f"{name}.words", f"{name}.side"}
    if promised != names:
        name = min(promised ^ names)
        raise FormatError(f"{path.name}: manifest and contents disagree on {name!r}.")
    described = {name: (header[name]["dtype"], header[name]["shape"]) for name in names}
    if metadata.get(HEADER_KEY) != header_digest(metadata[METADATA_KEY], described):
        raise CorruptionError(f"{path.name}: its header has changed since it was written.")
    tensors = {name: (dtype, tuple(shape)) for name, (dtype, shape) in described.items()}
    return Shard(path, manifest, tensors, file)


def _check_proportion(shards: list[Shard]) -> None:
    """Refuse matrices and tables that are far larger than any that files of this size hold."""
    size = sum(shard.path.stat().st_size for shard in shards)
    entries = {n: entry for shard in shards for n, entry in shard.manifest.compressed.items()}
    limits = {
        "weights": ({n: e.weights for n, e in entries.items()}, WEIGHTS_PER_BYTE * size),
        "table entries": (
            {n: e.slots for n, e in entries.items()},
            SLOTS_PER_BYTE * size + SLOTS_FREE,
        ),
    }
    for what, (counts, most) in limits.items():
        if sum(counts.values()) > most:
            worst = max(counts, key=counts.__getitem__)
            raise FormatError(
                f"{worst}: its manifest entry claims {counts[worst]} {what}, "
                f"too many for files of {size} bytes."
            )
