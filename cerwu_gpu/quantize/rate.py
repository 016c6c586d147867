"""Rate models: one frozen table of bits for each class of rows and columns.

The same integer tables serve the search and the coder. classes.py says which symbol has which.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cerwu_gpu.coding.tables import bits, codes_from_counts, table_from_codes
from cerwu_gpu.quantize.sharing import shared_histograms

ESCAPE_PAYLOAD_BITS = 16.0
"""Assumed bits of an escaped integer's payload in the search."""
ALPHABET_LIMIT = 127
"""Largest magnitude with a code of its own where the alphabet is unbounded."""


def alphabet_limit(magnitudes: Tensor, tables: int) -> int:
    """Return the magnitude up to which a symbol of its own is cheaper than escapes.

    A symbol costs a few bits in each table, an escape its payload and its own rare symbol.

    Args:
        magnitudes: [ALPHABET_LIMIT + 2] int64, how many integers have the magnitudes 0, 1, ...,
            and how many a larger one than ALPHABET_LIMIT.
        tables: number of tables.
    """
    beyond = magnitudes.flip(0).cumsum(0).flip(0)[1:].to(torch.float64)
    limit = torch.arange(ALPHABET_LIMIT + 1, device=magnitudes.device)
    cost = beyond * (ESCAPE_PAYLOAD_BITS + 8) + limit * (2.0 * tables)
    return max(1, int(cost.argmin()))


def codes(counts: Sequence[Tensor], paired: Sequence[int]) -> list[Tensor]:
    """Return table codes [T, Q, K] uint8 of the counts [T, Q, K] of each matrix.

    Of each alphabet the first `paired` symbols share in pairs: integers q and -q get the same code,
    so that only half of a symmetric alphabet is stored. Neighbouring classes share tables
    (sharing.py), the Q quantizers alike.
    """
    symmetric = []
    for each, pairs in zip(counts, paired, strict=True):
        if pairs:
            both = each[..., :pairs] + each[..., :pairs].flip(-1)
            each = torch.cat([both, 2 * each[..., pairs:]], dim=-1)
        symmetric.append(each)
    stored = [x.shape[2] - pairs // 2 for x, pairs in zip(symmetric, paired, strict=True)]
    result = []
    for shared in shared_histograms(symmetric, stored):
        table_codes = codes_from_counts(shared.flatten(0, 1).cpu().numpy())
        result.append(torch.from_numpy(table_codes).view(shared.shape).to(shared.device))
    return result


def rates(table_codes: Tensor) -> Tensor:
    """Return the bits float32 of every symbol under table codes [T, Q, K], exactly as the coder
    will charge them."""
    tables = table_from_codes(table_codes.flatten(0, 1).cpu().numpy())
    return torch.from_numpy(bits(tables)).to(table_codes.device).view(table_codes.shape)
