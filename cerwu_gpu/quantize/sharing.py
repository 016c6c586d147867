r"""Neighbouring classes share a table where their own tables would cost more than they save.

Classes are ordered by spread, so their tables are alike from one to the next. The classes are cut
into runs; with N_k(run) the counts of a run, taken together, and P its total,

    cost = sum over runs of ( sum_k N_k log2(P / N_k) + CODE_BITS * codes of a table )

is least over all cuts by dynamic programming: best(b) = min over a < b of best(a) + cost(a, b).
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CODE_BITS = 4.0
"""Bits of a table code in the side data, differences deflated; measured on real layers."""


def shared_histograms(counts: Sequence[Tensor], codes: Sequence[int]) -> list[Tensor]:
    """Return the counts of matrices with each class's replaced by those of its run.

    Args:
        counts: [T, Q, K] int64 of each matrix, the histograms of its T classes under the Q
            quantizers, which share their runs; only T and K may differ.
        codes: numbers of the K codes of a table that are stored (half of a symmetric alphabet).

    Returns:
        [T, Q, K] int64; classes of one run hold equal rows.
    """
    tables, width = (max(x.shape[axis] for x in counts) for axis in (0, 2))
    padded = np.zeros((len(counts), tables, counts[0].shape[1], width))
    for number, each in enumerate(counts):
        padded[number, : each.shape[0], :, : each.shape[2]] = each.cpu().numpy()
    cuts, _ = _cheapest_cuts(padded, np.asarray(codes))
    result = []
    for each, cut in zip(counts, cuts.tolist(), strict=True):
        shared, last = torch.empty_like(each), len(each)
        while last > 0:
            first = cut[last]
            shared[first:last] = each[first:last].sum(dim=0)
            last = first
        result.append(shared)
    return result


def shared_bits(
    counts: Tensor, codes: NDArray[np.int64], tables: Sequence[int]
) -> NDArray[np.float64]:
    """Return the bits [B] of the symbols and of their tables, after sharing.

    Args:
        counts: [B, T, Q, K] int64, the histograms of each matrix.
        codes: [B], as in `shared_histograms`.
        tables: number of classes of each matrix, at most T.
    """
    best = _cheapest_cuts(counts.cpu().numpy().astype(np.float64), codes)[1]
    bits: NDArray[np.float64] = best[np.arange(len(best)), np.asarray(tables)]
    return bits


def _cheapest_cuts(
    tables: NDArray[np.float64], codes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return where the run that ends before each class begins, and the least cost up to there,
    [B, T + 1] both; tables [B, T, Q, K], zeros beyond a matrix's own classes and symbols."""
    batch, count, quantizers, _ = tables.shape
    until = np.zeros((count + 1, *tables.shape[:1], *tables.shape[2:]))
    np.cumsum(tables.swapaxes(0, 1), axis=0, out=until[1:])
    price = CODE_BITS * codes * quantizers
    best, cut = np.zeros((batch, count + 1)), np.zeros((batch, count + 1), dtype=np.int64)
    for last in range(1, count + 1):
        costs = _entropy_bits(until[last] - until[:last]) + price + best[:, :last].T
        cut[:, last] = costs.argmin(axis=0)
        best[:, last] = costs.min(axis=0)
    return cut, best


def _entropy_bits(runs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the bits [R, B] of runs' symbols, counts [R, B, Q, K], under their own frequencies."""
    total = runs.sum(axis=3)
    # Running sums: zeros after a matrix's own symbols change no bit of the result.
    own = _xlog2(runs).cumsum(axis=3)[..., -1].sum(axis=2)
    bits: NDArray[np.float64] = _xlog2(total).sum(axis=2) - own
    return bits


def _xlog2(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return x log2 x of counts, 0 for 0."""
    product: NDArray[np.float64] = x * np.log2(np.maximum(x, 1))
    return product
