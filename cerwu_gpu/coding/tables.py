"""Probability tables: floats become integers once, here; every decoder then builds the same ones.

A table over K symbols is stored as K codes, one byte each: code c stands for a probability
proportional to 2**(-c / CODE_RESOLUTION). `table_from_codes` turns codes into the integers that the
coder uses, with integer arithmetic only (docs/format.md, "Tables").
"""

import numpy as np
from numpy.typing import NDArray

from cerwu_gpu.errors import FormatError
from cerwu_gpu.spec import CODE_MAX, CODE_RESOLUTION, CODE_WEIGHTS, PRECISION, SYMBOLS_LIMIT


def codes_from_counts(counts: NDArray[np.int64], smoothing: float = 1 / 16) -> NDArray[np.uint8]:
    """Return the codes of the tables that fit the histograms `counts`.

    Args:
        counts: [T, K] int64 >= 0, one histogram a row.
        smoothing: added to every bin, so that a symbol that was not seen can still be coded.

    Returns:
        [T, K] uint8 codes, each at most CODE_MAX. A row without any count gets all zeros: its
        symbols are equally likely.
    """
    smooth = counts.astype(np.float64) + smoothing
    costs = np.log2(smooth.sum(axis=1, keepdims=True)) - np.log2(smooth)
    steps = np.rint(CODE_RESOLUTION * costs)
    codes: NDArray[np.uint8] = np.clip(steps, 0, CODE_MAX).astype(np.uint8)
    codes[counts.sum(axis=1) == 0] = 0
    return codes


def table_from_codes(codes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the integer tables that the codes stand for; the same on every machine.

    Args:
        codes: [T, K] uint8, each at most CODE_MAX; 1 <= K <= SYMBOLS_LIMIT.

    Returns:
        [T, K] int64, each >= 1, each row summing to 2**PRECISION.

    Raises:
        FormatError: a code is above CODE_MAX, or K is outside its range.
    """
    size = codes.shape[1]
    if not 1 <= size <= SYMBOLS_LIMIT:
        raise FormatError(f"a table has {size} symbols: it must have 1 to {SYMBOLS_LIMIT}.")
    if codes.size and int(codes.max()) > CODE_MAX:
        raise FormatError(f"a table code is {int(codes.max())}: the largest is {CODE_MAX}.")
    octave, part = np.divmod(codes.astype(np.int64), CODE_RESOLUTION)
    weights = np.array(CODE_WEIGHTS, dtype=np.int64)[part] >> octave
    total = weights.sum(axis=1, keepdims=True)
    # weights < 2**31 and the factor <= 2**24: the product stays below 2**63.
    table: NDArray[np.int64] = 1 + weights * ((1 << PRECISION) - size) // total
    # np.argmax takes the first of equal entries; all that rounding left over goes there.
    rows = np.arange(len(table))
    table[rows, table.argmax(axis=1)] += (1 << PRECISION) - table.sum(axis=1)
    return table


def bits(tables: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the cost of each symbol, PRECISION - log2(k), in bits.

    Args:
        tables: [T, K] int64 as `table_from_codes` returns them.

    Returns:
        [T, K] float32.
    """
    return (PRECISION - np.log2(tables)).astype(np.float32)
