"""One Hessian and the matrices that share it, from floats to coded integers (design.md 2.2, 2.3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cerwu_gpu.config import TRELLIS_STATES, CompressionConfig
from cerwu_gpu.quantize import rate
from cerwu_gpu.quantize.grid import Grid, scaled, waterfilled
from cerwu_gpu.quantize.objective import (
    complete_square,
    factor_with_damping,
    normalised_factor,
    quadratic_error,
)
from cerwu_gpu.quantize.passes import Weights, scalar_pass, trellis_pass
from cerwu_gpu.quantize.rate import Classes
from cerwu_gpu.reference.dequantize import dequantize, trellis_quantizers
from cerwu_gpu.reference.obs import Alphabet

SAMPLED_ROWS = 512
"""Passes before the last see about this many rows of a stack: enough to estimate its tables."""
EXHAUSTIVE_LEVELS = 257
"""Bounded alphabets up to this size are scanned whole, larger ones near the target."""


@dataclass(frozen=True)
class QuantizedMatrix:
    """What is stored of a matrix, still as tensors.

    Attributes:
        symbols: [m, n] int32 integers (positions, for a list).
        lowest, size: the alphabet is lowest ... lowest + size - 1, then the escape symbols.
        escapes: how many escape symbols follow: 0 or 1; 2 under a trellis (even, odd).
        codes: [T * Q, size + escapes] uint8 table codes (Q = 2 under a trellis).
        row_class, column_class: [m] and [n] int64.
        column_step, row_scale: int16 step codes, [n] or [1] and [m] or [1].
        grid: [K] float32 values of a list, or None.
        states: 0, 4 or 8.
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

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight [m, n] that every decoder gives back."""
        return dequantize(
            self.symbols,
            self.column_step,
            self.row_scale,
            grid=self.grid,
            states=self.states,
            dtype=dtype,
        )


@dataclass(frozen=True)
class QuantizedStack:
    """The matrices of a stack and what happened on the way.

    Attributes:
        matrices: in the order given.
        relative_losses: tr((W-Q) H (W-Q)^T) / tr(W H W^T) of each, with the undamped H.
        damping: what the factorisation needed.
    """

    matrices: tuple[QuantizedMatrix, ...]
    relative_losses: tuple[float, ...]
    damping: float


def quantize_stack(
    weights: Sequence[Tensor], hessian: Tensor, config: CompressionConfig
) -> QuantizedStack:
    """Quantize matrices [m_k, n] float32 that see the same inputs, in one pass.

    Args:
        weights: the matrices; all have n columns.
        hessian: [n, n], undamped.
        config: method, grid, rate and trade-off.

    Raises:
        FactorizationError: the Hessian cannot be factored.
    """
    weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
    bounds = [0, *torch.tensor([len(w) for w in weights]).cumsum(0).tolist()]
    if config.method == "rtn":
        symbols, grid, classes = _round_to_nearest(weight, config)
        damping = config.damping
    else:
        damped, factor, damping = factor_with_damping(hessian, config.damping)
        problem = _Problem.build(weight, damped, factor, bounds, config)
        symbols, grid, classes = problem.solve(), problem.grid, problem.classes
    matrices, losses = [], []
    for first, last in zip(bounds, bounds[1:], strict=False):
        rows = slice(first, last)
        matrix = _finish(symbols[rows], grid, rows, classes, TRELLIS_STATES[config.quantizer])
        matrices.append(matrix)
        losses.append(relative_loss(weight[rows], matrix.weight(torch.float32), hessian))
    return QuantizedStack(tuple(matrices), tuple(losses), damping)


def relative_loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr((W-Q) H (W-Q)^T) / tr(W H W^T); 0 where W has no effect and Q is equal to it."""
    error = float(quadratic_error(weight - quantized, hessian).sum())
    energy = float(quadratic_error(weight, hessian).sum())
    if energy <= 0:
        return 0.0 if error <= 0 else math.inf
    return max(error, 0.0) / energy


def _round_to_nearest(weight: Tensor, config: CompressionConfig) -> tuple[Tensor, Grid, Classes]:
    grid = scaled(weight, config)
    x = weight / (grid.steps(weight.shape[1]) * grid.scales(weight.shape[0])[:, None])
    classes = Classes.single(*weight.shape, weight.device)
    return _nearest(x, grid), grid, classes


