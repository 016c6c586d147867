r"""Rate-aware Optimal Brain Surgeon rounding of one block of columns: the definition, in torch.

All quantities are in index space: x = W' / (step_j t_i), and the factor is normalised,

    V_jk = (step_j / step_k) C'_jk / C'_jj      (upper triangular, unit diagonal),

so that the row scale t_i drops out. For columns j = 1 ... B in order, all rows i at once:

    q_ij = argmin_g  omega_j (1/2 (x_ij - g)^2 - 1/2 beta_j g^2) + lmbda_i r_ij(g)
    x_ik <- x_ik - (x_ij - q_ij) V_jk           for every k > j

with omega_j = (step_j / C'_jj)^2, beta_j = lmbda gamma_j C'_jj^2, lmbda_i = lmbda / t_i^2, and r_ij
the rate table number row_class_i + column_class_j (docs/method.md).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LEAF_COLUMNS = 8
"""Columns updated one by one before the rest of the block sees them in one matrix product."""


@dataclass(frozen=True)
class Alphabet:
    """Which integers a column may take, and what each of them costs.

    Attributes:
        rates: [T, K] float32, bits of the integers lowest ... lowest + K - 1 under each table;
            with `escapes`, one more column holds the bits of an escape, payload included.
        lowest: the integer of the first column of `rates`.
        escapes: integers outside of the range are allowed and cost an escape.
        levels: [K] float32, ascending values when the grid is a list; the "integers" are then
            positions in the list and `lowest` is 0. None: the value is the integer itself.
    """

    rates: Tensor
    lowest: int
    escapes: bool = False
    levels: Tensor | None = None

    @property
    def size(self) -> int:
        """K, without the escape."""
        return self.rates.shape[1] - int(self.escapes)


def quantize_block(
    x: Tensor,
    factor: Tensor,
    alphabet: Alphabet,
    row_class: Tensor,
    column_class: Tensor,
    lmbda: Tensor,
    importance: Tensor,
    curvature: Tensor,
    *,
    exhaustive: bool,
) -> tuple[Tensor, Tensor]:
    """Quantize the columns of one block.

    Args:
        x: [m, B] float32, the block's weights in index space; left as it is.
        factor: [B, B] float32, V of this block.
        alphabet: the grid and its rate tables.
        row_class, column_class: [m] and [B] int64; their sum is the number of the table.
        lmbda: [m] float32, what a bit costs in each row.
        importance: [B] float32, omega.
        curvature: [B] float32, beta.
        exhaustive: scan the whole alphabet. Otherwise only the nearest integers, their
            neighbours and zero are candidates, which finds the same symbols where the tables
            are smooth.

    Returns:
        symbols [m, B] int32 (integers, or positions in `levels`), and the errors
        x - value [m, B] float32 at the moment each column was rounded.
    """
    work = x.t().clone(memory_format=torch.contiguous_format)
    symbols = torch.empty(work.shape, dtype=torch.int32, device=x.device)
    error = torch.empty_like(work)
    choose = _scan_all if exhaustive or alphabet.levels is not None else _scan_near

    def solve(first: int, last: int) -> None:
        if last - first > LEAF_COLUMNS:
            middle = (first + last) // 2
            solve(first, middle)
            work[middle:last].addmm_(
                factor[first:middle, middle:last].t(), error[first:middle], alpha=-1
            )
            solve(middle, last)
            return
        for j in range(first, last):
            table = row_class + column_class[j]
            symbol, value = choose(work[j], lmbda, importance[j], curvature[j], table, alphabet)
            symbols[j] = symbol
            torch.sub(work[j], value, out=error[j])
            if j + 1 < last:
                work[j + 1 : last].addr_(factor[j, j + 1 : last], error[j], alpha=-1)

    solve(0, work.shape[0])
    return symbols.t(), error.t()


def _scan_near(
    x: Tensor, lmbda: Tensor, omega: Tensor, beta: Tensor, table: Tensor, alphabet: Alphabet
) -> tuple[Tensor, Tensor]:
    """Candidates round(x) + sign, round(x), the next two toward zero, and zero."""
    highest = alphabet.lowest + alphabet.size - 1
    nearest = x.round()
    if not alphabet.escapes:
        nearest.clamp_(alphabet.lowest, highest)
    toward_zero = torch.sign(nearest)
    outward = torch.where(nearest == 0, torch.sign(x), toward_zero)
    base = table * alphabet.rates.shape[1] - alphabet.lowest
    best_cost = best = None
    zero = torch.zeros_like(x)
    inner = nearest - toward_zero
    for g in (zero, nearest, nearest + outward, inner, inner - torch.sign(inner)):
        if not alphabet.escapes:
            g = g.clamp(alphabet.lowest, highest)
        cost = (x - g).square_().sub_(g * g * beta).mul_(omega / 2)
        cost.addcmul_(lmbda, _rate(g, base, alphabet, highest))
        if best is None or best_cost is None:
            best_cost, best = cost, g
        else:
            better = cost < best_cost
            best_cost = torch.where(better, cost, best_cost)
            best = torch.where(better, g, best)
    assert best is not None
    return best.to(torch.int32), best


def _rate(g: Tensor, base: Tensor, alphabet: Alphabet, highest: int) -> Tensor:
    """Bits of the integers g (float32, exact) under the tables that start at base."""
    index = g.to(torch.int64)
    if not alphabet.escapes:
        index.clamp_(alphabet.lowest, highest)  # what is no number must not read out of range
        return alphabet.rates.view(-1)[base + index]
    outside = (index > highest) | (index < alphabet.lowest)
    index = torch.where(outside, highest + 1, index)
    return alphabet.rates.view(-1)[base + index]


def _scan_all(
    x: Tensor, lmbda: Tensor, omega: Tensor, beta: Tensor, table: Tensor, alphabet: Alphabet
) -> tuple[Tensor, Tensor]:
    """Every level of the alphabet; the first minimum wins."""
    levels = alphabet.levels
    if levels is None:
        levels = torch.arange(alphabet.size, dtype=torch.float32, device=x.device) + alphabet.lowest
    rates = alphabet.rates[:, : alphabet.size][table]
    cost = (x[:, None] - levels).square_().sub_(levels.square() * beta).mul_(omega / 2)
    cost.addcmul_(lmbda[:, None], rates)
    symbol = cost.argmin(dim=1)
    return (symbol + alphabet.lowest).to(torch.int32), levels[symbol]
