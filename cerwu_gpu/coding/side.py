"""The small integer arrays of a matrix (tables, classes, steps, ...) as one short run of bytes.

Redundancy is taken out first: tables are stored as differences between neighbours, other arrays as
multiples of a common divisor above a base, steps less what their column's class predicts. The rest
goes through deflate, each array by itself (docs/format.md, "Side data").
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cerwu_gpu.coding.streams import stream_count
from cerwu_gpu.errors import FormatError
from cerwu_gpu.spec import SYMBOLS_LIMIT, TABLE_SLOTS_LIMIT

_SLOPE_MAX = 1 << 15
_DEFLATED = 0x10


@dataclass(frozen=True)
class _Field:
    """One array: its byte in the file; shape: rows, columns, streams, tables, escapes or grid."""

    id: int
    dtype: str
    shape: str
    predictor: str | None = None


_FIELDS = {
    "table_codes": _Field(1, "<u1", "tables"),
    "row_class": _Field(2, "<u1", "rows"),
    "column_class": _Field(3, "<u1", "columns"),
    "step_code": _Field(4, "<i2", "columns", predictor="column_class"),
    "row_scale_code": _Field(5, "<i2", "rows", predictor="row_class"),
    "lengths": _Field(8, "<u4", "streams"),
    "escapes": _Field(9, "<i4", "escapes"),
    "grid": _Field(10, "<f4", "grid"),
}
_COUNTED = ("streams", "escapes", "grid")
"""Shapes whose length is stored."""
_NAMES = {field.id: name for name, field in _FIELDS.items()}


def pack(arrays: Mapping[str, NDArray[Any]], m: int, n: int) -> bytes:
    """Write the arrays of a matrix [m, n]; only those that are given are stored.

    Args:
        arrays: any of
            table_codes [T, Q, K] uint8 (Q = 2 with a trellis, else 1),
            row_class [m] uint8, column_class [n] uint8,
            step_code [n] int16, row_scale_code [m] int16,
            lengths [at most stream_count(m, n)] uint32, escapes [any] int32, grid [any] float32.

    Raises:
        ValueError: an array has another name, dtype or shape.
    """
    for name in arrays.keys() - _FIELDS.keys():
        raise ValueError(f"{name} is no side array: give one of {', '.join(_FIELDS)}.")
    out = bytearray()
    for name, field in _FIELDS.items():
        if name in arrays:
            _check(name, arrays[name], m, n)
            predictor = arrays.get(field.predictor) if field.predictor else None
            out += _pack_array(field, arrays[name], predictor)
    return bytes(out)


def packed_size(name: str, array: NDArray[Any], predictor: NDArray[Any]) -> int:
    """Return how many bytes of `pack`'s are those of one array.

    Args:
        name: an array that has a predictor: step_code or row_scale_code.
        array: the values, of that array's dtype.
        predictor: the array that it is predicted from, of equal length.
    """
    return len(_pack_array(_FIELDS[name], array, predictor))


def unpack(blob: bytes, m: int, n: int, *, escapes: int | None = None) -> dict[str, NDArray[Any]]:
    """Read the arrays that `pack` wrote for a matrix [m, n].

    No more memory is taken than arrays of the shapes that belong to m and n need.

    Args:
        escapes: the most that there may be; default: as many as weights.

    Raises:
        FormatError: the bytes are not what `pack` writes for any arrays of such a matrix.
    """
    return _read(blob, m, n, escapes)[0]


def sizes(blob: bytes, m: int, n: int) -> dict[str, int]:
    """Return the bytes that each array in `blob` takes; they add up to all of it.

    Raises:
        FormatError: as `unpack`.
    """
    return _read(blob, m, n, None)[1]


def _read(
    blob: bytes, m: int, n: int, escapes: int | None
) -> tuple[dict[str, NDArray[Any]], dict[str, int]]:
    """Return the arrays in `blob` and the bytes of each."""
    reader = _Reader(blob)
    arrays: dict[str, NDArray[Any]] = {}
    taken: dict[str, int] = {}
    last = 0
    while reader.left:
        before = len(reader.left)
        number = reader.byte()
        if number not in _NAMES or number <= last:
            raise FormatError(f"side data: array {number} is unknown or out of order.")
        last, name = number, _NAMES[number]
        field = _FIELDS[name]
        predictor = arrays.get(field.predictor) if field.predictor else None
        most = escapes if name == "escapes" and escapes is not None else _length(field.shape, m, n)
        arrays[name] = _unpack_array(reader, name, field, predictor, most)
        taken[name] = before - len(reader.left)
    return arrays, taken


def _pack_array(field: _Field, array: NDArray[Any], predictor: NDArray[Any] | None) -> bytes:
    if field.shape == "tables":
        head = b"".join(map(_unsigned, array.shape))
        return bytes([field.id]) + _pack_items(head, _differences(array))
    head = _unsigned(len(array)) if field.shape in _COUNTED else b""
    values = _as_integers(array)
    least = int(values.min()) if values.size else 0
    divisor = int(np.gcd.reduce(values - least)) or 1
    units = (values - least) // divisor
    candidates = []
    for slope in _slopes(units, predictor):
        rest = units if predictor is None else units - slope * predictor.astype(np.int64)
        low = int(rest.min()) if rest.size else 0
        affine = _signed(least + divisor * low) + _unsigned(divisor)
        if field.predictor:
            affine += _signed(slope)
        candidates.append(_pack_items(head + affine, rest - low))
    return bytes([field.id]) + min(candidates, key=len)


def _unpack_array(
    reader: "_Reader", name: str, field: _Field, predictor: NDArray[Any] | None, most: int
) -> NDArray[Any]:
    coding = reader.byte()
    if field.shape == "tables":
        shape = (reader.unsigned(), reader.unsigned(), reader.unsigned())
        if shape[1] > 2 or not 0 < shape[0] * shape[1] * shape[2] <= TABLE_SLOTS_LIMIT:
            raise FormatError(f"side data: {name} cannot have the shape {shape}.")
        if coding & ~_DEFLATED > 1:
            raise FormatError(f"side data: {name} has the unknown coding {coding}.")
        differences = _unpack_items(reader, coding, shape[0] * shape[1] * shape[2], name)
        return _sums(differences.astype(np.uint8).reshape(shape))
    count = most
    if field.shape in _COUNTED:
        count = reader.unsigned()
        if count > most:
            raise FormatError(f"side data: {name} has {count} values: {most} are possible.")
    base, divisor = reader.signed(), reader.unsigned()
    slope = reader.signed() if field.predictor else 0
    if abs(slope) > _SLOPE_MAX or (slope and predictor is None):
        raise FormatError(f"side data: {name} cannot be predicted.")
    units = _unpack_items(reader, coding, count, name)
    if slope and predictor is not None:
        units += slope * predictor.astype(np.int64)
    return _from_integers(name, field, base, divisor, units)


def _pack_items(head: bytes, items: NDArray[np.int64]) -> bytes:
    """Return coding byte, head and payload: the items' bytes by significance, lowest first."""
    greatest = int(items.max()) if items.size else 0
    width = next(w for w in (0, 1, 2, 4) if greatest < 1 << 8 * w)
    if not width:
        return bytes([0]) + head
    planes = items.astype("<u4").reshape(-1, 1).view(np.uint8)[:, :width].T.tobytes()
    packed = min((_deflate(planes, strategy) for strategy in range(4)), key=len)
    deflated = _unsigned(len(packed)) + packed
    if len(deflated) < len(planes):
        return bytes([width | _DEFLATED]) + head + deflated
    return bytes([width]) + head + planes


