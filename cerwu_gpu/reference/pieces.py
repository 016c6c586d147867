"""Decoding one large matrix in little more memory than its weights take."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from cerwu_gpu.reference.ans import SECOND, decode_marked
from cerwu_gpu.reference.coded import CodedMatrix
from cerwu_gpu.reference.weights import Reconstruction, weight_of_symbols

PIECE = 1 << 21
"""Weights that are in work at the same time."""


def decode_in_pieces(
    coded: CodedMatrix, rule: Reconstruction, dtype: torch.dtype, piece: int = PIECE
) -> Tensor:
    """The weight [m, n] that `decode_weights` gives, contiguous, some streams at a time.

    Symbols are kept where the weights will be, as far as those take four bytes each.

    Args:
        coded, rule: the matrix, and what its symbols stand for.
        dtype: what the weights are rounded to, once.
        piece: about how many weights are decoded, and how many are reconstructed, at a time.

    Raises:
        CorruptionError: as `decode_weights`.
    """
    m, n = coded.shape
    weight = torch.empty(m, n, dtype=dtype, device=coded.words.device)
    if dtype == torch.float32:
        indices = weight.view(torch.int32)
    else:
        indices = torch.empty(m, n, dtype=torch.int32, device=coded.words.device)
    for rows, part in _parts(coded, piece):
        indices[rows] = decode_marked([part])[0]
    used = 0
    step = max(1, piece // n)
    for first in range(0, m, step):
        end = min(first + step, m)
        some = indices[first:end]
        # The last rows get all escapes that are left, so that too many are seen.
        last = (
            used + int(((some & (SECOND - 1)) >= rule.size).sum()) if end < m else len(rule.escapes)
        )
        scale = rule.row_scale if len(rule.row_scale) == 1 else rule.row_scale[first:end]
        own = replace(rule, escapes=rule.escapes[used:last], row_scale=scale)
        weight[first:end] = weight_of_symbols(coded, own, some, dtype)
        used = last
    return weight


def _parts(coded: CodedMatrix, piece: int) -> Iterator[tuple[Tensor, CodedMatrix]]:
    """Neighbouring streams as matrices of their own, each with the rows [.] that it holds."""
    m, n = coded.shape
    streams = len(coded.lengths)
    ends = [0, *coded.lengths.cumsum(0).tolist()]
    step = max(1, piece * streams // (m * n))
    if streams == 0:
        yield torch.arange(m), coded  # for the decoder to refuse
    row = torch.arange(m, device=coded.words.device)
    for first in range(0, streams, step):
        last = min(first + step, streams)
        rows = row[(row % streams >= first) & (row % streams < last)]
        # The last part gets all that is left, so that the decoder sees words too many.
        words = coded.words[ends[first] : ends[last] if last < streams else None]
        yield (
            rows,
            replace(
                coded,
                shape=(len(rows), n),
                words=words,
                lengths=coded.lengths[first:last],
                row_class=coded.row_class[rows],
            ),
        )
