r"""Neighbouring classes share a table where their own tables would cost more than they save.

Classes are ordered by spread, so their tables are alike from one to the next. The classes are cut
into runs; with N_k(run) the counts of a run, taken together, and P its total,

    cost = sum over runs of ( sum_k N_k log2(P / N_k) + CODE_BITS * codes of a table )

is least over all cuts by dynamic programming: best(b) = min over a < b of best(a) + cost(a, b).
"""

import torch
from torch import Tensor

CODE_BITS = 4.0
"""What a table code takes in the side data, differences deflated; measured on real layers."""


def shared_histograms(counts: Tensor, quantizers: int, codes: int) -> Tensor:
    """The counts with each class's replaced by those of its run.

    Args:
        counts: [T * quantizers, K] int64, the histograms of class t in rows t * quantizers on.
        quantizers: 1, or 2 under a trellis: these share their runs.
        codes: how many of the K codes of a table are stored (half of a symmetric alphabet).

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
    """Bits of the symbols counted and of their tables, after sharing; arguments as above."""
    return _cheapest_cut(counts.view(-1, quantizers, counts.shape[1]), codes)[1]


def _cheapest_cut(tables: Tensor, codes: int) -> tuple[list[int], float]:
    """Where the run that ends before each class begins, and the cost; tables [T, Q, K]."""
    until = torch.cat([torch.zeros_like(tables[:1]), tables.cumsum(dim=0)])
    price = CODE_BITS * codes * tables.shape[1]
    best, cut = [0.0], [0]
    for last in range(1, len(tables) + 1):
        runs = until[last] - until[:last]
        costs = _entropy_bits(runs) + price + torch.tensor(best, dtype=torch.float64)
        first = int(costs.argmin())
        best.append(float(costs[first]))
        cut.append(first)
    return cut, best[-1]


def _entropy_bits(runs: Tensor) -> Tensor:
    """Bits [R] float64 of the symbols of each run, counts [R, Q, K], under its own frequencies."""
    wide = runs.to(torch.float64)
    total = torch.special.xlogy(wide.sum(dim=2), wide.sum(dim=2)).sum(dim=1)
    own = torch.special.xlogy(wide, wide).sum(dim=(1, 2))
    bits: Tensor = ((total - own) / torch.log(torch.tensor(2.0, dtype=torch.float64))).cpu()
    return bits
