"""Rate models: classes of rows and columns, and one frozen table of bits for each class.

The spread of W_ij / step_j differs between rows and columns. With r_i and c_j the root mean
squares of rows and columns, the symbol at (i, j) is coded with table number a_i + b_j, where a_i
and b_j are log2 r_i and log2 c_j in units of CLASS_OCTAVES. The same integer tables serve the
search and the coder.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cerwu_gpu.coding.tables import bits, codes_from_counts, table_from_codes
from cerwu_gpu.quantize.sharing import shared_histograms

CLASS_OCTAVES = 0.25
"""Width of a class: finer ones pay for themselves only in very large matrices."""
MAX_TABLES = 48
"""Rows and columns beyond this many classes share the outermost ones."""
ESCAPE_PAYLOAD_BITS = 16.0
"""What the search takes an escaped integer's payload to cost."""
ALPHABET_LIMIT = 127
"""Largest magnitude with a code of its own where the alphabet is unbounded."""


@dataclass(frozen=True)
class Classes:
    """row [m] and column [n], int64 >= 0: the table of (i, j) is row[i] + column[j] < count."""

    row: Tensor
    column: Tensor
    count: int

    @staticmethod
    def single(rows: int, columns: int, *, device: torch.device) -> "Classes":
        """One table for the whole matrix."""
        zero = torch.zeros(max(rows, columns), dtype=torch.int64, device=device)
        return Classes(zero[:rows], zero[:columns], 1)


def classify(x: Tensor, octaves: float = CLASS_OCTAVES) -> Classes:
    """Classes from the spread of x [m, n] float32, the weights in units of their steps."""
    square = x.square()
    column = square.mean(dim=0)
    floor = column[column > 0].min() if bool((column > 0).any()) else column.new_ones(())
    column = column.clamp_min(floor)
    row = (square / column).mean(dim=1)
    floor = row[row > 0].min() if bool((row > 0).any()) else row.new_ones(())
    a = _log_units(row.clamp_min(floor), octaves)
    b = _log_units(column, octaves)
    return Classes(a, b, int(a.max() + b.max()) + 1)


def _log_units(square: Tensor, octaves: float) -> Tensor:
    """Rounded log2 of the root of `square`, from 0; rare extremes are drawn in."""
    unit = (square.to(torch.float64).log2() / (2 * octaves)).round().to(torch.int64)
    middle = int(unit.median())
    half = MAX_TABLES // 4
    unit = unit.clamp(middle - half, middle + half)
    return unit - unit.min()


def histogram(index: Tensor, table: Tensor, tables: int, size: int) -> Tensor:
    """Counts [tables, size] int64 of the alphabet indices [m, n] under the table numbers [m, n]."""
    flat = (table * size + index).flatten()
    return torch.bincount(flat, minlength=tables * size).view(tables, size)


def alphabet_limit(symbols: Tensor, tables: int) -> int:
    """The magnitude up to which a symbol of its own is cheaper than escapes.

    A symbol costs a few bits in each table, an escape its payload and its own rare symbol.
    """
    magnitude = symbols.abs().clamp_max(ALPHABET_LIMIT + 1).flatten()
    counts = torch.bincount(magnitude, minlength=ALPHABET_LIMIT + 2)
    beyond = counts.flip(0).cumsum(0).flip(0)[1:].to(torch.float64)
    limit = torch.arange(ALPHABET_LIMIT + 1, device=symbols.device)
    cost = beyond * (ESCAPE_PAYLOAD_BITS + 8) + limit * (2.0 * tables)
    return max(1, int(cost.argmin()))


def codes(counts: Tensor, mirrored: int, quantizers: int = 1) -> Tensor:
    """Table codes [T, K] uint8 from counts [T, K]; the first `mirrored` symbols share in pairs.

    Integers q and -q get the same code, so that only half of a symmetric alphabet is stored, and
    neighbouring classes share tables (sharing.py); each has as many as there are `quantizers`.
    """
    if mirrored:
        both = counts[:, :mirrored] + counts[:, :mirrored].flip(1)
        counts = torch.cat([both, 2 * counts[:, mirrored:]], dim=1)
    counts = shared_histograms(counts, quantizers, counts.shape[1] - mirrored // 2)
    return torch.from_numpy(codes_from_counts(counts.cpu().numpy())).to(counts.device)


def rates(table_codes: Tensor) -> Tensor:
    """Bits [T, K] float32 of every symbol, exactly as the coder will charge them."""
    tables = table_from_codes(table_codes.cpu().numpy())
    return torch.from_numpy(bits(tables)).to(table_codes.device)
