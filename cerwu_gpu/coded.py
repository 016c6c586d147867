"""A matrix as it is stored: its streams, its tables, and the rule from symbols to weights."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cerwu_gpu.errors import CorruptionError, FormatError
from cerwu_gpu.spec import (
    INTEGER_LIMIT,
    PRECISION,
    STREAM_SYMBOLS_LIMIT,
    SYMBOLS_LIMIT,
    TABLE_SLOTS_LIMIT,
    TRELLIS_INTEGER_LIMIT,
    TRELLIS_NEXT,
)


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix of symbols as it is stored; all tensors on one device.

    Attributes:
        name: its name in error messages.
        shape: (m, n).
        words: 32-bit words of all streams, one after the other, in any integer dtype.
        lengths: [S] integers, words per stream; stream l holds the rows l, l + S, l + 2S, ...
        tables: [T * Q, K] integers >= 1, rows summing to 2**PRECISION; Q = 2 with a trellis,
            else 1.
        row_class, column_class: [m] and [n] integers >= 0, sums below T; element (i, j) has table
            (row_class[i] + column_class[j]) * Q + the quantizer of the trellis state.
        states: trellis states: 0 (no trellis), or a number of spec.TRELLIS_NEXT.
        parity: [K], 0 or 1 per symbol, which drives the trellis.
    """

    name: str
    shape: tuple[int, int]
    words: Tensor
    lengths: Tensor
    tables: Tensor
    row_class: Tensor
    column_class: Tensor
    states: int
    parity: Tensor

    def to(self, device: torch.device | str) -> "CodedMatrix":
        """Return the matrix with its tensors on `device`."""
        return replace(self, **_tensors_on(self, device))


@dataclass(frozen=True)
class Reconstruction:
    """The rule by which the symbols of a matrix [m, n] become weights.

    Attributes:
        lowest, size: symbol s < size is the integer lowest + s (or the position s in the grid);
            every other symbol is an escape.
        escapes: [E] int32, the integers that were escaped, row by row.
        column_step, row_scale: int16 step codes, [n] or [1] and [m] or [1].
        grid: [size] float32, or None.
    """

    lowest: int
    size: int
    escapes: Tensor
    column_step: Tensor
    row_scale: Tensor
    grid: Tensor | None = None

    def to(self, device: torch.device | str) -> "Reconstruction":
        """Return the rule with its tensors on `device`."""
        return replace(self, **_tensors_on(self, device))


def _tensors_on(fields: CodedMatrix | Reconstruction, device: torch.device | str) -> dict[str, Any]:
    return {k: v.to(device) for k, v in vars(fields).items() if isinstance(v, Tensor)}


def check(matrix: CodedMatrix, rule: Reconstruction | None = None) -> None:
    """Refuse a matrix whose fields contradict each other; decoders rely on it.

    Raises:
        CorruptionError: fields that no encoder writes together; `matrix.name` is in the message.
        FormatError: streams, escapes or a grid that docs/format.md rules out.
    """
    broken = _broken_shape(matrix) or _broken_values(matrix)
    if broken:
        raise CorruptionError(f"{matrix.name}: wrong {broken}: get the file again.")
    m, n = matrix.shape
    streams = len(matrix.lengths)
    if -(-m // streams) * n > STREAM_SYMBOLS_LIMIT:
        raise FormatError(f"{matrix.name}: {streams} streams are too few; the file is broken.")
    if rule is not None:
        _check_rule(matrix, rule)


def _broken_shape(matrix: CodedMatrix) -> str | None:
    """Return the name of the first field whose shape is impossible."""
    m, n = matrix.shape
    tables = matrix.tables
    if m < 1 or n < 1 or matrix.states not in (0, *TRELLIS_NEXT):
        return "shape or number of states"
    if matrix.words.ndim != 1 or matrix.lengths.ndim != 1 or not 1 <= len(matrix.lengths) <= m:
        return "number of streams"
    if (
        tables.ndim != 2
        or not 1 <= tables.numel() <= TABLE_SLOTS_LIMIT
        or not 1 <= tables.shape[1] <= SYMBOLS_LIMIT
        or len(tables) % (2 if matrix.states else 1)
    ):
        return "number of tables"
    if matrix.row_class.shape != (m,) or matrix.column_class.shape != (n,):
        return "number of classes"
    if matrix.parity.shape != tables.shape[1:]:
        return "parity"
    return None


def _broken_values(matrix: CodedMatrix) -> str | None:
    """Return the name of the first field, all of the right shape, with impossible values."""
    words, lengths, tables = matrix.words, matrix.lengths.to(torch.int64), matrix.tables
    if not _within(lengths, 0, len(words)) or int(lengths.sum()) != len(words):
        return "number of words"
    if bool((words[lengths.cumsum(0)[lengths > 0] - 1] == 0).any()):
        return "last word of a stream"
    whole = 1 << PRECISION
    if not _within(tables, 1, whole) or bool((tables.sum(1) != whole).any()):
        return "tables"
    most = len(tables) // (2 if matrix.states else 1)
    row, column = matrix.row_class, matrix.column_class
    if not (_within(row, 0, most) and _within(column, 0, most)):
        return "classes"
    if int(row.max()) + int(column.max()) >= most:
        return "classes"
    if not _within(matrix.parity, 0, 1):
        return "parity"
    return None


def _check_rule(matrix: CodedMatrix, rule: Reconstruction) -> None:
    """Raise FormatError where escaped integers or the grid are none that the format allows."""
    limit = TRELLIS_INTEGER_LIMIT if matrix.states else INTEGER_LIMIT
    if not _within(rule.escapes, -limit + 1, limit - 1):
        raise FormatError(f"{matrix.name}: an escaped integer is too large; the file is broken.")
    grid = rule.grid
    if grid is None:
        return
    if len(grid) != rule.size:
        raise FormatError(f"{matrix.name}: side data and manifest disagree on grid.")
    if not bool(torch.isfinite(grid).all()) or bool((grid[1:] <= grid[:-1]).any()):
        raise FormatError(
            f"{matrix.name}: its grid is not finite and ascending; the file is broken."
        )


def _within(values: Tensor, low: int, high: int) -> bool:
    return values.numel() == 0 or (int(values.min()) >= low and int(values.max()) <= high)
