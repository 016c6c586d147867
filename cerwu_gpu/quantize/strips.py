"""Strips of rows that fit in a core's second cache, for sums over large matrices.

A temporary as large as a matrix costs more than its arithmetic on a CPU, where the system clears
each page of fresh memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

STRIP = 1 << 16
"""Entries of a strip, about: 512 KB in float64."""


def strips(rows: int, columns: int) -> Iterator[slice]:
    """Yield the strips of a matrix [rows, columns], as slices of its rows.

    Matrices of a batch have the same ones, however many they are.
    """
    height = max(1, STRIP // max(columns, 1))
    for first in range(0, rows, height):
        yield slice(first, min(first + height, rows))


def mean_squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean squares of the rows and of the columns of x [..., m, n]: [..., m] and
    [..., n] float64."""
    *several, m, n = x.shape
    row, column = [], torch.zeros((*several, n), dtype=torch.float64, device=x.device)
    for rows in strips(m, n):
        square = x[..., rows, :].to(torch.float64).square_()
        row.append(square.mean(dim=-1))
        column += square.sum(dim=-2)
    return torch.cat(row, dim=-1), column / m