def _unpack_items(reader: "_Reader", coding: int, count: int, name: str) -> NDArray[np.int64]:
    width, deflated = coding & ~_DEFLATED, bool(coding & _DEFLATED)
    if width not in (0, 1, 2, 4):
        raise FormatError(f"side data: {name} has the unknown coding {coding}.")
    size = count * width
    planes = _inflate(reader.take(reader.unsigned()), size) if deflated else reader.take(size)
    if len(planes) != size:
        raise FormatError(f"side data: {name} has {len(planes)} bytes: it must have {size}.")
    parts = np.frombuffer(planes, dtype=np.uint8).reshape(width, count).astype(np.int64)
    items = np.zeros(count, dtype=np.int64)
    for place, part in enumerate(parts):
        items += part << (8 * place)
    return items


def _deflate(data: bytes, strategy: int) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    return coder.compress(data) + coder.flush()


def _inflate(data: bytes, size: int) -> bytes:
    coder = zlib.decompressobj(-15)
    try:
        # One byte more than is wanted, so that data of the wrong size is seen as such.
        out = coder.decompress(data, size + 1)
    except zlib.error as error:
        raise FormatError(f"side data: deflate fails ({error}).") from error
    if not coder.eof or coder.unused_data:
        raise FormatError("side data: a deflate stream does not end where it must.")
    return out


