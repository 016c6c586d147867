"""Classes of rows and columns by their spread, which choose a symbol's table.

The spread of x_ij = W_ij / (t_i step_j) differs between rows and columns. With r_i and c_j the root
mean squares of rows and columns, the symbol at (i, j) is coded with table number a_i + b_j, where
a_i and b_j are log2 r_i and log2 c_j in units of some octaves.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
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
    """Classes of stacks that are worked on together.

    Attributes:
        row, column: [B, m] and [B, n], int64 >= 0: the table of (i, j) is row[i] + column[j].
        counts: number of tables of each stack.
    """

    row: Tensor
    column: Tensor
    counts: tuple[int, ...]

    @staticmethod
    def of(row: Tensor, column: Tensor) -> "Classes":
        """Return these classes with the number of their tables."""
        return Classes(row, column, tuple((row.amax(dim=1) + column.amax(dim=1) + 1).tolist()))

    @staticmethod
    def single(stacks: int, rows: int, columns: int, *, device: torch.device) -> "Classes":
        """Return one class for all rows and columns."""
        zero = torch.zeros(stacks, max(rows, columns), dtype=torch.int64, device=device)
        return Classes(zero[:, :rows], zero[:, :columns], (1,) * stacks)


def choose_classes(x: Tensor, *, matrices: int = 1, quantizers: int = 1) -> Classes:
    """Return classes of x [B, m, n] float32 (index space); of small matrices those that cost least.

    Args:
        x: B stacks of `matrices` matrices, one below the other.
        quantizers: tables of each class: 1, or 2 under a trellis.
    """
    fine = classify(x)
    if x[0].numel() > SMALL * matrices:
        return fine
    magnitude = x.abs().round().clamp_max(LARGEST_COUNTED).to(torch.int64)
    candidates = list(_candidates(x, fine))
    costs = [_costs(magnitude, classes, matrices, quantizers) for classes in candidates]
    best = torch.from_numpy(np.argmin(costs, axis=0)).to(x.device)
    stack = torch.arange(len(x), device=x.device)
    row, column = (
        torch.stack([getattr(classes, side) for classes in candidates])[best, stack]
        for side in ("row", "column")
    )
    return Classes.of(row, column)


def _costs(
    magnitude: Tensor, classes: Classes, matrices: int, quantizers: int
) -> NDArray[np.float64]:
    """Return the bits [B] of the rounded symbols, of the tables and of the classes themselves.

    Args:
        magnitude: [B, m, n] int64, of the rounded symbols.
    """
    stacks, tables = len(magnitude), max(classes.counts)
    sizes = magnitude.amax(dim=(1, 2)) + 1
    size = int(sizes.max())
    number = torch.arange(stacks, device=magnitude.device)[:, None, None] * tables
    table = number + classes.row[:, :, None] + classes.column[:, None, :]
    flat = (table * size + magnitude).flatten()
    counts = torch.bincount(flat, minlength=stacks * tables * size)
    codes = sizes.cpu().numpy() * (quantizers * matrices)
    bits = shared_bits(counts.view(stacks, tables, 1, size), codes, classes.counts)
    costs: NDArray[np.float64] = (
        bits + _entropy_bits(classes.row) + matrices * _entropy_bits(classes.column)
    )
    return costs


def _candidates(x: Tensor, fine: Classes) -> Iterator[Classes]:
    """Yield classes of several widths, of rows and columns, of rows alone and of columns alone."""
    yield Classes.single(*x.shape, device=x.device)
    for both in (fine, *(classify(x, octaves) for octaves in COARSER_OCTAVES)):
        yield both
        yield Classes.of(both.row, torch.zeros_like(both.column))
        yield Classes.of(torch.zeros_like(both.row), both.column)


def classify(x: Tensor, octaves: float = CLASS_OCTAVES) -> Classes:
    """Return classes by the spread of x [B, m, n] float32, the weights in units of their steps."""
    square = x.square()
    column = _above_zero(square.mean(dim=1))
    row = _above_zero(square.div_(column[:, None, :]).mean(dim=2))
    return Classes.of(_log_units(row, octaves), _log_units(column, octaves))


def _above_zero(square: Tensor) -> Tensor:
    """Return mean squares [B, k], zeros replaced by the stack's least other one, or 1."""
    least = square.where(square > 0, torch.inf).amin(dim=1, keepdim=True)
    return square.maximum(least.where(torch.isfinite(least), 1.0))


def _log_units(square: Tensor, octaves: float) -> Tensor:
    """Return the rounded log2 of the root of `square` [B, k], from 0; rare extremes come in."""
    unit = (square.to(torch.float64).log2() / (2 * octaves)).round().to(torch.int64)
    middle = unit.median(dim=1, keepdim=True).values
    half = MAX_TABLES // 4
    unit = unit.clamp(middle - half, middle + half)
    return unit - unit.amin(dim=1, keepdim=True)


def _entropy_bits(classes: Tensor) -> NDArray[np.float64]:
    """Return the bits [B] of the classes [B, k] under their own frequencies."""
    stacks, length = classes.shape
    width = int(classes.max()) + 1
    number = torch.arange(stacks, device=classes.device)[:, None] * width
    counts = torch.bincount((number + classes).flatten(), minlength=stacks * width)
    share = counts.view(stacks, width).cpu().numpy().astype(np.float64)
    terms = share * np.log2(length / np.maximum(share, 1))
    # Running sums: what stands beside a stack, and with it the number of zeros, changes no bit.
    bits: NDArray[np.float64] = terms.cumsum(axis=1)[:, -1]
    return bits
