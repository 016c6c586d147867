"""Decoding all the way to weights: symbols, their escapes, and the reconstruction rule."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cerwu_gpu.errors import CorruptionError
from cerwu_gpu.reference.ans import SECOND, decode_marked
from cerwu_gpu.reference.coded import CodedMatrix
from cerwu_gpu.reference.dequantize import dequantize


@dataclass(frozen=True)
class Reconstruction:
    """What the symbols of a matrix [m, n] stand for.

    Attributes:
        lowest, size: symbol s < size is the integer lowest + s (or the position s in the grid);
            every other symbol is an escape.
        escapes: [E] int32, the integers that were escaped, row by row.
        column_step, row_scale: int16 step codes, [n] or [1] and [m] or [1].
        grid: [size] float32, or None.
    """

    lowest: int
    size: int
    escapes: Tensor
    column_step: Tensor
    row_scale: Tensor
    grid: Tensor | None = None


def decode_weights(
    batch: Sequence[CodedMatrix], rules: Sequence[Reconstruction], dtype: torch.dtype
) -> list[Tensor]:
    """Decode all matrices together.

    Args:
        batch, rules: matrices of any shapes on one device, and what their symbols stand for.
        dtype: what the weights are rounded to, once.

    Returns:
        One tensor [m, n] per matrix.

    Raises:
        CorruptionError: as `decode`; or a matrix (named) has not as many escapes as values for
            them.
    """
    return [
        weight_of_symbols(coded, rule, indices, dtype)
        for coded, rule, indices in zip(batch, rules, decode_marked(batch), strict=True)
    ]


def weight_of_symbols(
    coded: CodedMatrix, rule: Reconstruction, indices: Tensor, dtype: torch.dtype
) -> Tensor:
    """The weights [m, n] of `indices` [m, n] int32 into the alphabet as `decode_marked` gives them;
    rows of a matrix may come alone, with their own escapes and row scales.

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
        states=coded.states,
        second=second,
        dtype=dtype,
    )
