"""Symbols to words: many independent ANS streams per matrix, written by constriction.

Stream l of a matrix holds the whole rows l, l + S, l + 2S, ... one after the other, so that a
decoder with one lane per stream is at the same column of neighbouring rows all the time
(docs/format.md, "Streams"; the decoder is cerwu_gpu.reference.ans).
"""

from collections.abc import Callable
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from cerwu_gpu.spec import (
    PRECISION,
    STREAM_BITS,
    STREAM_SYMBOLS,
    STREAM_SYMBOLS_MOST,
)

# These are attributes of a compiled module, which the import statement cannot reach into.
AnsCoder = constriction.stream.stack.AnsCoder
Categorical = constriction.stream.model.Categorical

RATE_SAMPLE_ROWS = 64
"""Rows from which the bits of a matrix are estimated, to choose its number of streams."""

_Encoder = Callable[[NDArray[np.int64]], NDArray[np.uint32]]


def stream_count(m: int, n: int) -> int:
    """Return the maximum number of streams of a matrix [m, n]: each holds STREAM_SYMBOLS."""
    rows_per_stream = -(-STREAM_SYMBOLS // n)
    return max(1, m // rows_per_stream)


def encode(
    symbols: NDArray[np.int32],
    tables: NDArray[np.int64],
    row_class: NDArray[np.integer[Any]],
    column_class: NDArray[np.integer[Any]],
    second: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Code a matrix of symbols.

    Args:
        symbols: [m, n] int32, indices 0 ... K-1 into the alphabet.
        tables: [T * Q, K] int64 >= 1, rows summing to 2**PRECISION; Q = 2 with a trellis, else 1.
        row_class, column_class: [m] and [n] integers >= 0; element (i, j) is coded with table
            (row_class[i] + column_class[j]) * Q + second[i, j].
        second: [m, n], the symbols of a trellis's second quantizer; None without a trellis.

    Returns:
        words: uint32, all streams one after the other.
        lengths: [S] uint32, the number of words of each stream; S is stream_count(m, n), less
            where streams would hold fewer than STREAM_BITS, but not so few that they would hold
            more than STREAM_SYMBOLS_MOST symbols.

    Raises:
        ValueError: a symbol or a class is outside the tables.
    """
    m, n = symbols.shape
    count, size = tables.shape
    quantizers = 1 if second is None else 2
    table = np.asarray(row_class, np.int64)[:, None] * quantizers
    columns = np.asarray(column_class, np.int64)[None, :] * quantizers
    if symbols.min() < 0 or symbols.max() >= size:
        raise ValueError(f"a symbol is outside 0 ... {size - 1}.")
    if min(table.min(), columns.min()) < 0 or table.max() + columns.max() > count - quantizers:
        raise ValueError(f"the classes of a row and a column lead past the {count} tables.")
    encoder: _Encoder = _no_choice
    if size > 1:
        encoder = _single_table(tables) if count == 1 else _many_tables(tables)

    def entries(rows: slice) -> NDArray[np.int64]:
        """Return table * K + symbol of all elements of these rows, one after the other."""
        index = table[rows] + columns
        if second is not None:
            index += second[rows]
        index *= size
        index += symbols[rows]
        return index.reshape(-1)

    sample = entries(slice(0, None, max(1, m // RATE_SAMPLE_ROWS)))
    bits = float((PRECISION - np.log2(tables.reshape(-1)[sample])).mean()) * m * n
    most = stream_count(m, n)
    # However few bits they take, long streams would keep a decoder's lanes waiting.
    fewest = -(-m // max(1, STREAM_SYMBOLS_MOST // n))
    streams = max(1, min(most, max(fewest, int(bits / STREAM_BITS))))
    words = [encoder(entries(slice(first, None, streams))) for first in range(streams)]
    lengths = np.array([len(stream) for stream in words], dtype=np.uint32)
    return np.concatenate(words), lengths


def _no_choice(index: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return no words: an alphabet of one symbol needs none."""
    return np.empty(0, dtype=np.uint32)


def _single_table(tables: NDArray[np.int64]) -> _Encoder:
    model = Categorical(tables[0] / (1 << PRECISION), perfect=True)

    def encode_stream(index: NDArray[np.int64]) -> NDArray[np.uint32]:
        coder = AnsCoder()
        coder.encode_reverse(index.astype(np.int32), model)
        return coder.get_compressed()  # type: ignore[no-any-return]

    return encode_stream


def _many_tables(tables: NDArray[np.int64]) -> _Encoder:
    """Encode entry k of table t, given as t * K + k, with a model of its own per symbol.

    All that the coder needs is where the symbol's interval starts and how wide it is, so that three
    probabilities (before, the symbol, after) do instead of K. constriction takes the integers
    exactly when it is given them less one, as float32, without normalising.
    """
    weights, position = _three_way(tables) if tables.shape[1] > 2 else _two_way(tables)
    family = Categorical(perfect=False)

    def encode_stream(index: NDArray[np.int64]) -> NDArray[np.uint32]:
        coder = AnsCoder()
        coder.encode_reverse(position.take(index), family, weights.take(index, axis=0))
        return coder.get_compressed()  # type: ignore[no-any-return]

    return encode_stream


def _two_way(tables: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    weights = np.repeat((tables - 1).astype(np.float32), 2, axis=0)
    return weights, np.tile(np.arange(2, dtype=np.int32), len(tables))


def _three_way(tables: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return weights [T * K, 3] and the position 0, 1 or 2 of the symbol among them."""
    before = np.cumsum(tables, axis=1) - tables
    after = (1 << PRECISION) - before - tables
    three = np.stack([before, tables, after], axis=-1)
    # No probability may be 0: at either end, the interval beside the symbol's is cut in two.
    one = np.ones_like(tables[:, 0])
    three[:, 0] = np.stack([tables[:, 0], after[:, 0] - 1, one], axis=-1)
    three[:, -1] = np.stack([one, before[:, -1] - 1, tables[:, -1]], axis=-1)
    position = np.ones(tables.shape, dtype=np.int32)
    position[:, 0], position[:, -1] = 0, 2
    return (three - 1).reshape(-1, 3).astype(np.float32), position.reshape(-1)
