"""Stacks of matrices in index space, ready for their passes (docs/method.md)."""

import math
from dataclasses import dataclass, replace
from functools import partial
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
from cerwu_gpu.quantize.objective import Factors, completed, normalised_factor
from cerwu_gpu.quantize.passes import scalar_pass, trellis_pass
from cerwu_gpu.quantize.rate_models import model_bits
from cerwu_gpu.quantize.strips import mean_squares
from cerwu_gpu.quantize.symbols import counted, suitable_range, widest_range

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
    """B stacks of equal shape in index space, ready for their passes.

    Attributes:
        x: [B, m, n] float32, the weights in index space; `factor` is V [B, n, n] float32.
        lmbda, importance, curvature: [B, m], [B, n] and [B, n] float32, as in `BlockProblem`.
        grid, classes: the levels of symbols, and the table of each of them.
        bounds: row ranges of the matrices in a stack.
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
        factors: Factors,
        bounds: list[int],
        config: CompressionConfig,
    ) -> "Problem":
        """Choose steps and classes of stacks, and complete the square.

        Args:
            weight: W [B, m, n] float32; B is 1 on a given grid.
            sensitivity: alpha [B, m] float32 > 0, the cost of a unit of squared error in each row.
            factors: H [B, n, n], damped, and their factors, which are used up.
            bounds: row ranges of the matrices in a stack.
            config: method, grid and trade-off.
        """
        _, rows, columns = weight.shape
        lmbda = 0.0 if config.method == "optq" else config.lmbda
        diagonal = 1 / factors.diagonal  # of C = R^-1
        if not isinstance(config.grid, Waterfilled):
            grid = scaled(weight[0], config.grid)
            unit, price = torch.ones_like(sensitivity), lmbda / float(sensitivity.mean())
        else:
            grid = waterfilled(
                weight, diagonal, sensitivity, config.lmbda, config.states, len(bounds) - 1
            )
            unit, price = grid.scales(rows), lmbda
        weight = weight / unit[..., None]
        penalty = price * _gaussian_curvature(weight, per_column=not config.bounded)
        penalty = penalty.minimum(PENALTY_LIMIT / diagonal.square())
        if not config.completes_square or lmbda == 0:
            penalty, factor = torch.zeros_like(penalty), factors.inverse()
        else:
            factor = factors.penalised_inverse(penalty)
            weight = completed(weight, factor, penalty)
        steps, scales = grid.steps(columns), grid.scales(rows)
        # In place: a copy since the division by unit.
        x = weight.mul_((unit / scales)[..., None]).div_(steps[:, None, :])
        _check_integers(x, config)
        square = factor.diagonal(dim1=1, dim2=2).square()
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
        """Return the symbols [B, m, n] int32 after all passes."""
        sampled = self._sampled()
        alphabet = sampled._first_alphabet()
        for _ in range(self.config.objective.passes - 1):
            alphabet = sampled._alphabet(sampled._pass(alphabet))
        return self._pass(alphabet)

    def _sampled(self) -> "Problem":
        """Return the problem of every k-th row, about PASS_SAMPLE_ROWS of a stack's."""
        rows = self.x.shape[1]
        stride = max(1, rows // PASS_SAMPLE_ROWS)
        if stride == 1:
            return self
        sample = torch.arange(0, rows, stride, device=self.x.device)
        bounds = [math.ceil(b / stride) for b in self.bounds]
        classes = replace(self.classes, row=self.classes.row[:, sample])
        return replace(
            self, x=self.x[:, sample], classes=classes, lmbda=self.lmbda[:, sample], bounds=bounds
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
        """Return a table for each matrix of the one stack by the rate model, on a given grid."""
        levels = self.grid.values()
        rates = [
            model_bits(self.config.rate_model, levels, values[0, first:last])
            for first, last in pairwise(self.bounds)
        ]
        return Alphabet(torch.stack(rates), self.grid.lowest or 0, False, self.grid.levels)

    def _alphabet(self, seen: Tensor) -> Alphabet:
        """Return tables for the symbols of a pass."""
        if self.config.rate_model != "histogram":
            return self._modelled(self.grid.values()[seen - (self.grid.lowest or 0)])
        return self._tables(seen)

    def _tables(self, symbols: Tensor, second_symbols: Tensor | None = None) -> Alphabet:
        """Return one alphabet for all stacks, with the tables of all matrices one below the other.

        A stack whose own alphabet is narrower has an escape's bits beyond it, as it would alone.

        Args:
            symbols: [B, m, n] int32, the result of a pass.
            second_symbols: [B, m, n] int32, those that the second quantizer of a trellis would give
                before any pass; `symbols` are then those of the first.
        """
        states, own = self._states, self.classes.counts
        widest = widest_range(self.grid, states)
        count = partial(
            counted,
            row_class=self.classes.row,
            column_class=self.classes.column,
            bounds=self.bounds,
            widest=widest,
            tables=max(own),
        )
        if second_symbols is not None:
            counts = torch.cat([count(symbols, None), count(second_symbols, None)], dim=3)
        elif states:
            second = backend.trellis_quantizers(symbols.flatten(0, 1), states)
            counts = count(symbols, second.view_as(symbols))
        else:
            counts = count(symbols, None)
        spans = [
            suitable_range(widest, counts[stack], tables * counts.shape[3])
            for stack, tables in enumerate(own)
        ]
        matrices = counts.shape[1]
        owners = [stack for stack in range(len(own)) for _ in range(matrices)]
        histograms = [
            widest.narrowed(counts[stack, matrix, : own[stack]], spans[stack])
            for stack in range(len(own))
            for matrix in range(matrices)
        ]
        codes = rate.codes(histograms, [spans[stack].paired for stack in owners])
        common = max(spans, key=lambda span: span.size)
        width = common.size + (1 if common.escapes else 0)
        rates = torch.zeros(len(codes), max(own), counts.shape[3], width)
        for place, (stack, table_codes) in enumerate(zip(owners, codes, strict=True)):
            bits, span = rate.rates(table_codes), spans[stack]
            first = span.lowest - common.lowest
            to = rates[place, : own[stack]]
            if span.escapes:
                escape = bits[..., span.size :].amin(dim=-1, keepdim=True)
                to[:] = escape + rate.ESCAPE_PAYLOAD_BITS
            to[..., first : first + span.size] = bits[..., : span.size]
        flat = rates.flatten(0, 2).to(symbols.device)
        return Alphabet(flat, common.lowest, bool(common.escapes), self.grid.levels)

    def _pass(self, alphabet: Alphabet) -> Tensor:
        stacks, rows, columns = self.x.shape
        matrices = len(self.bounds) - 1
        number = torch.arange(stacks, device=self.x.device)[:, None] * matrices
        number = number.repeat(1, rows)
        for first in self.bounds[1:-1]:
            number[:, first:] += 1
        problem = BlockProblem(
            x=self.x.view(stacks * rows, columns),
            factor=self.factor,
            alphabet=alphabet,
            row_class=(self.classes.row + number * max(self.classes.counts)).flatten(),
            column_class=self.classes.column,
            lmbda=self.lmbda.flatten(),
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
        return symbols.view(stacks, rows, columns)


def _common_scale(importance: Tensor) -> Tensor:
    """Return divisors [B, 1] of all costs [B, n], which change no decision, that keep them within
    float32."""
    sizes = importance.amax(dim=1).tolist()
    scales = [
        1.0 if 1 / SCALE_LIMIT < size < SCALE_LIMIT else 2.0 ** round(math.log2(size))
        for size in sizes
    ]
    return importance.new_tensor(scales)[:, None]


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
    """Return one class on a given grid, else classes that suit x [B, m, n]."""
    if config.bounded:
        return Classes.single(*x.shape, device=x.device)
    quantizers = 2 if config.states else 1
    return choose_classes(x, matrices=len(bounds) - 1, quantizers=quantizers)


def _gaussian_curvature(weight: Tensor, *, per_column: bool) -> Tensor:
    """Return gamma_j = 1 / (variance ln 2) [B, n] float64, of each column or of a whole stack."""
    square = mean_squares(weight)[1]
    total = square.mean(dim=1, keepdim=True)
    variance = square.maximum(1e-6 * total) if per_column else total.expand_as(square)
    return (1 / (variance * math.log(2))).where(total > 0, 0.0)
