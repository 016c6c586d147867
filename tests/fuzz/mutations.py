"""Ways to damage a compressed directory: by accident, and by somebody who mends the checksums."""

import hashlib
import json
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cerwu_gpu.coding import side
from cerwu_gpu.container.header import QUANTIZERS
from cerwu_gpu.container.shard import header_digest
from cerwu_gpu.errors import FormatError
from cerwu_gpu.spec import HEADER_KEY, METADATA_KEY

ODD_NUMBERS = (0, -1, 1, 2, 255, 256, 65536, 2**20, 2**30, 2**31 - 1, 2**31, 2**32, 2**63, 10**30)
ODD_VALUES = (*ODD_NUMBERS, 1.5, float("nan"), float("inf"), True, None, "", "x", [], [[[]]], {})


@dataclass
class Opened:
    """A safetensors file taken apart; `header` without its metadata and offsets."""

    header: dict[str, dict[str, Any]]
    manifest: dict[str, Any]
    data: dict[str, bytes]

    @staticmethod
    def of(raw: bytes) -> "Opened":
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        manifest = json.loads(header.pop("__metadata__")["cerwu"])
        data = {}
        for name, entry in header.items():
            begin, end = entry.pop("data_offsets")
            data[name] = raw[8 + length + begin : 8 + length + end]
        return Opened(header, manifest, data)

    def joined(self, spoil: Callable[[dict[str, Any]], None] = lambda header: None) -> bytes:
        """The file, with checksums that are right; `spoil` changes the header after all else."""
        compressed, plain = (self.manifest.get(x) for x in ("compressed", "plain_sha256"))
        for name, entry in compressed.items() if isinstance(compressed, dict) else ():
            for what in ("words", "side"):
                if isinstance(entry, dict) and f"{what}_sha256" in entry:
                    entry[f"{what}_sha256"] = sha256(self.data.get(f"{name}.{what}", b""))
        for name in plain if isinstance(plain, dict) else ():
            plain[name] = sha256(self.data.get(name, b""))
        header: dict[str, Any] = {"__metadata__": {"cerwu": json.dumps(self.manifest)}}
        offset = 0
        for name, entry in self.header.items():
            end = offset + len(self.data[name])
            header[name] = {**entry, "data_offsets": [offset, end]}
            offset = end
        spoil(header)
        mend(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + b"".join(self.data[n] for n in self.header)

    def resize(self, name: str, what: str, data: bytes) -> None:
        """Replace NAME.words or NAME.side of a weight of one part, consistently."""
        width = 4 if what == "words" else 1
        self.data[f"{name}.{what}"] = data
        self.header[f"{name}.{what}"]["shape"] = [len(data) // width]
        parts = self.manifest["compressed"][name]["parts"]
        others = sum(part[what] for part in parts[1:])
        parts[0][what] = len(data) // width - others


def mend(header: dict[str, Any]) -> None:
    """Give a header, where it still is one, the checksum that fits it."""
    metadata = header["__metadata__"]
    with suppress(AttributeError, KeyError, TypeError):
        told = {n: (e["dtype"], e["shape"]) for n, e in header.items() if n != "__metadata__"}
        metadata[HEADER_KEY] = header_digest(metadata[METADATA_KEY], told)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """One accident: a byte, a range, the end, something too much or too little."""
    place = rng.randrange(len(raw)) if rng.random() < 0.8 else rng.randrange(min(64, len(raw)))
    length = min(rng.choice((1, 2, 4, 8, 64, 1000)), len(raw) - place)
    before, middle, after = raw[:place], raw[place : place + length], raw[place + length :]
    return rng.choice(
        (
            lambda: before + bytes([raw[place] ^ 1 << rng.randrange(8)]) + raw[place + 1 :],
            lambda: before + bytes([rng.randrange(256)]) + raw[place + 1 :],
            lambda: before + rng.randbytes(length) + after,
            lambda: before + bytes(length) + after,
            lambda: before + rng.randbytes(length) + middle + after,
            lambda: before + middle + middle + after,
            lambda: before + after,
            lambda: before,
        )
    )()


def attacked(raw: bytes, rng: random.Random, names: list[str]) -> bytes:
    """One change of which every checksum knows; to one of the compressed weights `names`."""
    opened = Opened.of(raw)
    own = [name for name in names if name in opened.manifest["compressed"]]
    attacks = [manifest_value, header_value, repeated_name]
    if own:
        attacks += [stored_bytes, stored_bytes, side_array, side_array, side_array, shape, part]
    return rng.choice(attacks)(opened, rng, own)


def manifest_value(opened: Opened, rng: random.Random, own: list[str]) -> bytes:
    """Any value anywhere in the manifest becomes another, or is missing."""
    places = list(_places(opened.manifest))
    where, key = rng.choice(places)
    if rng.random() < 0.2:
        del where[key]
    else:
        where[key] = _other(where[key], rng)
    return opened.joined()


def header_value(opened: Opened, rng: random.Random, own: list[str]) -> bytes:
    """Any dtype, shape or offset in the header of the file becomes another."""

    def spoil(header: dict[str, Any]) -> None:
        entry = header[rng.choice([name for name in header if name != "__metadata__"])]
        key = rng.choice(("dtype", "shape", "data_offsets"))
        if key == "dtype":
            entry[key] = rng.choice(("F4", "F8_E4M3", "F16", "F32", "I64", "BOOL", "C64", "U16"))
        elif entry[key] and rng.random() < 0.8:
            place = rng.randrange(len(entry[key]))
            entry[key][place] = _other(entry[key][place], rng)
        else:
            entry[key] = _other(entry[key], rng)

    return opened.joined(spoil)


def repeated_name(opened: Opened, rng: random.Random, own: list[str]) -> bytes:
    """A name in the header, or in the manifest, occurs twice."""
    raw = opened.joined()
    length = struct.unpack("<Q", raw[:8])[0]
    name = rng.choice([*opened.header, "__metadata__"])
    extra = f"{json.dumps(name)}: {rng.choice(('{}', '0', 'null'))}, ".encode()
    text = b"{" + extra + raw[9 : 8 + length]
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


def stored_bytes(opened: Opened, rng: random.Random, own: list[str]) -> bytes:
    """Words or side data damaged, with lengths and checksums that fit."""
    name, what = rng.choice(own), rng.choice(("words", "side"))
    data = opened.data[f"{name}.{what}"]
    data = damaged(data, rng) if data else rng.randbytes(8)
    if what == "words":
        data = data[: len(data) // 4 * 4]
    opened.resize(name, what, data)
    return opened.joined()


def side_array(opened: Opened, rng: random.Random, own: list[str]) -> bytes:
    """Values of one side array become others, and the array is packed again."""
    name = rng.choice(own)
    part = opened.manifest["compressed"][name]["parts"][0]
    data = opened.data[f"{name}.side"]
    first, rest = data[: part["side"]], data[part["side"] :]
    arrays = side.unpack(first, part["rows"], part["columns"])
    key = rng.choice(sorted(arrays))
    array = arrays[key] = arrays[key].copy()
    if array.dtype.kind == "f":
        odd = np.array([np.nan, np.inf, -np.inf, 0.0, 1e-40], dtype=array.dtype)
    else:
        limits = np.iinfo(array.dtype)
        odd = np.array([limits.min, limits.max, 0, 1, limits.max // 2]).astype(array.dtype)
    for _ in range(rng.choice((1, 1, 3, array.size))):
        place = rng.randrange(array.size)
        array.reshape(-1)[place] = rng.choice((*odd, array.reshape(-1)[rng.randrange(array.size)]))
    if array.ndim == 1 and rng.random() < 0.3:
        arrays[key] = array[: rng.randrange(len(array) + 1)]
    if rng.random() < 0.1:
        del arrays[key]
    try:
        packed = side.pack(arrays, part["rows"], part["columns"])
    except ValueError:
        packed = first
    opened.resize(name, "side", packed + rest)
    return opened.joined()


def shape(opened: Opened, rng: random.Random, own: list[str]) -> bytes:
    """Another number of rows or columns, wherever it is written."""
    entry = opened.manifest["compressed"][rng.choice(own)]
    key = rng.choice(("rows", "columns"))
    value = rng.choice((1, 2, 1000, 2**15, 2**20, 2**24, 2**31 - 1))
    for each in entry["parts"]:
        each[key] = value
    matrix = [entry["parts"][0]["rows"], entry["parts"][0]["columns"]]
    entry["shape"][-2:] = matrix[::-1] if entry["transposed"] else matrix
    return opened.joined()


def part(opened: Opened, rng: random.Random, own: list[str]) -> bytes:
    """Another alphabet, quantizer or number of tables, escapes, words or parts."""
    entry = opened.manifest["compressed"][rng.choice(own)]
    chosen = rng.choice(entry["parts"])
    key = rng.choice(("quantizer", "lowest", "size", "escapes", "tables", "escaped", "parts"))
    if key == "quantizer":
        chosen[key] = rng.choice(tuple(QUANTIZERS))
    elif key == "parts":
        count = rng.choice((0, 2, 3, 1000))
        entry["parts"] = [dict(chosen) for _ in range(count)]
        entry["shape"] = [count, *entry["shape"][-2:]]
    else:
        near = [chosen[key] + change for change in (-2, -1, 1, 2)]
        chosen[key] = rng.choice((*near, *near, *ODD_NUMBERS))
    return opened.joined()


def index_value(raw: bytes, rng: random.Random) -> bytes:
    """The index lies: files that are elsewhere, missing or somebody else's."""
    index = json.loads(raw)
    files = index["weight_map"]
    name = rng.choice(sorted(files))
    other = (
        *files.values(),
        "../" + files[name],
        "/etc/passwd",
        "config.json",
        ".",
        "",
        "\0",
        "no",
    )
    if rng.random() < 0.2:
        del files[name]
    elif rng.random() < 0.3:
        index[rng.choice(sorted(index))] = rng.choice(ODD_VALUES)
    else:
        files[name] = rng.choice((*other, *ODD_VALUES))
    return json.dumps(index).encode()


def config_value(raw: bytes, rng: random.Random) -> bytes:
    """Any value of config.json becomes another, or is missing."""
    content = json.loads(raw)
    where, key = rng.choice(list(_places(content)))
    if rng.random() < 0.2:
        del where[key]
    else:
        where[key] = _other(where[key], rng)
    return json.dumps(content).encode()


def mutate(
    directory: Path, seed: str, names: list[str], *, attack: bool, described: bool = False
) -> tuple[Path, bytes]:
    """A file of the directory and what it shall hold instead; the same for the same seed.

    With `described`, config.json may be the file, too.
    """
    rng = random.Random(seed)
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("*.index.json")])
    files += [directory / "config.json"] if described else []
    while True:
        file = rng.choice(files)
        raw = file.read_bytes()
        if not attack:
            changed = damaged(raw, rng)
        elif file.name == "config.json":
            changed = config_value(raw, rng)
        elif file.suffix == ".json":
            changed = index_value(raw, rng)
        else:
            try:
                changed = attacked(raw, rng, names)
            except FormatError:  # a part's own side data, after its size was changed
                continue
        if changed != raw:
            return file, changed


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found = []
    keys = value if isinstance(value, dict) else range(len(value))
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], dict | list):
            found += _places(value[key])
    return found


def _other(value: Any, rng: random.Random) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.6:
        return rng.choice((value + 1, value - 1, -value, 2 * value, value + 2**32, *ODD_NUMBERS))
    if isinstance(value, str) and value and rng.random() < 0.5:
        place = rng.randrange(len(value))
        return value[:place] + rng.choice("0aZ./\n\0é") + value[place + 1 :]
    return rng.choice(ODD_VALUES)
