"""Quantized matrices as they are stored: symbols, their alphabet, their tables and classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from cerwu_gpu import backend
from cerwu_gpu.quantize import rate
from cerwu_gpu.quantize.classes import Classes
from cerwu_gpu.quantize.grid import Grid
from cerwu_gpu.spec import is_mirrored


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantized matrix as it is stored, still as tensors.

    Attributes:
        symbols: [m, n] int32 integers (positions, for a list).
        lowest, size: the alphabet is lowest ... lowest + size - 1, then the escape symbols.
        escapes: number of escape symbols: 0 or 1; 2 under a trellis (even, odd).
        codes: [T * Q, size + escapes] uint8 table codes (Q = 2 under a trellis), on the CPU.
        row_class, column_class: [m] and [n] int64.
        column_step, row_scale: int16 step codes, [n] or [1] and [m] or [1].
        grid: [K] float32 values of a list, or None.
        states: 0, 4 or 8.
        second: [m, n] bool, the symbols of the trellis's second quantizer; None without a trellis.
    """

    symbols: Tensor
    lowest: int
    size: int
    escapes: int
    codes: Tensor
    row_class: Tensor
    column_class: Tensor
    column_step: Tensor
    row_scale: Tensor
    grid: Tensor | None
    states: int
    second: Tensor | None

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [m, n] that every decoder gives back."""
        return backend.dequantize(
            self.symbols,
            self.column_step,
            self.row_scale,
            grid=self.grid,
            second=self.second,
            dtype=dtype,
        )


@dataclass(frozen=True)
class SymbolRange:
    """An alphabet without its tables: lowest ... lowest + size - 1, then the escape symbols."""

    lowest: int
    size: int
    escapes: int

    @property
    def paired(self) -> int:
        """Number of leading symbols that share their codes in pairs, q with -q."""
        return self.size if is_mirrored(self.lowest, self.size) else 0

    def narrowed(self, counts: Tensor, to: "SymbolRange") -> Tensor:
        """Return the counts [..., K] of this alphabet as those of a narrower one, whose escape
        symbols count what lies outside of it."""
        if to == self:
            return counts
        first = to.lowest - self.lowest
        inside = counts[..., first : first + to.size]
        before, after = counts[..., :first], counts[..., first + to.size : self.size]
        escaped = counts[..., self.size :].clone()
        for integers, lowest in ((before, self.lowest), (after, to.lowest + to.size)):
            for place in range(to.escapes):
                start = (place - lowest) % to.escapes
                escaped[..., place] += integers[..., start :: to.escapes].sum(dim=-1)
        return torch.cat([inside, escaped], dim=-1)


def widest_range(grid: Grid, states: int) -> SymbolRange:
    """Return the alphabet that no matrix needs to exceed: a given grid's, or the largest one."""
    if grid.lowest is not None and grid.highest is not None:
        return SymbolRange(grid.lowest, grid.highest - grid.lowest + 1, 0)
    limit = rate.ALPHABET_LIMIT
    return SymbolRange(-limit, 2 * limit + 1, 2 if states else 1)


def suitable_range(widest: SymbolRange, counts: Tensor, tables: int) -> SymbolRange:
    """Return the alphabet for symbols with these counts [..., K] in the widest one, in so many
    tables."""
    if not widest.escapes:
        return widest
    total = counts.flatten(0, -2).sum(dim=0)
    middle = -widest.lowest
    positive, negative = total[middle : widest.size], total[: middle + 1].flip(0)
    magnitudes = torch.cat([positive + negative, total[widest.size :].sum()[None]])
    magnitudes[0] = total[middle]
    limit = rate.alphabet_limit(magnitudes, tables)
    return SymbolRange(-limit, 2 * limit + 1, widest.escapes)


