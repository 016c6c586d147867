"""The manifest: the description of the compressed weights of a safetensors file in its metadata.

The manifest is JSON under the key METADATA_KEY; docs/format.md describes every field.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cerwu_gpu.errors import FormatError, VersionError
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.spec import (
    CLASSES_LIMIT,
    FORMAT_VERSION,
    INTEGER_LIMIT,
    METADATA_KEY,
    SYMBOLS_LIMIT,
    TABLE_SLOTS_LIMIT,
    TRELLIS_INTEGER_LIMIT,
    is_mirrored,
)

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZERS = {
    "scalar": 0,
    "grid": 0,
    "trellis4": 4,
    "trellis8": 8,
    "trellis16": 16,
    "trellis32": 32,
}
"""Number of trellis states of each quantizer."""
_SECOND_VERSION = frozenset({"trellis16", "trellis32"})
"""Quantizers that version 2 of the format brought."""
HEADER_LIMIT = 100_000_000
"""Maximum bytes of JSON: the limit of safetensors' own library for its header."""
DIMENSION_LIMIT = 1 << 31
"""Bound of counts and extents."""
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Part:
    """One matrix of a compressed weight.

    Attributes:
        rows, columns: m and n.
        quantizer: one of QUANTIZERS; grid: positions in a list of values.
        lowest, size, escapes: the alphabet is the integers lowest ... lowest + size - 1, followed
            by `escapes` escape symbols.
        tables: number of classes T.
        words: number of 32-bit words of all streams.
        side: bytes of the side blob.
        escaped: number of escaped integers.
        relative_loss: tr((W-Q) H (W-Q)^T) / tr(W H W^T); for people, not for decoding.
    """

    rows: int
    columns: int
    quantizer: str
    lowest: int
    size: int
    escapes: int
    tables: int
    words: int
    side: int
    escaped: int
    relative_loss: float | None

    @property
    def states(self) -> int:
        return QUANTIZERS[self.quantizer]

    @property
    def version(self) -> int:
        """Least version of the format that has its quantizer."""
        return 2 if self.quantizer in _SECOND_VERSION else 1

    @property
    def quantizers(self) -> int:
        """Tables per class, Q."""
        return 2 if self.states else 1

    @property
    def alphabet(self) -> int:
        """Number of integers and escape symbols, K."""
        return self.size + self.escapes

    @property
    def mirrored(self) -> bool:
        """Whether q and -q share a table code."""
        return is_mirrored(self.lowest, self.size)

    @property
    def integers(self) -> range:
        """Integers that the format allows in this matrix, escaped or not."""
        limit = TRELLIS_INTEGER_LIMIT if self.states else INTEGER_LIMIT
        return range(1 - limit, limit)

    def check(self, name: str) -> None:
        """Refuse values that no writer produces, before anything is allocated."""
        positive = (self.rows, self.columns, self.size, self.tables)
        counts = (self.words, self.side, self.escaped)
        plausible = (
            all(1 <= value < DIMENSION_LIMIT for value in positive)
            and all(0 <= value < DIMENSION_LIMIT for value in counts)
            and self.quantizer in QUANTIZERS
            and self.lowest in self.integers
            and self.lowest + self.size - 1 in self.integers
            and self.escapes in (0, 1 + bool(self.states))
            and self.tables <= min(CLASSES_LIMIT, self.rows + self.columns)
            and self.alphabet <= SYMBOLS_LIMIT
            and self.tables * self.quantizers * self.alphabet <= TABLE_SLOTS_LIMIT
            and self.escaped <= self.rows * self.columns
            and (self.escapes > 0 or self.escaped == 0)
            and (self.quantizer != "grid" or (self.lowest, self.escapes) == (0, 0))
        )
        if not plausible:
            raise FormatError(f"{name}: its manifest entry contradicts itself; the file is broken.")


@dataclass(frozen=True)
class Entry:
    """One compressed weight: a parameter made of one matrix, or of one per expert or group.

    Attributes:
        shape, dtype: of the parameter in the model.
        transposed: the matrices are the transposes of the parameter's slices.
        parts: the matrices in order.
        words_sha256, side_sha256: of the bytes of NAME.words and NAME.side.
    """

    shape: tuple[int, ...]
    dtype: str
    transposed: bool
    parts: tuple[Part, ...]
    words_sha256: str
    side_sha256: str

    @property
    def weights(self) -> int:
        return sum(part.rows * part.columns for part in self.parts)

    @property
    def slots(self) -> int:
        """Number of entries of all tables."""
        return sum(part.tables * part.quantizers * part.alphabet for part in self.parts)

    def check(self, name: str) -> None:
        """Refuse an entry whose parts do not fill its shape."""
        for part in self.parts:
            part.check(name)
        if self.dtype not in DTYPES:
            raise FormatError(f"{name}: dtype {self.dtype!r} is none of {', '.join(DTYPES)}.")
        if not self.parts:
            raise FormatError(f"{name}: it has no parts; the file is broken.")
        matrix = (self.parts[0].rows, self.parts[0].columns)
        try:
            layout = WeightLayout(name, self.shape, len(self.parts), self.transposed)
        except ValueError:
            layout = None
        if layout is None or layout.matrix_shape != matrix or min(self.shape) < 1:
            raise FormatError(f"{name}: its parts do not fill its shape; the file is broken.")
        if any((part.rows, part.columns) != matrix for part in self.parts):
            raise FormatError(f"{name}: its parts differ in shape; the file is broken.")
        if not (_HEX.fullmatch(self.words_sha256) and _HEX.fullmatch(self.side_sha256)):
            raise FormatError(f"{name}: a checksum is not 64 hexadecimal digits.")


