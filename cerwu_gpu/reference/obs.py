r"""Rate-aware Optimal Brain Surgeon rounding of one block of columns: the definition, in torch.

`cerwu_gpu.block_problem` has the notation and the rule.
"""

import torch
from torch import Tensor

from cerwu_gpu.block_problem import Alphabet, BlockProblem

LEAF_COLUMNS = 8
"""Columns updated one by one before the rest of the block sees them in one matrix product."""


def quantize_block(problem: BlockProblem, *, exhaustive: bool) -> tuple[Tensor, Tensor]:
    """Quantize the columns of one block.

    Args:
        problem: its weights x [m, B] are left as they are.
        exhaustive: scan the whole alphabet. Otherwise only the nearest integers, their
            neighbours and zero are candidates, which finds the same symbols where the tables
            are smooth.

    Returns:
        symbols [m, B] int32 (integers, or positions in `levels`), and the errors
        x - value [m, B] float32 at the moment each column was rounded.
    """
    if problem.batch > 1:
        each = [
            quantize_block(problem.one(number), exhaustive=exhaustive)
            for number in range(problem.batch)
        ]
        return torch.cat([symbols for symbols, _ in each]), torch.cat([error for _, error in each])
    problem = problem.one(0)
    alphabet, factor = problem.alphabet, problem.factor
    work = problem.x.t().clone(memory_format=torch.contiguous_format)
    symbols = torch.empty(work.shape, dtype=torch.int32, device=work.device)
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
            table = problem.row_class + problem.column_class[j]
            omega, beta = problem.importance[j], problem.curvature[j]
            symbol, value = choose(work[j], problem.lmbda, omega, beta, table, alphabet)
            symbols[j] = symbol
            torch.sub(work[j], value, out=error[j])
            if j + 1 < last:
                work[j + 1 : last].addr_(factor[j, j + 1 : last], error[j], alpha=-1)

    solve(0, work.shape[0])
    return symbols.t(), error.t()


def _scan_near(
    x: Tensor, lmbda: Tensor, omega: Tensor, beta: Tensor, table: Tensor, alphabet: Alphabet
) -> tuple[Tensor, Tensor]:
    """Choose among round(x) + sign, round(x), the next two toward zero, and zero."""
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
    """Return the bits of the integers g (float32, exact) under the tables that start at base."""
    index = g.to(torch.int64)
    if not alphabet.escapes:
        index.clamp_(alphabet.lowest, highest)  # NaN must not read out of range
        return alphabet.rates.view(-1)[base + index]
    outside = (index > highest) | (index < alphabet.lowest)
    index = torch.where(outside, highest + 1, index)
    return alphabet.rates.view(-1)[base + index]


def _scan_all(
    x: Tensor, lmbda: Tensor, omega: Tensor, beta: Tensor, table: Tensor, alphabet: Alphabet
) -> tuple[Tensor, Tensor]:
    """Choose among all levels of the alphabet; the first minimum wins."""
    levels = alphabet.levels
    if levels is None:
        levels = torch.arange(alphabet.size, dtype=torch.float32, device=x.device) + alphabet.lowest
    rates = alphabet.rates[:, : alphabet.size][table]
    cost = (x[:, None] - levels).square_().sub_(levels.square() * beta).mul_(omega / 2)
    cost.addcmul_(lmbda[:, None], rates)
    symbol = cost.argmin(dim=1)
    return (symbol + alphabet.lowest).to(torch.int32), levels[symbol]