def _differences(codes: NDArray[np.uint8]) -> NDArray[np.int64]:
    along = np.diff(codes, axis=2, prepend=np.uint8(0))
    return np.diff(along, axis=0, prepend=np.uint8(0)).astype(np.int64).reshape(-1)


def _sums(differences: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Undo `_differences`; sums of uint8 are taken modulo 256."""
    return differences.cumsum(axis=0, dtype=np.uint8).cumsum(axis=2, dtype=np.uint8)


def _slopes(units: NDArray[np.int64], predictor: NDArray[Any] | None) -> list[int]:
    """Return slopes worth trying: none, and the integers next to the least squares fit."""
    if predictor is None or not units.size:
        return [0]
    spread = predictor - predictor.mean()
    power = float(spread @ spread)
    fit = round(float(spread @ units) / power) if power else 0
    return [0, *(s for s in (fit - 1, fit, fit + 1) if s and abs(s) <= _SLOPE_MAX)]


def _as_integers(array: NDArray[Any]) -> NDArray[np.int64]:
    """Return the values as int64, floats by their bits."""
    bits = array.astype("<f4").view("<u4") if array.dtype.kind == "f" else array
    return bits.astype(np.int64)


def _from_integers(
    name: str, field: _Field, base: int, divisor: int, units: NDArray[np.int64]
) -> NDArray[Any]:
    dtype = np.dtype(field.dtype)
    integer = np.dtype("<u4") if dtype.kind == "f" else dtype
    if units.size:
        low, high = base + divisor * int(units.min()), base + divisor * int(units.max())
        limits = np.iinfo(integer)
        if low < limits.min or high > limits.max:
            raise FormatError(f"side data: {name} has values that are no {dtype.name}.")
    else:
        base = 0
    return (base + divisor * units).astype(integer).view(dtype)


def _length(shape: str, m: int, n: int) -> int:
    """Return the length that an array must have, or the most that it may have."""
    return {
        "rows": m,
        "columns": n,
        "streams": stream_count(m, n),
        "escapes": m * n,
        "grid": SYMBOLS_LIMIT,
        "tables": TABLE_SLOTS_LIMIT,
    }[shape]


def _check(name: str, array: NDArray[Any], m: int, n: int) -> None:
    field = _FIELDS[name]
    right = array.dtype == np.dtype(field.dtype)
    if field.shape == "tables":
        right &= array.ndim == 3 and array.shape[1] <= 2 and 0 < array.size <= TABLE_SLOTS_LIMIT
    elif field.shape in _COUNTED:
        right &= array.ndim == 1 and len(array) <= _length(field.shape, m, n)
    else:
        right &= array.shape == (_length(field.shape, m, n),)
    if not right:
        raise ValueError(f"{name} {array.dtype} {array.shape} does not fit a matrix [{m}, {n}].")


def _unsigned(value: int) -> bytes:
    """Code a number in seven bits a byte, lowest first; the top bit is set if more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _signed(value: int) -> bytes:
    """Code 0, -1, 1, -2, ... as 0, 1, 2, 3, ..."""
    return _unsigned(2 * value if value >= 0 else -2 * value - 1)


class _Reader:
    """Reads from the front of some bytes, and never past their end."""

    def __init__(self, blob: bytes) -> None:
        self.left = memoryview(blob)

    def take(self, size: int) -> bytes:
        if size > len(self.left):
            raise FormatError("side data: it ends too early.")
        taken, self.left = self.left[:size], self.left[size:]
        return bytes(taken)

    def byte(self) -> int:
        return self.take(1)[0]

    def unsigned(self) -> int:
        value = 0
        for place in range(0, 35, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << place
            if byte < 0x80:
                return value
        raise FormatError("side data: a number is too long.")

    def signed(self) -> int:
        value = self.unsigned()
        return -(value + 1 >> 1) if value & 1 else value >> 1
