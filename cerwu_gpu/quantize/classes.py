"""Classes of rows and columns by their spread, which choose a symbol's table.

The spread of x_ij = W_ij / (t_i step_j) differs between rows and columns. With r_i and c_j the root
mean squares of rows and columns, the symbol at (i, j) is coded with table number a_i + b_j, where
a_i and b_j are log2 r_i and log2 c_j in units of some octaves.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cerwu_gpu.quantize.sharing import shared_bits

CLASS_OCTAVES = 0.25
"""Width of a class in large matrices: finer ones pay for themselves only in very large ones."""
COARSER_OCTAVES = (0.5, 1.0)
"""Further widths that a small matrix may choose."""
SMALL = 1 << 17
"""Weights of a matrix whose classes are chosen by their cost; beyond, they are cheap."""
MAX_TABLES = 48
"""Maximum number of classes, about: rare extremes share the outermost ones."""
LARGEST_COUNTED = 63
"""Magnitude from which on integers are counted together to compare classes."""


@dataclass(frozen=True)
class Classes:
    """row [m] and column [n], int64 >= 0: the table of (i, j) is row[i] + column[j] < count."""

    row: Tensor
    column: Tensor
    count: int

    @staticmethod
    def single(rows: int, columns: int, *, device: torch.device) -> "Classes":
        """Return one class for all rows and columns."""
        zero = torch.zeros(max(rows, columns), dtype=torch.int64, device=device)
        return Classes(zero[:rows], zero[:columns], 1)


def choose_classes(x: Tensor, *, matrices: int = 1, quantizers: int = 1) -> Classes:
    """Return classes of x [m, n] float32 (index space); of small matrices those that cost least.

    Args:
        x: a stack of `matrices` matrices, one below the other.
        quantizers: tables of each class: 1, or 2 under a trellis.
    """
    fine = classify(x)
    if x.numel() > SMALL * matrices:
        return fine
    magnitude = x.abs().round().clamp_max(LARGEST_COUNTED).to(torch.int64)

    def cost(classes: Classes) -> float:
        """Return the bits of the rounded symbols, of the tables and of the classes themselves."""
        size = int(magnitude.max()) + 1
        table = classes.row[:, None] + classes.column
        flat = (table * size + magnitude).flatten()
        counts = torch.bincount(flat, minlength=classes.count * size).view(classes.count, size)
        bits = shared_bits(counts, 1, size * quantizers * matrices)
        return bits + _entropy_bits(classes.row) + matrices * _entropy_bits(classes.column)

    return min(_candidates(x, fine), key=cost)


def _candidates(x: Tensor, fine: Classes) -> Iterator[Classes]:
    """Yield classes of several widths, of rows and columns, of rows alone and of columns alone."""
    yield Classes.single(*x.shape, device=x.device)
    for both in (fine, *(classify(x, octaves) for octaves in COARSER_OCTAVES)):
        yield both
        yield Classes(both.row, torch.zeros_like(both.column), int(both.row.max()) + 1)
        yield Classes(torch.zeros_like(both.row), both.column, int(both.column.max()) + 1)


def classify(x: Tensor, octaves: float = CLASS_OCTAVES) -> Classes:
    """Return classes by the spread of x [m, n] float32, the weights in units of their steps."""
    square = x.square()
    column = square.mean(dim=0)
    floor = column[column > 0].min() if bool((column > 0).any()) else column.new_ones(())
    column = column.clamp_min(floor)
    row = square.div_(column).mean(dim=1)
    floor = row[row > 0].min() if bool((row > 0).any()) else row.new_ones(())
    a = _log_units(row.clamp_min(floor), octaves)
    b = _log_units(column, octaves)
    return Classes(a, b, int(a.max() + b.max()) + 1)


def _log_units(square: Tensor, octaves: float) -> Tensor:
    """Return the rounded log2 of the root of `square`, from 0; rare extremes are drawn in."""
    unit = (square.to(torch.float64).log2() / (2 * octaves)).round().to(torch.int64)
    middle = int(unit.median())
    half = MAX_TABLES // 4
    unit = unit.clamp(middle - half, middle + half)
    return unit - unit.min()


def _entropy_bits(classes: Tensor) -> float:
    """Return the bits of the classes [k] under their own frequencies."""
    counts = torch.bincount(classes).to(torch.float64)
    nats = torch.special.xlogy(counts, len(classes) / counts.clamp_min(1)).sum()
    return float(nats) / math.log(2)