def _nearest(x: Tensor, grid: Grid) -> Tensor:
    """The nearest level of the grid, element by element: [m, n] int32."""
    if grid.levels is not None:
        middle = (grid.levels[1:] + grid.levels[:-1]) / 2
        return torch.bucketize(x, middle, out_int32=True)
    rounded = x.round()
    if grid.lowest is not None:
        rounded = rounded.clamp(grid.lowest, grid.highest)
    return rounded.to(torch.int32)


@dataclass(frozen=True)
class _Problem:
    """A stack in index space, ready for its passes."""

    x: Tensor
    factor: Tensor
    grid: Grid
    classes: Classes
    weights: Weights
    bounds: list[int]
    config: CompressionConfig

    @staticmethod
    def build(
        weight: Tensor, damped: Tensor, factor: Tensor, bounds: list[int], config: CompressionConfig
    ) -> "_Problem":
        rows, columns = weight.shape
        lmbda = 0.0 if config.method == "optq" else config.lmbda
        bounded = config.levels is not None or config.grid is not None
        if bounded:
            grid = scaled(weight, config)
        else:
            grid = waterfilled(factor.diagonal(), config.lmbda, TRELLIS_STATES[config.quantizer])
        gamma = _gaussian_curvature(weight, per_column=not bounded)
        if config.method != "cerwu" or lmbda == 0:
            gamma = torch.zeros_like(gamma)
        else:
            weight, factor = complete_square(weight, damped, lmbda * gamma)
        steps, scales = grid.steps(columns), grid.scales(rows)
        x = weight / steps / scales[:, None]
        square = factor.diagonal().square()
        weights = Weights(
            lmbda=lmbda / scales.square(),
            importance=(steps.square() / square).to(torch.float32),
            curvature=(lmbda * gamma * square).to(torch.float32),
        )
        single = Classes.single(rows, columns, weight.device)
        classes = single if bounded else rate.classify(x)
        return _Problem(x, normalised_factor(factor, steps), grid, classes, weights, bounds, config)

    def solve(self) -> Tensor:
        """Symbols [m, n] int32 after all passes."""
        sampled = self._sampled()
        alphabet = sampled._first_alphabet()
        for _ in range(self.config.passes - 1):
            alphabet = sampled._alphabet(sampled._pass(alphabet))
        return self._pass(alphabet)

    def _sampled(self) -> "_Problem":
        """The same problem for every k-th row, k such that about SAMPLED_ROWS rows are left."""
        rows = len(self.x)
        every = max(1, rows // SAMPLED_ROWS)
        if every == 1:
            return self
        keep = torch.arange(0, rows, every, device=self.x.device)
        bounds = [math.ceil(b / every) for b in self.bounds]
        classes = Classes(self.classes.row[keep], self.classes.column, self.classes.count)
        weights = Weights(self.weights.lmbda[keep], self.weights.importance, self.weights.curvature)
        return _Problem(
            self.x[keep], self.factor, self.grid, classes, weights, bounds, self.config
        )

    @property
    def _states(self) -> int:
        return TRELLIS_STATES[self.config.quantizer]

    def _first_alphabet(self) -> Alphabet:
        """Tables before any pass: of plain rounding, in each quantizer of a trellis."""
        table = self.classes.row[:, None] + self.classes.column
        if not self._states:
            return self._tables(_nearest(self.x, self.grid), table)
        magnitude = self.x.abs()
        even = (magnitude / 2).round()
        odd = torch.where(magnitude < 0.5, 0.0, ((magnitude + 1) / 2).round())
        symbols = torch.cat([even, odd]).mul_(torch.sign(self.x).repeat(2, 1)).to(torch.int32)
        owner = torch.cat([2 * table, 2 * table + 1])
        bounds = self.bounds
        order = torch.cat(
            [
                torch.arange(first, last, device=self.x.device) + shift
                for first, last in zip(bounds, bounds[1:], strict=False)
                for shift in (0, len(self.x))
            ]
        )
        return self._tables(symbols[order], owner[order], rows_each=2)

    def _alphabet(self, seen: Tensor) -> Alphabet:
        """Tables of the symbols of a pass."""
        table = self.classes.row[:, None] + self.classes.column
        if self._states:
            table = 2 * table + trellis_quantizers(seen, self._states)
        return self._tables(seen, table)

    def _tables(self, symbols: Tensor, table: Tensor, rows_each: int = 1) -> Alphabet:
        """One alphabet for the stack, and tables of each of its matrices, one below the other."""
        count = self.classes.count * (2 if self._states else 1)
        shape = _shape(symbols, self.grid, count, self._states)
        index = shape.indices(symbols)
        parts = []
        for first, last in zip(self.bounds, self.bounds[1:], strict=False):
            rows = slice(rows_each * first, rows_each * last)
            counts = rate.histogram(index[rows], table[rows], count, shape.total)
            parts.append(rate.rates(rate.codes(counts, shape.mirrored)))
        rates = torch.cat(parts)
        if shape.escapes:
            escape = rates[:, shape.size :].amin(dim=1, keepdim=True) + rate.ESCAPE_PAYLOAD_BITS
            rates = torch.cat([rates[:, : shape.size], escape], dim=1)
        return Alphabet(rates, shape.lowest, bool(shape.escapes), self.grid.levels)

    def _pass(self, alphabet: Alphabet) -> Tensor:
        number = torch.zeros(len(self.x), dtype=torch.int64, device=self.x.device)
        for first in self.bounds[1:-1]:
            number[first:] += self.classes.count
        arguments = (
            self.x,
            self.factor,
            alphabet,
            self.classes.row + number,
            self.classes.column,
            self.weights,
        )
        block_size = self.config.block_size
        if self._states:
            return trellis_pass(*arguments, block_size=block_size, states=self._states)
        exhaustive = self.grid.lowest is not None and alphabet.size <= EXHAUSTIVE_LEVELS
        return scalar_pass(*arguments, block_size=block_size, exhaustive=exhaustive)


def _gaussian_curvature(weight: Tensor, *, per_column: bool) -> Tensor:
    """gamma_j = 1 / (variance ln 2) [n] float64, of each column or of the whole matrix."""
    square = weight.to(torch.float64).square()
    total = square.mean()
    if float(total) == 0:
        return torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    variance = square.mean(dim=0).clamp_min(1e-6 * total) if per_column else total
    return (1 / (variance * math.log(2))).expand(weight.shape[1])


@dataclass(frozen=True)
class _Shape:
    """An alphabet without its tables: lowest ... lowest + size - 1, then the escape symbols."""

    lowest: int
    size: int
    escapes: int

    @property
    def total(self) -> int:
        return self.size + self.escapes

    @property
    def mirrored(self) -> int:
        """How many leading symbols share their codes in pairs."""
        return self.size if self.size % 2 and self.lowest == -(self.size // 2) else 0

    def indices(self, symbols: Tensor) -> Tensor:
        """Alphabet index [m, n] int64 of each symbol; an escape is told by its parity."""
        index = symbols.to(torch.int64) - self.lowest
        if not self.escapes:
            return index
        outside = (index < 0) | (index >= self.size)
        escape = self.size + (symbols & (self.escapes - 1))
        return torch.where(outside, escape, index)


def _shape(symbols: Tensor, grid: Grid, tables: int, states: int) -> _Shape:
    """The alphabet that suits these symbols."""
    if grid.lowest is not None and grid.highest is not None:
        return _Shape(grid.lowest, grid.highest - grid.lowest + 1, 0)
    limit = rate.alphabet_limit(symbols, tables)
    return _Shape(-limit, 2 * limit + 1, 2 if states else 1)


def _finish(
    symbols: Tensor, grid: Grid, rows: slice, classes: Classes, states: int
) -> QuantizedMatrix:
    """Final classes and tables of one matrix of the stack, from its final symbols."""
    row_class, column_class = classes.row[rows], classes.column
    row_class = row_class - row_class.min()
    tables = int(row_class.max() + column_class.max()) + 1
    table = row_class[:, None] + column_class
    if states:
        tables, table = 2 * tables, 2 * table + trellis_quantizers(symbols, states)
    shape = _shape(symbols, grid, tables, states)
    counts = rate.histogram(shape.indices(symbols), table, tables, shape.total)
    if shape.escapes and int(counts[:, shape.size :].sum()) == 0:
        shape = _Shape(shape.lowest, shape.size, 0)
        counts = counts[:, : shape.size]
    return QuantizedMatrix(
        symbols=symbols,
        lowest=shape.lowest,
        size=shape.size,
        escapes=shape.escapes,
        codes=rate.codes(counts, shape.mirrored),
        row_class=row_class,
        column_class=column_class,
        column_step=grid.column_step,
        row_scale=grid.row_scale if len(grid.row_scale) == 1 else grid.row_scale[rows],
        grid=grid.levels,
        states=states,
    )
