"""A stack of matrices in index space, ready for its passes (docs/method.md)."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from cerwu_gpu import backend
from cerwu_gpu.block_problem import Alphabet, BlockProblem
from cerwu_gpu.config import CompressionConfig, Waterfilled
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.quantize import rate
from cerwu_gpu.quantize.classes import Classes, choose_classes
from cerwu_gpu.quantize.grid import Grid, nearest, scaled, waterfilled
from cerwu_gpu.quantize.objective import complete_square, inverse_upper, normalised_factor
from cerwu_gpu.quantize.passes import scalar_pass, trellis_pass
from cerwu_gpu.quantize.rate_models import model_bits
from cerwu_gpu.quantize.strips import mean_squares
from cerwu_gpu.quantize.symbols import symbol_range

PASS_SAMPLE_ROWS = 512
"""Rows of a stack, about, in passes before the last: enough to estimate its tables."""
EXACT_LIMIT = 1 << 24
"""Magnitude below which integers are searched: float32 is exact up to it."""
PENALTY_LIMIT = 1e4
"""Maximum share of a column's 1 / C_jj^2 that the quadratic rate may be: a larger one cancels
against the error in float32. Weights that would have it are 0 anyway: their root mean square is
below 0.003 waterfilled steps."""
PRICE_LIMIT = 1e30
"""Maximum price of a bit: beyond, only bits count anyway, and products would leave float32."""
SCALE_LIMIT = 1e15
"""Range of the largest omega_j, from its inverse on: x^2 < 2^48 in float32 comes on top."""
EXHAUSTIVE_LEVELS = 65
"""Maximum size of a bounded alphabet that is scanned whole; larger ones near the target."""


@dataclass(frozen=True)
class Problem:
    """A stack in index space, ready for its passes.

    Attributes:
        x: [m, n] float32, the weights in index space; `factor` is V [n, n] float32.
        lmbda, importance, curvature: [m], [n] and [n] float32, as in `BlockProblem`.
        grid, classes: the levels of symbols, and the table of each of them.
        bounds: row ranges of the matrices in the stack.
    """

    x: Tensor
    factor: Tensor
    grid: Grid
    classes: Classes
    lmbda: Tensor
    importance: Tensor
    curvature: Tensor
    bounds: list[int]
    config: CompressionConfig

    @staticmethod
    def build(
        weight: Tensor,
        sensitivity: Tensor,
        damped: Tensor,
        upper: Tensor,
        bounds: list[int],
        config: CompressionConfig,
    ) -> "Problem":
        """Choose steps and classes of a stack, and complete the square.

        Args:
            weight: W [m, n] float32.
            sensitivity: alpha [m] float32 > 0, the cost of a unit of squared error in each row.
            damped: H [n, n] float64, damped; `upper` its factor R [n, n] float64, H = R R^T.
            bounds: row ranges of the matrices in the stack.
            config: method, grid and trade-off.
        """
        rows, columns = weight.shape
        lmbda = 0.0 if config.method == "optq" else config.lmbda
        diagonal = 1 / upper.diagonal()  # of C = R^-1
        if not isinstance(config.grid, Waterfilled):
            grid = scaled(weight, config.grid)
            unit, price = torch.ones_like(sensitivity), lmbda / float(sensitivity.mean())
        else:
            grid = waterfilled(
                weight, diagonal, sensitivity, config.lmbda, config.states, len(bounds) - 1
            )
            unit, price = grid.scales(rows), lmbda
        weight = weight / unit[:, None]
        penalty = price * _gaussian_curvature(weight, per_column=not config.bounded)
        penalty = penalty.minimum(PENALTY_LIMIT / diagonal.square())
        if not config.completes_square or lmbda == 0:
            penalty, factor = torch.zeros_like(penalty), inverse_upper(upper)
        else:
            weight, factor = complete_square(weight, damped, penalty)
        steps, scales = grid.steps(columns), grid.scales(rows)
        x = weight.mul_((unit / scales)[:, None]).div_(steps)  # a copy since the division by unit
        _check_integers(x, config)
        square = factor.diagonal().square()
        bit = lmbda / (sensitivity.double() * scales.double().square())
        importance = steps.double().square() / square
        scale = _common_scale(importance)
        return Problem(
            x=x,
            factor=normalised_factor(factor, steps),
            grid=grid,
            classes=_chosen_classes(x, bounds, config),
            lmbda=(bit / scale).clamp_max(PRICE_LIMIT).to(torch.float32),
            importance=(importance / scale).to(torch.float32),
            curvature=(penalty * square).to(torch.float32),
            bounds=bounds,
            config=config,
        )

    def solve(self) -> Tensor:
        """Return the symbols [m, n] int32 after all passes."""
        sampled = self._sampled()
        alphabet = sampled._first_alphabet()
        for _ in range(self.config.objective.passes - 1):
            alphabet = sampled._alphabet(sampled._pass(alphabet))
        return self._pass(alphabet)

    def _sampled(self) -> "Problem":
        """Return the problem of every k-th row, about PASS_SAMPLE_ROWS of them."""
        rows = len(self.x)
        stride = max(1, rows // PASS_SAMPLE_ROWS)
        if stride == 1:
            return self
        sample = torch.arange(0, rows, stride, device=self.x.device)
        bounds = [math.ceil(b / stride) for b in self.bounds]
        classes = Classes(self.classes.row[sample], self.classes.column, self.classes.count)
        return replace(
            self, x=self.x[sample], classes=classes, lmbda=self.lmbda[sample], bounds=bounds
        )

    @property
    def _states(self) -> int:
        return self.config.states

    def _first_alphabet(self) -> Alphabet:
        """Return tables before any pass: of plain rounding, in each quantizer of a trellis."""
        if self.config.rate_model != "histogram":
            return self._modelled(self.x)
        if not self._states:
            return self._tables(nearest(self.x, self.grid))
        magnitude, sign = self.x.abs(), torch.sign(self.x)
        first = (magnitude / 2).round() * sign
        second = torch.where(magnitude < 0.5, 0.0, ((magnitude + 1) / 2).round()) * sign
        return self._tables(first.to(torch.int32), second.to(torch.int32))

    def _modelled(self, values: Tensor) -> Alphabet:
        """Return a table for each matrix of the stack by the rate model, on a given grid."""
        levels = self.grid.values()
        rates = [
            model_bits(self.config.rate_model, levels, values[first:last])
            for first, last in pairwise(self.bounds)
        ]
        return Alphabet(torch.stack(rates), self.grid.lowest or 0, False, self.grid.levels)

    def _alphabet(self, seen: Tensor) -> Alphabet:
        """Return tables for the symbols of a pass."""
        if self.config.rate_model != "histogram":
            return self._modelled(self.grid.values()[seen - (self.grid.lowest or 0)])
        return self._tables(seen)

    def _tables(self, symbols: Tensor, second_symbols: Tensor | None = None) -> Alphabet:
        """Return one alphabet for the stack, with tables of its matrices one below the other.

        Args:
            symbols: [m, n] int32, the result of a pass.
            second_symbols: [m, n] int32, those that the second quantizer of a trellis would give
                before any pass; `symbols` are then those of the first.
        """
        classes, states = self.classes, self._states
        seen = symbols if second_symbols is None else torch.cat([symbols, second_symbols])
        span = symbol_range(seen, self.grid, classes.count * (2 if states else 1), states)

        def counted(symbols: Tensor, second: Tensor | None, rows: slice) -> Tensor:
            row, column = classes.row[rows], classes.column
            return span.counts(symbols, second, row, column, classes.count)

        parts = []
        for first, last in pairwise(self.bounds):
            rows = slice(first, last)
            if second_symbols is None:
                second = backend.trellis_quantizers(symbols[rows], states) if states else None
                counts = counted(symbols[rows], second, rows)
            else:
                both = [
                    counted(integers[rows], None, rows) for integers in (symbols, second_symbols)
                ]
                counts = torch.stack(both, dim=1).flatten(0, 1)
            table_codes = rate.codes(counts, span.paired, 2 if states else 1)
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
        problem = BlockProblem(
            x=self.x,
            factor=self.factor,
            alphabet=alphabet,
            row_class=self.classes.row + number,
            column_class=self.classes.column,
            lmbda=self.lmbda,
            importance=self.importance,
            curvature=self.curvature,
        )
        block_size = self.config.objective.block_size
        if self._states:
            symbols = trellis_pass(problem, block_size=block_size, states=self._states)
        else:
            # A Gaussian's rate draws large integers farther toward zero than near candidates reach.
            exhaustive = self.grid.lowest is not None and (
                alphabet.size <= EXHAUSTIVE_LEVELS or self.config.rate_model == "gaussian"
            )
            symbols = scalar_pass(problem, block_size=block_size, exhaustive=exhaustive)
        _check_integers(symbols, self.config)
        return symbols


def _common_scale(importance: Tensor) -> float:
    """Return a divisor of all costs, which changes no decision, that keeps them within float32."""
    size = float(importance.max())
    return 1.0 if 1 / SCALE_LIMIT < size < SCALE_LIMIT else 2.0 ** round(math.log2(size))


def _check_integers(x: Tensor, config: CompressionConfig) -> None:
    """Refuse integers, or values to be rounded to them, beyond EXACT_LIMIT; NaN counts as beyond.

    Raises:
        ConfigError: there are such.
    """
    low, high = (float(end) for end in torch.aminmax(x))  # |-2^31| has no int32
    if not -EXACT_LIMIT < low <= high < EXACT_LIMIT:
        raise ConfigError(
            f"lmbda {config.lmbda:g} takes its integers past 2**24: raise it, or the damping."
        )


def _chosen_classes(x: Tensor, bounds: list[int], config: CompressionConfig) -> Classes:
    """Return one class on a given grid, else classes that suit x."""
    if config.bounded:
        return Classes.single(*x.shape, device=x.device)
    quantizers = 2 if config.states else 1
    return choose_classes(x, matrices=len(bounds) - 1, quantizers=quantizers)


def _gaussian_curvature(weight: Tensor, *, per_column: bool) -> Tensor:
    """Return gamma_j = 1 / (variance ln 2) [n] float64, of each column or of the whole matrix."""
    square = mean_squares(weight)[1]
    total = square.mean()
    if float(total) == 0:
        return torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    variance = square.clamp_min(1e-6 * total) if per_column else total
    return (1 / (variance * math.log(2))).expand(weight.shape[1])
