"""Histograms of symbols, by table."""

import torch
from torch import Tensor


def alphabet_indices(
    symbols: Tensor, *, lowest: int, size: int, escapes: int
) -> tuple[Tensor, Tensor]:
    """Find integers in the alphabet lowest ... lowest + size - 1, which escape symbols follow.

    Args:
        symbols: [m, n] int32.
        escapes: number of escape symbols: one, or one for even and one for odd integers.

    Returns:
        indices [m, n] int32, and which integers lie outside of the alphabet, [m, n] bool; with 0
        escapes their indices do, too.
    """
    indices = symbols - lowest
    outside = (indices < 0) | (indices >= size)
    if escapes:
        indices = torch.where(outside, size + (symbols & (escapes - 1)), indices)
    return indices, outside


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
    """Count the symbols of an alphabet under each table.

    Args:
        symbols: [m, n] int32.
        row_class, column_class: [m] and [n] int64; their sum, below `tables`, is the class. With
            column_class [B, n] the rows are those of B matrices of equal height, one below the
            other.
        tables: number of classes.
        lowest, size: the alphabet is lowest ... lowest + size - 1, and `escapes` symbols for what
            lies outside: one, or one for even and one for odd integers.
        escapes: 0, 1 or 2; with 0 nothing may lie outside.
        second: [m, n] bool, the symbols of a trellis's second quantizer; None without a trellis.

    Returns:
        [tables * Q, size + escapes] int64, row Q * class + quantizer; Q = 2 under a trellis or 1.
    """
    indices, _ = alphabet_indices(symbols, lowest=lowest, size=size, escapes=escapes)
    columns = column_class.reshape(-1, 1, symbols.shape[1])
    table = row_class.view(len(columns), -1, 1) + columns
    table = table.flatten(0, 1)
    if second is not None:
        tables, table = 2 * tables, 2 * table + second
    total = size + escapes
    flat = (table * total + indices).flatten()
    return torch.bincount(flat, minlength=tables * total).view(tables, total)
