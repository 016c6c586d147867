"""Histograms of symbols on one core; `reference.counts` defines the results."""

# mypy: allow-untyped-decorators, allow-untyped-defs

import numpy as np
import torch
from numba import njit
from torch import Tensor


def symbol_counts(
    symbols: Tensor,
    row_class: Tensor,
    column_class: Tensor,
    *,
    tables: int,
    lowest: int,
    size: int,
    escapes: int,
    second: Tensor | None = None,
) -> Tensor:
    """Count the symbols of an alphabet under each table; see `reference.counts.symbol_counts`."""
    quantizers = 1 if second is None else 2
    counts = torch.zeros(tables * quantizers, size + escapes, dtype=torch.int64)
    none = np.empty((0, 0), np.bool_)
    _count(
        symbols.contiguous().numpy(),
        row_class.contiguous().numpy(),
        column_class.reshape(-1, symbols.shape[1]).contiguous().numpy(),
        none if second is None else second.contiguous().numpy(),
        quantizers,
        lowest,
        size,
        escapes,
        counts.numpy(),
    )
    return counts


@njit(cache=True, nogil=True, error_model="numpy")
def _count(
    symbols,
    row_class,
    column_class,
    second,
    quantizers,
    lowest,
    size,
    escapes,
    counts,
):
    rows, columns = symbols.shape
    height = rows // max(1, len(column_class))
    for i in range(rows):
        own = column_class[i // height]
        for j in range(columns):
            symbol = symbols[i, j]
            index = symbol - lowest
            if index < 0 or index >= size:
                index = size + (symbol & (escapes - 1))
            table = (row_class[i] + own[j]) * quantizers
            if quantizers > 1:
                table += np.int64(second[i, j])
            counts[table, index] += 1
