"""A matrix of symbols as it is stored, and the checks that it passes before it is decoded."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cerwu_gpu.errors import CorruptionError
from cerwu_gpu.spec import PRECISION, TRELLIS_NEXT, WORD_BITS


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix of symbols as it is stored; all tensors on one device.

    Attributes:
        name: what error messages call it.
        shape: (m, n).
        words: 32-bit words of all streams, one after the other, in any integer dtype.
        lengths: [S] integers, words per stream; stream l holds the rows l, l + S, l + 2S, ...
        tables: [T * Q, K] integers >= 1, rows summing to 2**PRECISION; Q = 2 with a trellis,
            else 1.
        row_class, column_class: [m] and [n] integers >= 0, sums below T; element (i, j) has table
            (row_class[i] + column_class[j]) * Q + the quantizer of the trellis state.
        states: trellis states: 0 (no trellis), 4 or 8.
        parity: [K], 0 or 1 per symbol: what it tells the trellis.
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


def checked(matrix: CodedMatrix) -> CodedMatrix:
    """The matrix with int64 tensors, after every check that keeps the loop inside its arrays."""
    m, n = matrix.shape
    fields = ("words", "lengths", "tables", "row_class", "column_class", "parity")
    matrix = replace(matrix, **{name: getattr(matrix, name).to(torch.int64) for name in fields})
    words, lengths, tables = matrix.words, matrix.lengths, matrix.tables
    row_class, column_class, parity = matrix.row_class, matrix.column_class, matrix.parity
    quantizers = 2 if matrix.states else 1
    broken = None
    if m < 1 or n < 1 or matrix.states not in (0, *TRELLIS_NEXT):
        broken = "shape or number of states"
    elif words.ndim != 1 or lengths.ndim != 1 or not 1 <= len(lengths) <= m:
        broken = "number of streams"
    elif not _within(lengths, 0, len(words)) or int(lengths.sum()) != len(words):
        broken = "number of words"
    elif bool((words[lengths.cumsum(0)[lengths > 0] - 1] == 0).any()):
        broken = "last word of a stream"
    elif tables.ndim != 2 or tables.numel() == 0 or len(tables) % quantizers:
        broken = "number of tables"
    elif not _within(tables, 1, 1 << PRECISION) or bool((tables.sum(1) != 1 << PRECISION).any()):
        broken = "tables"
    elif row_class.shape != (m,) or column_class.shape != (n,):
        broken = "number of classes"
    elif (
        not _within(row_class, 0, len(tables))
        or not _within(column_class, 0, len(tables))
        or int(row_class.max() + column_class.max()) >= len(tables) // quantizers
    ):
        broken = "classes"
    elif parity.shape != tables.shape[1:] or not _within(parity, 0, 1):
        broken = "parity"
    if broken:
        raise CorruptionError(f"{matrix.name}: wrong {broken}: get the file again.")
    return replace(matrix, words=words & ((1 << WORD_BITS) - 1))


def _within(values: Tensor, low: int, high: int) -> bool:
    return values.numel() == 0 or (int(values.min()) >= low and int(values.max()) <= high)
