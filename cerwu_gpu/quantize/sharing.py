r"""Neighbouring classes share a table where their own tables would cost more than they save.

Classes are ordered by spread, so their tables are alike from one to the next. The classes are cut
into runs; with N_k(run) the counts of a run, taken together, and P its total,

    cost = sum over runs of ( sum_k N_k log2(P / N_k) + CODE_BITS * codes of a table )

is least over all cuts by dynamic programming: best(b) = min over a < b of best(a) + cost(a, b).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CODE_BITS = 4.0
"""Bits of a table code in the side data, differences deflated; measured on real layers."""


def shared_histograms(counts: Tensor, quantizers: int, codes: int) -> Tensor:
    """Return the counts with each class's replaced by those of its run.

    Args:
        counts: [T * quantizers, K] int64, the histograms of class t in rows t * quantizers on.
        quantizers: 1, or 2 under a trellis: these share their runs.
        codes: number of the K codes of a table that are stored (half of a symmetric alphabet).

    Returns:
        [T * quantizers, K] int64; classes of one run hold equal rows.
    """
    tables = counts.view(-1, quantizers, counts.shape[1])
    shared = torch.empty_like(tables)
    cut, last = _cheapest_cut(tables, codes)[0], len(tables)
    while last > 0:
        first = cut[last]
        shared[first:last] = tables[first:last].sum(dim=0)
        last = first
    return shared.view_as(counts)


def shared_bits(counts: Tensor, quantizers: int, codes: int) -> float:
    """Return the bits of the symbols and of their tables, after sharing; arguments as above."""
    return _cheapest_cut(counts.view(-1, quantizers, counts.shape[1]), codes)[1]


def _cheapest_cut(tables: Tensor, codes: int) -> tuple[list[int], float]:
    """Return where the run that ends before each class begins, and the cost; tables [T, Q, K]."""
    counts = tables.cpu().numpy().astype(np.float64)
    until = np.concatenate([np.zeros_like(counts[:1]), counts.cumsum(axis=0)])
    price = CODE_BITS * codes * tables.shape[1]
    best, cut = np.zeros(1), [0]
    for last in range(1, len(tables) + 1):
        costs = _entropy_bits(until[last] - until[:last]) + price + best
        first = int(costs.argmin())
        best = np.append(best, costs[first])
        cut.append(first)
    return cut, float(best[-1])


def _entropy_bits(runs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the bits [R] of each run's symbols, counts [R, Q, K], under its own frequencies."""
    total = runs.sum(axis=2)
    bits: NDArray[np.float64] = _xlog2(total).sum(axis=1) - _xlog2(runs).sum(axis=(1, 2))
    return bits


def _xlog2(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return x log2 x of counts, 0 for 0."""
    product: NDArray[np.float64] = x * np.log2(np.maximum(x, 1))
    return product
