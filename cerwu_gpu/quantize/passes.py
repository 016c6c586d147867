r"""One pass over a matrix: blocks of columns, the rest of the matrix updated lazily.

Inside a block the columns are rounded one after the other; what the block leaves behind is
X[:, rest] -= E V[block, rest], one matrix product (design.md 2.2, step 4).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cerwu_gpu import backend
from cerwu_gpu.reference.obs import Alphabet

LOOKAHEAD = 32
"""Columns beyond the ones decided that a trellis path is judged by; more brings nothing."""


@dataclass(frozen=True)
class Weights:
    """How bits and squares count (all float32; see reference/obs.py).

    Attributes:
        lmbda: [m], what a bit costs in each row.
        importance: [n], omega_j.
        curvature: [n], beta_j.
    """

    lmbda: Tensor
    importance: Tensor
    curvature: Tensor

    def of_rows(self, rows: slice | Tensor) -> "Weights":
        """The same for some of the rows."""
        return Weights(self.lmbda[rows], self.importance, self.curvature)


def scalar_pass(
    x: Tensor,
    factor: Tensor,
    alphabet: Alphabet,
    row_class: Tensor,
    column_class: Tensor,
    weights: Weights,
    *,
    block_size: int,
    exhaustive: bool,
) -> Tensor:
    """Symbols [m, n] int32 of x [m, n] float32 (index space) under V = factor [n, n] float32."""
    rows, columns = x.shape
    rest = x.clone()
    symbols = torch.empty((rows, columns), dtype=torch.int32, device=x.device)
    for first in range(0, columns, block_size):
        last = min(first + block_size, columns)
        block = slice(first, last)
        symbols[:, block], error = backend.quantize_block(
            rest[:, block],
            factor[block, block],
            alphabet,
            row_class,
            column_class[block],
            weights.lmbda,
            weights.importance[block],
            weights.curvature[block],
            exhaustive=exhaustive,
        )
        if last < columns:
            rest[:, last:].addmm_(error, factor[block, last:], alpha=-1)
    return symbols


def trellis_pass(
    x: Tensor,
    factor: Tensor,
    alphabet: Alphabet,
    row_class: Tensor,
    column_class: Tensor,
    weights: Weights,
    *,
    block_size: int,
    states: int,
) -> Tensor:
    """Symbols [m, n] int32 of x [m, n] float32 under a trellis; blocks overlap by LOOKAHEAD."""
    rows, columns = x.shape
    rest = x.clone()
    symbols = torch.empty((rows, columns), dtype=torch.int32, device=x.device)
    state = torch.zeros(rows, dtype=torch.int64, device=x.device)
    first = 0
    while first < columns:
        seen = slice(first, min(first + block_size + LOOKAHEAD, columns))
        last = columns if seen.stop == columns else first + block_size
        symbols[:, first:last], error, state = backend.quantize_block_trellis(
            rest[:, seen],
            factor[seen, seen],
            alphabet,
            row_class,
            column_class[seen],
            weights.lmbda,
            weights.importance[seen],
            weights.curvature[seen],
            states=states,
            start=state,
            commit=last - first,
        )
        if last < columns:
            rest[:, last:].addmm_(error, factor[first:last, last:], alpha=-1)
        first = last
    return symbols
