"""Histograms of symbols: how often each has each table, and how often each magnitude occurs."""

import torch
from torch import Tensor

from cerwu_gpu.reference.dequantize import trellis_quantizers


def symbol_counts(
    symbols: Tensor,
    row_class: Tensor,
    column_class: Tensor,
    *,
    tables: int,
    lowest: int,
    size: int,
    escapes: int,
    states: int,
) -> Tensor:
    """Count the symbols of an alphabet under each table.

    Args:
        symbols: [m, n] int32.
        row_class, column_class: [m] and [n] int64; their sum, below `tables`, is the class.
        tables: number of classes.
        lowest, size: the alphabet is lowest ... lowest + size - 1, and `escapes` symbols for what
            lies outside: one, or one for even and one for odd integers.
        escapes: 0, 1 or 2; with 0 nothing may lie outside.
        states: of the trellis that drives the quantizer along the rows: 0 (no trellis), 4 or 8.

    Returns:
        [tables * Q, size + escapes] int64, row Q * class + quantizer; Q = 2 under a trellis or 1.
    """
    index = symbols.to(torch.int64) - lowest
    if escapes:
        outside = (index < 0) | (index >= size)
        index = torch.where(outside, size + (symbols & (escapes - 1)), index)
    table = row_class[:, None] + column_class
    if states:
        tables, table = 2 * tables, 2 * table + trellis_quantizers(symbols, states)
    total = size + escapes
    flat = (table * total + index).flatten()
    return torch.bincount(flat, minlength=tables * total).view(tables, total)


def magnitude_counts(symbols: Tensor, limit: int) -> Tensor:
    """Count the magnitudes 0 ... limit - 1 of symbols [m, n] int32, and all from limit on:
    [limit + 1] int64."""
    return torch.bincount(symbols.abs().clamp_max(limit).flatten(), minlength=limit + 1)
