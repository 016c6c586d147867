"""Decoding all the way to weights: symbols, their escapes, and the reconstruction rule."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cerwu_gpu.coded import CodedMatrix, Reconstruction
from cerwu_gpu.errors import CorruptionError
from cerwu_gpu.reference.ans import SECOND, decode_marked
from cerwu_gpu.reference.dequantize import dequantize


def decode_weights(
    batch: Sequence[CodedMatrix],
    rules: Sequence[Reconstruction],
    dtype: torch.dtype,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Decode all matrices together.

    Args:
        batch, rules: matrices of any shapes on one device that `coded.check` accepted, and what
            their symbols stand for.
        dtype: the dtype that the weights are rounded to, once.
        out: tensors [m, n] of that dtype to write to, with any strides; default: new ones.

    Returns:
        One tensor [m, n] per matrix.

    Raises:
        CorruptionError: as `decode`; or a matrix (named) has not as many escapes as values for
            them.
    """
    decoded = [
        weight_of_symbols(coded, rule, indices, dtype)
        for coded, rule, indices in zip(batch, rules, decode_marked(batch), strict=True)
    ]
    return decoded if out is None else [to.copy_(x) for to, x in zip(out, decoded, strict=True)]


def weight_of_symbols(
    coded: CodedMatrix, rule: Reconstruction, indices: Tensor, dtype: torch.dtype
) -> Tensor:
    """Reconstruct the weights [m, n] of `indices` [m, n] int32 as `decode_marked` gives them.

    Raises:
        CorruptionError: there are not as many escapes as values for them, or of another parity.
    """
    second = None
    if coded.states:
        second = indices >= SECOND
        indices = indices & (SECOND - 1)
    symbols = indices + rule.lowest
    if rule.size < coded.tables.shape[1]:
        escaped = indices >= rule.size
        if int(escaped.sum()) != len(rule.escapes):
            raise CorruptionError(f"{coded.name}: escapes are missing; get it again.")
        parity = coded.parity[indices[escaped].long()].to(torch.int32)
        if coded.states and not torch.equal(parity, rule.escapes & 1):
            raise CorruptionError(f"{coded.name}: an escape has the wrong parity; get it again.")
        symbols[escaped] = rule.escapes
    return dequantize(
        symbols,
        rule.column_step,
        rule.row_scale,
        grid=rule.grid,
        second=second,
        dtype=dtype,
    )
