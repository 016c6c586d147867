"""A second decoder of the cerwu format, versions 1 and 2, written from docs/format.md alone.

It needs numpy and the standard library only. Names in quotation marks are sections of that
document. Whatever does not fit raises ValueError with the name of the tensor, or of the file or
directory where no tensor is to blame. `python tests/independent_decoder.py DIR` prints name, shape,
dtype and SHA-256 of the little-endian bytes of each weight.
"""

import hashlib
import io
import json
import math
import sys
import zlib
from bisect import bisect_right
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
Json = dict[str, Any]
LIMIT = 2**31
MOST = 2**1024 - 2**970 - 1  # the largest integer that does not round to an infinite float64
CODE_WEIGHTS = np.array(  # "Tables"
    [1073741824, 984625594, 902905651, 827968132, 759250125, 696235434, 638450708, 585461881]
)


def register(states: int, f: int, e: int) -> tuple[list[int], ...]:
    """ "Trellis": QUANTIZER, NEXT even and NEXT odd of a shift register."""
    even = [s // 2 ^ (f if s % 2 else 0) for s in range(states)]
    return [s % 2 for s in range(states)], even, [to ^ e for to in even]


# "Trellis": QUANTIZER, NEXT even and NEXT odd; without a trellis there is one state
TRELLIS = {
    **dict.fromkeys(("scalar", "grid"), ([0], [0], [0])),
    "trellis4": ([0, 0, 1, 1], [0, 2, 1, 3], [2, 0, 3, 1]),
    "trellis8": ([0, 1] * 4, [0, 5, 1, 6, 2, 4, 3, 7], [2, 7, 3, 4, 0, 6, 1, 5]),
    "trellis16": register(16, 13, 4),
    "trellis32": register(32, 24, 5),
}
SINCE = {"trellis16": 2, "trellis32": 2}  # "The manifest": versions of quantizers
# The dtypes of safetensors whose values numpy can hold, and BF16.
DTYPES = {"BOOL": "bool", "I8": "int8", "U8": "uint8", "C64": "complex64", "BF16": "bfloat16"}
DTYPES |= {f"{k[0].upper()}{b}": f"{k}{b}" for k in ("int", "uint", "float") for b in (16, 32, 64)}
Wanted = dict[int, tuple[tuple[int, ...], range]]  # id of an array -> its shape, its values


class Weight(NamedTuple):
    dtype: str  # a name in DTYPES, or what safetensors calls another one
    array: Array  # little-endian; the bits of bfloat16, the bytes of a dtype that DTYPES lacks

    def sha256(self) -> str:
        return hashlib.sha256(self.array.tobytes()).hexdigest()


def check(condition: Any, where: str, problem: str) -> None:
    if not condition:
        raise ValueError(f"{where}: {problem}")


def parse_json(text: str | bytes, where: str) -> Json:
    """ "The manifest": no name occurs twice in an object, at any depth."""

    def unique(pairs: list[tuple[str, Any]]) -> Json:
        check(len(dict(pairs)) == len(pairs), where, "a name occurs twice in an object")
        "".join(dict(pairs)).encode()  # refuses half a surrogate pair
        return dict(pairs)

    try:  # int refuses NaN and Infinity, which JSON does not have
        value = json.loads(text, object_pairs_hook=unique, parse_constant=int)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from error
    check(isinstance(value, dict), where, "not a JSON object")
    return dict(value)


def field(fields: Any, name: str, kind: type, where: str, allowed: range | None = None) -> Any:
    """ "The manifest": no field may be missing, and `true` is no integer."""
    value = fields.get(name) if isinstance(fields, dict) else None
    check(type(value) is kind and (allowed is None or value in allowed), where, f"{name}: {value}")
    return value


def header_sha256(manifest: str, header: Json) -> str:
    """ "The manifest", checksum of the header."""
    lines = (" ".join(map(str, (n, x["dtype"], *x["shape"]))) for n, x in sorted(header.items()))
    return hashlib.sha256("\n".join([manifest, *lines]).encode()).hexdigest()


def read_tensor(name: str, entry: Any, data: memoryview) -> Weight:
    """ "The directory": a tensor as it is stored."""
    dtype, shape = field(entry, "dtype", str, name), field(entry, "shape", list, name)
    span = field(entry, "data_offsets", list, name)
    fits = len(span) == 2 and all(type(x) is int and 0 <= x < 2**48 for x in shape + span)
    check(fits and span[0] <= span[1], name, f"shape {shape}, data_offsets {span}")
    array = np.frombuffer(data[slice(*span)], np.uint8)
    if dtype in DTYPES:
        kind = np.dtype(DTYPES[dtype].replace("bfloat", "uint")).newbyteorder("<")
        check(kind.itemsize * math.prod(shape) == len(array), name, "shape and offsets differ")
        array = array.view(kind).reshape(shape)
    return Weight(DTYPES.get(dtype, dtype), array)


class Matrix:
    """A part: "The manifest", with its "Checks before allocation", "Streams" and "Tables"."""

    def __init__(self, fields: Json, where: str):
        def integer(name: str, low: int = 0, high: int = LIMIT) -> int:
            return int(field(fields, name, int, where, range(low, high)))

        self.where = where
        self.rows, self.columns = integer("rows", 1), integer("columns", 1)
        self.lowest, self.size = integer("lowest", -LIMIT), integer("size", 1)
        self.word_count, self.side_count = integer("words"), integer("side")
        self.escapes, self.escaped = integer("escapes"), integer("escaped")
        self.classes = integer("tables", 1, min(511, self.rows + self.columns) + 1)
        self.quantizer: str = field(fields, "quantizer", str, where)
        check(self.quantizer in TRELLIS, where, f"quantizer is {self.quantizer}")
        loss = fields.get("relative_loss", "")
        finite = type(loss) in (int, float) and -MOST <= loss <= MOST
        check(loss is None or finite, where, f"relative_loss is {loss}")
        self.trellis, grid = "trellis" in self.quantizer, self.quantizer == "grid"
        self.quantizers = 1 + self.trellis  # Q
        count, self.symbols = self.rows * self.columns, self.size + self.escapes  # K
        fits = self.escapes in (0, self.quantizers)
        check(fits and self.escaped <= (count if self.escapes else 0), where, "escapes or escaped")
        self.slots = self.classes * self.quantizers * self.symbols
        check(self.symbols <= 65536 and self.slots <= 2**20, where, f"{self.symbols} symbols")
        check(not grid or self.lowest == self.escapes == 0, where, "lowest or escapes of a grid")
        integers = range(1 - 2**30, 2**30) if self.trellis else range(1 - LIMIT, LIMIT)
        check(self.lowest in integers and self.lowest + self.size - 1 in integers, where, "lowest")
        self.mirrored = self.size % 2 == 1 and self.lowest == -(self.size // 2)
        self.codes = self.size // 2 + 1 + self.escapes if self.mirrored else self.symbols
        most_streams = max(1, self.rows // -(-4096 // self.columns))  # "Streams"
        m, n, byte, short = (self.rows,), (self.columns,), range(256), range(-(2**15), 2**15)
        self.wanted: Wanted = {1: ((self.classes, self.quantizers, self.codes), range(192))}
        self.wanted |= {2: (m, byte), 3: (n, byte), 4: (n, short), 5: (m, short)}
        self.wanted |= {8: ((most_streams,), range(2**32))}  # at most so many
        self.wanted |= {9: ((self.escaped,), integers)} if self.escaped else {}
        self.wanted |= {10: ((self.size,), range(2**32))} if grid else {}

    def read(self, side: bytes, words: Array) -> None:
        self.arrays, self.words = read_side(side, self.wanted, f"{self.where}, side data"), words
        lengths, ends = self.arrays[8], np.cumsum(self.arrays[8])
        check(-(-self.rows // len(lengths)) * self.columns <= 2**17, self.where, "few streams")
        check(ends[-1] == len(words), self.where, "the lengths do not sum to words")
        check(words[ends[lengths > 0] - 1].all(), self.where, "the last word of a stream is 0")
        check(self.arrays[2].max() + self.arrays[3].max() < self.classes, self.where, "classes")
        codes = self.arrays[1].reshape(-1, self.codes)
        if self.mirrored:  # -M ... -1, then 0 ... M and the escapes
            codes = np.concatenate([codes[:, self.size // 2 : 0 : -1], codes], axis=1)
        w = CODE_WEIGHTS[codes % 8] >> (codes // 8)
        k = self.tables = 1 + w * (2**24 - self.symbols) // w.sum(axis=1, keepdims=True)
        k[np.arange(len(k)), k.argmax(axis=1)] += 2**24 - k.sum(axis=1)  # the first of equals
        grid = self.grid = self.arrays.get(10, np.zeros(1)).astype(np.uint32).view(np.float32)
        check(np.isfinite(grid).all() and (grid[1:] > grid[:-1]).all(), self.where, "bad grid")


def read_side(content: bytes, wanted: Wanted, where: str) -> dict[int, Array]:
    """ "Side data": the arrays in int64, by id."""
    stream = io.BytesIO(content)
    arrays: dict[int, Array] = {}

    def take(count: int) -> bytes:
        found = stream.read(count)
        check(len(found) == count, where, "too short")
        return found

    def unsigned() -> int:
        groups = list(take(1))
        while groups[-1] >= 128:
            groups += take(1)
        check(len(groups) <= 5, where, "a number has more than 5 bytes")
        return sum((group & 127) << 7 * i for i, group in enumerate(groups))

    def signed() -> int:
        value = unsigned()
        return -(value + 1) // 2 if value & 1 else value // 2

    for identity, (shape, allowed) in wanted.items():  # the ids increase
        found, coding = take(2)
        check(found == identity, where, f"id {found} in place of {identity}")
        width, deflated = coding & ~16, coding & 16
        check(width in ((0, 1) if identity == 1 else (0, 1, 2, 4)), where, f"coding {coding}")
        if identity in (1, 8, 9, 10):
            stored = tuple(unsigned() for _ in shape)
            fits = 1 <= stored[0] <= shape[0] if identity == 8 else stored == shape
            check(fits, where, f"array {identity} has the shape {stored}")
            shape = stored
        base, divisor = (signed(), unsigned()) if identity > 1 else (0, 1)
        slope = signed() if identity in (4, 5) else 0
        check(abs(slope) <= 2**15, where, f"slope {slope}")
        size = math.prod(shape) * width
        payload = take(unsigned() if deflated else size)
        if deflated:
            inflater = zlib.decompressobj(-15)
            try:
                payload = inflater.decompress(payload, size + 1)
            except zlib.error as error:
                raise ValueError(f"{where}: {error}") from error
            fits = inflater.eof and not inflater.unused_data and len(payload) == size
            check(fits, where, f"array {identity} inflates to another size")
        planes = np.frombuffer(payload, np.uint8).reshape(width, *shape).astype(np.int64)
        u = sum((planes[p] << 8 * p for p in range(width)), np.zeros(shape, np.int64))
        if identity == 1:
            u = u.cumsum(axis=0).cumsum(axis=2) % 256
        if slope:  # predicted from column_class or row_class
            u += slope * arrays[{4: 3, 5: 2}[identity]]
        # A product may exceed 64 bits, but not where both ends are allowed; these are exact.
        ends = [base + divisor * int(end) for end in (u.min(), u.max())]
        check(all(x in allowed for x in ends), where, f"array {identity} is out of range")
        arrays[identity] = base + divisor * u
    check(not stream.read(1), where, "bytes are left over")
    return arrays


def decode_streams(x: Matrix) -> tuple[Array, Array]:
    """ "Streams", "Decoding" and "Trellis": [m, n] table and symbol of each element."""
    tables, words = x.tables.tolist(), x.words.tolist()
    cdfs = [list(accumulate(k, initial=0)) for k in tables]
    parity = [q & 1 for q in range(x.lowest, x.lowest + x.size)] + [0, 1]  # escapes: even, odd
    quantizer, *following = TRELLIS[x.quantizer]
    row_table, column_table = ((x.arrays[id_] * x.quantizers).tolist() for id_ in (2, 3))
    decoded = np.zeros((2, x.rows, x.columns), np.int64)
    for stream, length in enumerate(x.arrays[8].tolist()):
        stack, words, state = words[:length], words[length:], 0
        for _ in range(2):
            state = state << 32 | stack.pop() if stack else state
        for row in range(stream, x.rows, len(x.arrays[8])):
            trellis, elements = 0, []
            for column in column_table:
                table = row_table[row] + column + quantizer[trellis]
                v = state & (2**24 - 1)
                s = bisect_right(cdfs[table], v) - 1
                state = (state >> 24) * tables[table][s] + v - cdfs[table][s]
                if state < 2**32 and stack:
                    state = state << 32 | stack.pop()
                trellis = following[parity[s]][trellis]
                elements.append((table, s))
            decoded[:, row] = np.array(elements).T
        check(state == 0 and not stack, x.where, f"stream {stream} has words or a state left")
    return decoded[0], decoded[1]


def matrix_weights(x: Matrix, dtype: str) -> Array:
    """ "Symbols, integers and escapes" and "From integers to weights"."""
    table, symbol = decode_streams(x)
    q, escape = symbol + x.lowest, symbol >= x.size
    check(escape.sum() == x.escaped, x.where, f"{escape.sum()} escape symbols")
    q[escape] = x.arrays.get(9, 0)
    fits = not x.trellis or ((q & 1)[escape] == (symbol - x.size)[escape]).all()
    check(fits, x.where, "parity of an escaped integer")
    if x.trellis:  # u is the last bit of the table's number
        q = 2 * q - table % 2 * np.sign(q)
    level = x.grid[q] if x.quantizer == "grid" else q.astype(np.float32)
    f = np.array([2.0 ** (k / 256) for k in range(256)], np.float32).astype(np.float64)
    step, scale = (np.ldexp(f[s % 256], s // 256) for s in (x.arrays[4], x.arrays[5]))
    with np.errstate(all="ignore"):  # the ldexp is exact in float64
        w = level * step.astype(np.float32) * scale.astype(np.float32)[:, None]
        b: Array = w.view(np.uint32)
        rounded: Array = b + 32767 + (b >> 16 & 1) >> 16
        return rounded.astype(np.uint16) if dtype == "bfloat16" else np.asarray(w, dtype)


def read_entry(name: str, entry: Any) -> list[Matrix]:
    """ "The manifest": the matrices of a compressed parameter."""
    parts, shape = field(entry, "parts", list, name), field(entry, "shape", list, name)
    step = -1 if field(entry, "transposed", bool, name) else 1
    check(entry.get("dtype") in ["float32", "bfloat16", "float16"], name, "dtype")
    matrices = [Matrix(part, f"{name} (part {i})") for i, part in enumerate(parts)]
    sizes = {(x.rows, x.columns)[::step] for x in matrices}
    check(len(sizes) == 1, name, "no parts, or parts of several sizes")
    fits = all(type(x) is int for x in shape)
    if len(shape) == 4:  # a convolution
        rows, columns = next(iter(sizes))
        filled = [rows * len(parts), columns] == [shape[0], math.prod(shape[1:])]
        fits = fits and step == 1 and filled and min(shape) > 0
    else:
        fits = fits and tuple(shape[-2:]) in sizes and (shape[:-2] or [1]) == [len(parts)]
    check(fits, name, f"shape is {shape}")
    return matrices


class File:
    """ "The directory" and "The manifest": what can be told of a file before it is decoded."""

    def __init__(self, path: Path):
        check(path.is_file(), path.name, "missing")
        content = path.read_bytes()
        self.size, length = len(content), 8 + int.from_bytes(content[:8], "little")
        header = parse_json(content[8:length], path.name)
        start = content[8:9] == b"{" and content[8:length].rstrip(b" ").endswith(b"}")
        check(start, path.name, "white space around the header")
        metadata = header.pop("__metadata__", {})
        text = field(metadata, "cerwu", str, f"{path.name}, metadata")
        manifest = parse_json(text, f"manifest of {path.name}")
        version = field(manifest, "version", int, path.name, range(1, sys.maxsize))  # "Versions"
        check(version <= 2, path.name, f"version {version}: a newer program wrote it")
        self.tensors, spans = {}, []
        for name, entry in header.items():
            self.tensors[name] = read_tensor(name, entry, memoryview(content)[length:])
            spans.append(entry["data_offsets"])
        places = [0, *chain(*sorted(spans)), self.size - length]
        check(places[::2] == places[1::2], path.name, "bytes without a tensor, or of several")
        digest = field(metadata, "cerwu_sha256", str, f"{path.name}, metadata")
        check(digest == header_sha256(text, header), path.name, "SHA-256 of the header differs")
        field(manifest, "generator", str, path.name)
        self.compressed: Json = field(manifest, "compressed", dict, path.name)
        self.plain: Json = field(manifest, "plain_sha256", dict, path.name)
        self.matrices = {name: read_entry(name, x) for name, x in self.compressed.items()}
        for name, matrices in self.matrices.items():
            newest = max(SINCE.get(x.quantizer, 1) for x in matrices)
            check(newest <= version, name, f"a quantizer that version {version} lacks")
        checksums = dict(self.plain)
        for name, entry in self.compressed.items():
            for suffix, dtype in (("words", "uint32"), ("side", "uint8")):
                stored, tensor = f"{name}.{suffix}", self.tensors.get(f"{name}.{suffix}")
                fits = tensor and (tensor.dtype, tensor.array.ndim) == (dtype, 1)
                check(fits and stored not in checksums, stored, f"not one, of one axis of {dtype}")
                checksums[stored] = entry.get(f"{suffix}_sha256")
        wrong = ", ".join(sorted(self.tensors.keys() ^ checksums.keys()))
        check(not wrong, wrong, "in the file or in its manifest alone")
        for name, checksum in checksums.items():
            check(self.tensors[name].sha256() == checksum, name, "SHA-256 differs")

    def decode(self) -> dict[str, Weight]:
        weights = {name: self.tensors[name] for name in self.plain}
        for name, matrices in self.matrices.items():
            words = self.tensors[f"{name}.words"].array
            side = self.tensors[f"{name}.side"].array.tobytes()
            check(len(words) == sum(x.word_count for x in matrices), f"{name}.words", "length")
            check(len(side) == sum(x.side_count for x in matrices), f"{name}.side", "length")
            for x in matrices:
                x.read(side[: x.side_count], words[: x.word_count])
                words, side = words[x.word_count :], side[x.side_count :]
            entry = self.compressed[name]  # "Parameters"
            array = np.stack([matrix_weights(x, entry["dtype"]) for x in matrices])
            array = array.swapaxes(1, 2) if entry["transposed"] else array
            array = array.reshape(entry["shape"]).astype(array.dtype.newbyteorder("<"))
            weights[name] = Weight(entry["dtype"], array)
        return weights


def decode(directory: str | Path) -> dict[str, Weight]:
    """ "Reading a directory": all weights; the other names of tied tensors are not added."""
    folder, index = Path(directory), Path(directory) / "model.safetensors.index.json"
    places: Json = {}
    if index.exists():
        places = field(parse_json(index.read_bytes(), index.name), "weight_map", dict, index.name)
        check(places, index.name, "it names no file")
    for name, file in places.items():
        fits = isinstance(file, str) and file == Path(file).name and "\\" not in file and file
        check(fits, name, f"not a file name: {file!r}")
    files = {name: File(folder / name) for name in set(places.values()) or ["model.safetensors"]}
    stored = [(tensor, name) for name, file in files.items() for tensor in file.tensors]
    wrong = {name for name, _ in places.items() ^ set(stored)} if places else set()
    check(not wrong, ", ".join(sorted(wrong)), f"{index.name} and the files disagree")
    check(len(dict(stored)) == len(stored), folder.name, "a tensor is there twice")
    named = [name for file in files.values() for name in (*file.compressed, *file.plain)]
    check(len(set(named)) == len(named), folder.name, "a parameter is there twice")
    size = sum(file.size for file in files.values())  # B of "Checks before allocation"
    matrices = [x for file in files.values() for parts in file.matrices.values() for x in parts]
    check(sum(x.rows * x.columns for x in matrices) <= 256 * size, folder.name, "too many weights")
    check(sum(x.slots for x in matrices) <= 64 * size + 2**20, folder.name, "too large tables")
    return {name: weight for file in files.values() for name, weight in file.decode().items()}


if __name__ == "__main__":
    for name, weight in sorted(decode(sys.argv[1]).items()):
        print(name, list(weight.array.shape), weight.dtype, weight.sha256())