def counted(
    symbols: Tensor,
    second: Tensor | None,
    row_class: Tensor,
    column_class: Tensor,
    bounds: Sequence[int],
    widest: SymbolRange,
    tables: int,
) -> Tensor:
    """Count the symbols of each matrix of each stack under each of its tables.

    Args:
        symbols: [B, m, n] int32; `second` as in `QuantizedMatrix`, likewise.
        row_class, column_class: [B, m] and [B, n] int64.
        bounds: row ranges of the M matrices in a stack.
        widest: an alphabet of all symbols, escapes included.
        tables: T, above the sum of any row's and column's class.

    Returns:
        [B, M, T, Q, K] int64 on the CPU, where tables are made of them.
    """
    stacks, rows, columns = symbols.shape
    matrices = len(bounds) - 1
    number = torch.arange(stacks, device=symbols.device)[:, None] * matrices
    inner = torch.tensor(bounds[1:-1], dtype=torch.int64, device=symbols.device)
    matrix = torch.bucketize(torch.arange(rows, device=symbols.device), inner, right=True)
    counts = backend.symbol_counts(
        symbols.reshape(-1, columns),
        (row_class + (number + matrix) * tables).flatten(),
        column_class,
        tables=stacks * matrices * tables,
        lowest=widest.lowest,
        size=widest.size,
        escapes=widest.escapes,
        second=None if second is None else second.reshape(-1, columns),
    )
    return counts.cpu().view(stacks, matrices, tables, -1, widest.size + widest.escapes)


def finish_matrices(
    symbols: Tensor, grid: Grid, bounds: Sequence[int], classes: Classes, states: int
) -> list[list[QuantizedMatrix]]:
    """Return the matrices of each stack with final classes and tables, from their final symbols
    [B, m, n]."""
    stacks, _, columns = symbols.shape
    column_class = classes.column.clamp_max(columns - 1)
    row_class = classes.row.clone()
    for first, last in pairwise(bounds):
        # As many tables as rows and columns, which is all that the format allows; few in tiny ones.
        own = row_class[:, first:last]
        own -= own.amin(dim=1, keepdim=True)
        own.clamp_max_(last - first - 1)
    second = None
    if states:
        second = backend.trellis_quantizers(symbols.flatten(0, 1), states).view_as(symbols)
    widest = widest_range(grid, states)
    rows_of = [slice(*ends) for ends in pairwise(bounds)]
    places = [(g, k, rows) for g in range(stacks) for k, rows in enumerate(rows_of)]
    highest = torch.stack([row_class[:, rows].amax(dim=1) for rows in rows_of], dim=1)
    tables = (highest + column_class.amax(dim=1)[:, None] + 1).tolist()
    most = max(max(each) for each in tables)
    counts = counted(symbols, second, row_class, column_class, bounds, widest, most)
    spans, histograms = [], []
    for g, k, _ in places:
        own = counts[g, k, : tables[g][k]]
        span = suitable_range(widest, own, own.shape[0] * own.shape[1])
        histogram = widest.narrowed(own, span)
        if span.escapes and int(histogram[..., span.size :].sum()) == 0:
            span = SymbolRange(span.lowest, span.size, 0)
            histogram = histogram[..., : span.size]
        spans.append(span)
        histograms.append(histogram)
    codes = rate.codes(histograms, [span.paired for span in spans])
    finished: list[list[QuantizedMatrix]] = [[] for _ in range(stacks)]
    for (g, _, rows), span, table_codes in zip(places, spans, codes, strict=True):
        scale = grid.row_scale[g]
        finished[g].append(
            QuantizedMatrix(
                symbols=symbols[g, rows],
                lowest=span.lowest,
                size=span.size,
                escapes=span.escapes,
                codes=table_codes.flatten(0, 1),
                row_class=row_class[g, rows],
                column_class=column_class[g],
                column_step=grid.column_step[g],
                row_scale=scale if len(scale) == 1 else scale[rows],
                grid=grid.levels,
                states=states,
                second=None if second is None else second[g, rows],
            )
        )
    return finished
