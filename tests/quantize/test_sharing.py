"""Runs of classes that share a table: the cheapest cut of all."""

from itertools import combinations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cerwu_gpu.quantize.sharing import CODE_BITS, shared_histograms


def entropy_bits(counts: np.ndarray) -> float:
    """Bits of the symbols counted in one histogram."""
    seen = counts[counts > 0].astype(np.float64)
    return float(-(seen * np.log2(seen / seen.sum())).sum()) if seen.size else 0.0


def cheapest(counts: np.ndarray, quantizers: int, codes: int) -> float:
    """Over every cut of the classes into runs, by trying them all."""
    classes = len(counts) // quantizers
    tables = counts.reshape(classes, quantizers, -1)
    costs = []
    for size in range(classes):
        for cut in combinations(range(1, classes), size):
            runs = np.split(tables, list(cut))
            bits = sum(entropy_bits(q) for run in runs for q in run.sum(axis=0))
            costs.append(bits + CODE_BITS * codes * quantizers * len(runs))
    return min(costs)


@settings(max_examples=60, deadline=None)
@given(
    classes=st.integers(1, 7),
    quantizers=st.integers(1, 2),
    size=st.integers(1, 5),
    scale=st.sampled_from([1, 10, 1000]),
    seed=st.integers(0, 2**16),
)
def test_the_cut_is_the_cheapest(classes, quantizers, size, scale, seed):
    counts = np.random.default_rng(seed).integers(0, scale + 1, (classes * quantizers, size))
    own = counts.reshape(classes, quantizers, size)
    (shared,) = shared_histograms([torch.from_numpy(own)], [size])
    # What it chose: equal neighbours are one run only where the sums say so.
    assert shared.shape == own.shape
    tables = shared.numpy()
    starts = [0]
    for k in range(1, classes):
        if not np.array_equal(own[starts[-1] : k].sum(axis=0), tables[k - 1]):
            continue
        if k < classes and not np.array_equal(tables[k], tables[k - 1]):
            starts.append(k)
    runs = np.split(own, starts[1:])
    bits = sum(entropy_bits(q) for run in runs for q in run.sum(axis=0))
    cost = bits + CODE_BITS * size * quantizers * len(runs)
    assert cost <= cheapest(counts, quantizers, size) + 1e-6 * abs(cost)


def test_like_classes_share_and_unlike_ones_do_not():
    few = torch.tensor([[30, 4, 0], [28, 5, 1], [1000, 3000, 2000], [2000, 900, 4000]])
    shared = shared_histograms([few[:, None]], [3])[0][:, 0]
    assert torch.equal(shared[0], shared[1]) and torch.equal(shared[0], few[0] + few[1])
    assert torch.equal(shared[2:], few[2:])


def test_counts_beyond_float32_stay_exact():
    large = torch.tensor([[2**40 + 1, 3], [5, 2**40 + 7]])
    assert torch.equal(shared_histograms([large[:, None]], [2])[0][:, 0], large)


def test_matrices_side_by_side_are_cut_as_each_would_be_alone():
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 2, 5), (1, 2, 9), (4, 2, 31)]
    counts = [torch.randint(0, 40, shape, generator=generator) for shape in shapes]
    together = shared_histograms(counts, [3, 9, 16])
    for own, codes, shared in zip(counts, [3, 9, 16], together, strict=True):
        assert torch.equal(shared, shared_histograms([own], [codes])[0])
