"""Quantized matrices as they are stored: symbols, their alphabet, their tables and classes."""

from dataclasses import dataclass

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
        codes: [T * Q, size + escapes] uint8 table codes (Q = 2 under a trellis).
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

    def counts(
        self,
        symbols: Tensor,
        second: Tensor | None,
        row_class: Tensor,
        column_class: Tensor,
        tables: int,
    ) -> Tensor:
        """Count the symbols [m, n] under each table: see `reference.counts.symbol_counts`."""
        return backend.symbol_counts(
            symbols,
            row_class,
            column_class,
            tables=tables,
            lowest=self.lowest,
            size=self.size,
            escapes=self.escapes,
            second=second,
        )


def symbol_range(symbols: Tensor, grid: Grid, tables: int, states: int) -> SymbolRange:
    """Return the alphabet that suits these symbols."""
    if grid.lowest is not None and grid.highest is not None:
        return SymbolRange(grid.lowest, grid.highest - grid.lowest + 1, 0)
    limit = rate.alphabet_limit(symbols, tables)
    return SymbolRange(-limit, 2 * limit + 1, 2 if states else 1)


def finish_matrix(
    symbols: Tensor, grid: Grid, rows: slice, classes: Classes, states: int
) -> QuantizedMatrix:
    """Return one matrix of the stack with final classes and tables, from its final symbols."""
    row_class, column_class = classes.row[rows], classes.column
    # As many tables as rows and columns, which is all that the format allows; few in tiny matrices.
    row_class = (row_class - row_class.min()).clamp_max(len(row_class) - 1)
    column_class = column_class.clamp_max(len(column_class) - 1)
    tables = int(row_class.max() + column_class.max()) + 1
    quantizers = 2 if states else 1
    span = symbol_range(symbols, grid, tables * quantizers, states)
    second = backend.trellis_quantizers(symbols, states) if states else None
    counts = span.counts(symbols, second, row_class, column_class, tables)
    if span.escapes and int(counts[:, span.size :].sum()) == 0:
        span = SymbolRange(span.lowest, span.size, 0)
        counts = counts[:, : span.size]
    return QuantizedMatrix(
        symbols=symbols,
        lowest=span.lowest,
        size=span.size,
        escapes=span.escapes,
        codes=rate.codes(counts, span.paired, quantizers),
        row_class=row_class,
        column_class=column_class,
        column_step=grid.column_step,
        row_scale=grid.row_scale if len(grid.row_scale) == 1 else grid.row_scale[rows],
        grid=grid.levels,
        states=states,
        second=second,
    )
