"""A stack of matrices in index space, ready for its passes (docs/method.md)."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from cerwu_gpu.config import TRELLIS_STATES, CompressionConfig
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.quantize import rate
from cerwu_gpu.quantize.classes import Classes, choose_classes
from cerwu_gpu.quantize.grid import Grid, nearest, scaled, waterfilled
from cerwu_gpu.quantize.objective import complete_square, normalised_factor
from cerwu_gpu.quantize.passes import Weights, scalar_pass, trellis_pass
from cerwu_gpu.quantize.rate_models import model_bits
from cerwu_gpu.quantize.symbols import symbol_range
from cerwu_gpu.reference.dequantize import trellis_quantizers
from cerwu_gpu.reference.obs import Alphabet

CHUNK_ROWS = 8192
"""Rows in work at a time: vocabularies are tall, and survivors of a trellis take memory."""
SAMPLED_ROWS = 512
"""Passes before the last see about this many rows of a stack: enough to estimate its tables."""
LEVEL_LIMIT = 1 << 24
"""Integers stay below this magnitude: float32, in which they are searched, is exact up to it."""
PENALTY_LIMIT = 1e4
"""Of a column's 1 / C_jj^2: a larger quadratic rate cancels against the error in float32. Weights
that have it are 0 anyway: their root mean square is below 0.003 waterfilled steps."""
PRICE_LIMIT = 1e30
"""Of a bit, where nothing but bits counts any more: products with it stay within float32."""
SCALE_LIMIT = 1e15
"""Largest omega_j, and one over the smallest largest one; x^2 < 2^48 in float32 comes on top."""
EXHAUSTIVE_LEVELS = 65
"""Bounded alphabets up to this size are scanned whole, larger ones near the target."""


@dataclass(frozen=True)
class Problem:
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
        weight: Tensor,
        sensitivity: Tensor,
        damped: Tensor,
        factor: Tensor,
        bounds: list[int],
        config: CompressionConfig,
    ) -> "Problem":
        """Steps, completed square and classes of a stack.

        Args:
            weight: W [m, n] float32.
            sensitivity: alpha [m] float32 > 0, what a unit of squared error costs in each row.
            damped: H [n, n] float64, damped; `factor` its C [n, n] float64.
            bounds: row ranges of the matrices in the stack.
            config: method, grid and trade-off.
        """
        rows, columns = weight.shape
        lmbda = 0.0 if config.method == "optq" else config.lmbda
        if config.bounded:
            grid = scaled(weight, config)
            unit, price = torch.ones_like(sensitivity), lmbda / float(sensitivity.mean())
        else:
            states = TRELLIS_STATES[config.quantizer]
            grid = waterfilled(
                weight, factor.diagonal(), sensitivity, config.lmbda, states, len(bounds) - 1
            )
            unit, price = grid.scales(rows), lmbda
        weight = weight / unit[:, None]
        penalty = price * _gaussian_curvature(weight, per_column=not config.bounded)
        penalty = penalty.minimum(PENALTY_LIMIT / factor.diagonal().square())
        if config.method != "cerwu" or lmbda == 0:
            penalty = torch.zeros_like(penalty)
        else:
            weight, factor = complete_square(weight, damped, penalty)
        steps, scales = grid.steps(columns), grid.scales(rows)
        x = weight * (unit / scales)[:, None] / steps
        _check_integers(x, config)
        square = factor.diagonal().square()
        bit = lmbda / (sensitivity.double() * scales.double().square())
        importance = steps.double().square() / square
        scale = _common_scale(importance)
        weights = Weights(
            lmbda=(bit / scale).clamp_max(PRICE_LIMIT).to(torch.float32),
            importance=(importance / scale).to(torch.float32),
            curvature=(penalty * square).to(torch.float32),
        )
        classes = _chosen_classes(x, bounds, config)
        return Problem(x, normalised_factor(factor, steps), grid, classes, weights, bounds, config)

    def solve(self) -> Tensor:
        """Symbols [m, n] int32 after all passes."""
        sampled = self._sampled()
        alphabet = sampled._first_alphabet()
        for _ in range(self.config.passes - 1):
            alphabet = sampled._alphabet(sampled._pass(alphabet))
        return self._pass(alphabet)

    def _sampled(self) -> "Problem":
        """The same problem for every k-th row, k such that about SAMPLED_ROWS rows are left."""
        rows = len(self.x)
        every = max(1, rows // SAMPLED_ROWS)
        if every == 1:
            return self
        keep = torch.arange(0, rows, every, device=self.x.device)
        bounds = [math.ceil(b / every) for b in self.bounds]
        classes = Classes(self.classes.row[keep], self.classes.column, self.classes.count)
        weights = self.weights.of_rows(keep)
        return Problem(self.x[keep], self.factor, self.grid, classes, weights, bounds, self.config)

    @property
    def _states(self) -> int:
        return TRELLIS_STATES[self.config.quantizer]

    def _first_alphabet(self) -> Alphabet:
        """Tables before any pass: of plain rounding, in each quantizer of a trellis."""
        if self.config.rate_model != "histogram":
            return self._modelled(self.x)
        table = self.classes.row[:, None] + self.classes.column
        if not self._states:
            return self._tables(nearest(self.x, self.grid), table)
        magnitude = self.x.abs()
        even = (magnitude / 2).round()
        odd = torch.where(magnitude < 0.5, 0.0, ((magnitude + 1) / 2).round())
        symbols = torch.cat([even, odd]).mul_(torch.sign(self.x).repeat(2, 1)).to(torch.int32)
        owner = torch.cat([2 * table, 2 * table + 1])
        bounds = self.bounds
        order = torch.cat(
            [
                torch.arange(first, last, device=self.x.device) + shift
                for first, last in pairwise(bounds)
                for shift in (0, len(self.x))
            ]
        )
        return self._tables(symbols[order], owner[order], rows_each=2)

    def _modelled(self, values: Tensor) -> Alphabet:
        """A table for each matrix of the stack by config.rate_model, on a given grid."""
        levels = self.grid.values()
        rates = [
            model_bits(self.config.rate_model, levels, values[first:last])
            for first, last in pairwise(self.bounds)
        ]
        return Alphabet(torch.stack(rates), self.grid.lowest or 0, False, self.grid.levels)

    def _alphabet(self, seen: Tensor) -> Alphabet:
        """Tables of the symbols of a pass."""
        if self.config.rate_model != "histogram":
            return self._modelled(self.grid.values()[seen - (self.grid.lowest or 0)])
        table = self.classes.row[:, None] + self.classes.column
        if self._states:
            table = 2 * table + trellis_quantizers(seen, self._states)
        return self._tables(seen, table)

    def _tables(self, symbols: Tensor, table: Tensor, rows_each: int = 1) -> Alphabet:
        """One alphabet for the stack, and tables of each of its matrices, one below the other."""
        count = self.classes.count * (2 if self._states else 1)
        span = symbol_range(symbols, self.grid, count, self._states)
        index = span.indices(symbols)
        parts = []
        for first, last in pairwise(self.bounds):
            rows = slice(rows_each * first, rows_each * last)
            counts = rate.histogram(index[rows], table[rows], count, span.total)
            table_codes = rate.codes(counts, span.mirrored, 2 if self._states else 1)
            parts.append(rate.rates(table_codes))
        rates = torch.cat(parts)
        if span.escapes:
            escape = rates[:, span.size :].amin(dim=1, keepdim=True) + rate.ESCAPE_PAYLOAD_BITS
            rates = torch.cat([rates[:, : span.size], escape], dim=1)
        return Alphabet(rates, span.lowest, bool(span.escapes), self.grid.levels)

    def _pass(self, alphabet: Alphabet) -> Tensor:
        number = torch.zeros(len(self.x), dtype=torch.int64, device=self.x.device)
        for first in self.bounds[1:-1]:
            number[first:] += self.classes.count
        row_class, block_size = self.classes.row + number, self.config.block_size
        # A Gaussian's rate draws large integers farther toward zero than near candidates reach.
        exhaustive = self.grid.lowest is not None and (
            alphabet.size <= EXHAUSTIVE_LEVELS or self.config.rate_model == "gaussian"
        )
        parts = []
        for first in range(0, len(self.x), CHUNK_ROWS):
            rows = slice(first, first + CHUNK_ROWS)
            arguments = (
                self.x[rows],
                self.factor,
                alphabet,
                row_class[rows],
                self.classes.column,
                self.weights.of_rows(rows),
            )
            if self._states:
                done = trellis_pass(*arguments, block_size=block_size, states=self._states)
            else:
                done = scalar_pass(*arguments, block_size=block_size, exhaustive=exhaustive)
            parts.append(done)
        symbols = torch.cat(parts)
        _check_integers(symbols, self.config)
        return symbols


def _common_scale(importance: Tensor) -> float:
    """What to divide all costs by, which changes no decision, so that they stay within float32."""
    size = float(importance.max())
    return 1.0 if 1 / SCALE_LIMIT < size < SCALE_LIMIT else 2.0 ** round(math.log2(size))


def _check_integers(x: Tensor, config: CompressionConfig) -> None:
    """Refuse integers, or what they are rounded from, beyond LEVEL_LIMIT; NaN is beyond it, too.

    Raises:
        ConfigError: there are such.
    """
    low, high = (float(end) for end in torch.aminmax(x))  # |-2^31| has no int32
    if not -LEVEL_LIMIT < low <= high < LEVEL_LIMIT:
        raise ConfigError(
            f"lmbda {config.lmbda:g} takes its integers past 2**24: raise it, or the damping."
        )


def _chosen_classes(x: Tensor, bounds: list[int], config: CompressionConfig) -> Classes:
    """One class on a given grid, else the ones that suit x."""
    if config.bounded:
        return Classes.single(*x.shape, device=x.device)
    quantizers = 2 if TRELLIS_STATES[config.quantizer] else 1
    return choose_classes(x, matrices=len(bounds) - 1, quantizers=quantizers)


def _gaussian_curvature(weight: Tensor, *, per_column: bool) -> Tensor:
    """gamma_j = 1 / (variance ln 2) [n] float64, of each column or of the whole matrix."""
    square = weight.to(torch.float64).square()
    total = square.mean()
    if float(total) == 0:
        return torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    variance = square.mean(dim=0).clamp_min(1e-6 * total) if per_column else total
    return (1 / (variance * math.log(2))).expand(weight.shape[1])
