"""Rate models: one frozen table of bits for each class of rows and columns.

The same integer tables serve the search and the coder. classes.py says which symbol has which.
"""

import torch
from torch import Tensor

from cerwu_gpu import backend
from cerwu_gpu.coding.tables import bits, codes_from_counts, table_from_codes
from cerwu_gpu.quantize.sharing import shared_histograms

ESCAPE_PAYLOAD_BITS = 16.0
"""Assumed bits of an escaped integer's payload in the search."""
ALPHABET_LIMIT = 127
"""Largest magnitude with a code of its own where the alphabet is unbounded."""


def alphabet_limit(symbols: Tensor, tables: int) -> int:
    """Return the magnitude up to which a symbol of its own is cheaper than escapes.

    A symbol costs a few bits in each table, an escape its payload and its own rare symbol.
    """
    counts = backend.magnitude_counts(symbols, ALPHABET_LIMIT + 1)
    beyond = counts.flip(0).cumsum(0).flip(0)[1:].to(torch.float64)
    limit = torch.arange(ALPHABET_LIMIT + 1, device=symbols.device)
    cost = beyond * (ESCAPE_PAYLOAD_BITS + 8) + limit * (2.0 * tables)
    return max(1, int(cost.argmin()))


def codes(counts: Tensor, paired: int, quantizers: int = 1) -> Tensor:
    """Return table codes [T, K] uint8 of counts [T, K]; the first `paired` symbols share in pairs.

    Integers q and -q get the same code, so that only half of a symmetric alphabet is stored, and
    neighbouring classes share tables (sharing.py); each has as many as there are `quantizers`.
    """
    if paired:
        both = counts[:, :paired] + counts[:, :paired].flip(1)
        counts = torch.cat([both, 2 * counts[:, paired:]], dim=1)
    counts = shared_histograms(counts, quantizers, counts.shape[1] - paired // 2)
    return torch.from_numpy(codes_from_counts(counts.cpu().numpy())).to(counts.device)


def rates(table_codes: Tensor) -> Tensor:
    """Return the bits [T, K] float32 of every symbol, exactly as the coder will charge them."""
    tables = table_from_codes(table_codes.cpu().numpy())
    return torch.from_numpy(bits(tables)).to(table_codes.device)