@dataclass(frozen=True)
class Manifest:
    """All compressed weights of one file, and the checksums of its plain tensors."""

    generator: str
    compressed: Mapping[str, Entry]
    plain_sha256: Mapping[str, str]

    @property
    def version(self) -> int:
        """Least version of the format that has all that the file holds."""
        parts = (part for entry in self.compressed.values() for part in entry.parts)
        return max((part.version for part in parts), default=1)

    def to_json(self) -> str:
        """Return the manifest as deterministic JSON: sorted keys, no blanks."""
        content = {
            "version": self.version,
            "generator": self.generator,
            "compressed": {name: asdict(entry) for name, entry in self.compressed.items()},
            "plain_sha256": dict(self.plain_sha256),
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @staticmethod
    def from_json(text: str, file: str) -> "Manifest":
        """Parse and check the manifest of `file`.

        Raises:
            VersionError: a newer version of the format.
            FormatError: anything else that docs/format.md does not allow.
        """
        if not isinstance(text, str):
            raise FormatError(f"{file}: its manifest is no text; the file is broken.")
        content = strict_json(text, f"{file}: its manifest")
        version = content.get("version") if isinstance(content, dict) else None
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise FormatError(f"{file}: its manifest states no format version.")
        if version > FORMAT_VERSION:
            raise VersionError(
                f"{file}: made by a newer cerwu_gpu (format {version}, this one reads up to "
                f"{FORMAT_VERSION}): upgrade cerwu_gpu."
            )
        try:
            entries = {name: _entry(value) for name, value in content["compressed"].items()}
            plain = {n: _typed(value, str) for n, value in content["plain_sha256"].items()}
            generator = _typed(content["generator"], str)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise FormatError(f"{file}: its manifest is malformed; the file is broken.") from None
        for name in [*entries, *plain]:
            if not name.isprintable():
                raise FormatError(f"{file}: the name {name!r} cannot be printed.")
        for name, entry in entries.items():
            entry.check(name)
            for part in entry.parts:
                if part.version > version:
                    raise FormatError(
                        f"{name}: format {version} has no {part.quantizer}; the file is broken."
                    )
        for name, digest in plain.items():
            if not _HEX.fullmatch(digest):
                raise FormatError(f"{name}: its checksum is not 64 hexadecimal digits.")
        return Manifest(generator, entries, plain)


def strict_json(text: str, what: str) -> Any:
    """Parse JSON in which no object has a name twice and every number is one.

    Raises:
        FormatError: it is something else; the message begins with `what`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
            raise FormatError(f"{what} has the name {twice!r} twice; get the file again.")
        return content

    def refused(constant: str) -> Any:
        raise ValueError(f"{constant} is no number")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refused)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is not JSON ({error}).") from None


def read_header(path: Path) -> dict[str, Any]:
    """Return the JSON that a safetensors file begins with; the library hides repeated names.

    Raises:
        FormatError: it is malformed.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, HEADER_LIMIT))
    try:
        header = strict_json(text.decode("utf-8"), path.name)
    except UnicodeDecodeError:
        raise FormatError(f"{path.name}: its header is not UTF-8; the file is broken.") from None
    if not isinstance(header, dict):
        raise FormatError(f"{path.name}: its header is malformed; the file is broken.")
    return header


def holds_manifest(path: Path) -> bool | None:
    """Return whether a safetensors file has a cerwu manifest; None where its header is broken."""
    try:
        metadata = read_header(path).get("__metadata__")
    except (FormatError, OSError):
        return None
    return isinstance(metadata, Mapping) and METADATA_KEY in metadata


def _entry(content: dict[str, Any]) -> Entry:
    shape = tuple(_typed(extent, int) for extent in content["shape"])
    parts = tuple(_part(part) for part in content["parts"])
    texts = (_typed(content[key], str) for key in ("dtype", "words_sha256", "side_sha256"))
    dtype, words, side = texts
    return Entry(shape, dtype, _typed(content["transposed"], bool), parts, words, side)


def _part(content: dict[str, Any]) -> Part:
    loss = content["relative_loss"]
    if type(loss) is int:  # JSON has one kind of number
        loss = float(loss)
    if loss in (float("inf"), -float("inf")):  # which 1e999 is read as
        raise ValueError("a loss is no float64")
    values: dict[str, Any] = {"relative_loss": None if loss is None else _typed(loss, float)}
    for field in fields(Part):
        if field.name != "relative_loss":
            values[field.name] = _typed(content[field.name], str if field.type is str else int)
    return Part(**values)


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value
