r"""The search problem that every form of the quantizers takes: columns in index space.

All quantities are in index space: x = W' / (step_j t_i), and the factor is normalised,

    V_jk = (step_j / step_k) C'_jk / C'_jj      (upper triangular, unit diagonal),

so that the row scale t_i drops out. For columns j = 1 ... n in order, all rows i at once:

    q_ij = argmin_g  omega_j (1/2 (x_ij - g)^2 - 1/2 beta_j g^2) + lmbda_i r_ij(g)
    x_ik <- x_ik - (x_ij - q_ij) V_jk           for every k > j

with omega_j = (step_j / C'_jj)^2, beta_j = lmbda gamma_j C'_jj^2, lmbda_i = lmbda / t_i^2, and r_ij
the rate table number row_class_i + column_class_j (docs/method.md).

Problems of equal shape, such as the experts of a mixture, can be searched as one batch: their rows
stand one below the other, and what belongs to columns has an axis more in front.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cerwu_gpu.spec import TRELLIS_NEXT


@dataclass(frozen=True)
class Alphabet:
    """Integers that a column may take, and their bits.

    Attributes:
        rates: [T, K] float32, bits of the integers lowest ... lowest + K - 1 under each table;
            with `escapes`, one more column holds the bits of an escape, payload included.
        lowest: the integer of the first column of `rates`.
        escapes: integers outside of the range are allowed and cost an escape.
        levels: [K] float32, ascending values when the grid is a list; the "integers" are then
            positions in the list and `lowest` is 0. None: the value is the integer itself.
    """

    rates: Tensor
    lowest: int
    escapes: bool = False
    levels: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of integers K, without the escape."""
        return self.rates.shape[1] - int(self.escapes)


@dataclass(frozen=True)
class BlockProblem:
    """Columns of a matrix to round: one block of them, or all that a pass goes through.

    In a batch of B problems, m is the number of rows of all of them, m / B of each.

    Attributes:
        x: [m, n] float32, weights in index space.
        factor: [n, n] or [B, n, n] float32, V; entries below its diagonal are never read.
        alphabet: the grid and its rate tables, of all problems.
        row_class: [m] int64.
        column_class: [n] or [B, n] int64; the sum of both is the number of the table.
        lmbda: [m] float32, the price of a bit in each row.
        importance: [n] or [B, n] float32, omega.
        curvature: [n] or [B, n] float32, beta.
    """

    x: Tensor
    factor: Tensor
    alphabet: Alphabet
    row_class: Tensor
    column_class: Tensor
    lmbda: Tensor
    importance: Tensor
    curvature: Tensor

    @property
    def batch(self) -> int:
        """Number of problems B."""
        return len(self.factor) if self.factor.ndim == 3 else 1

    def of_rows(self, rows: slice | Tensor) -> "BlockProblem":
        """Return the problem of some of the rows, all of them of one problem."""
        return replace(self, x=self.x[rows], row_class=self.row_class[rows], lmbda=self.lmbda[rows])

    def some(self, numbers: slice) -> "BlockProblem":
        """Return the batch of some neighbouring problems."""
        if self.factor.ndim == 2:
            return self
        height = len(self.x) // self.batch
        first, last, _ = numbers.indices(self.batch)
        return replace(
            self.of_rows(slice(first * height, last * height)),
            factor=self.factor[numbers],
            column_class=self.column_class[numbers],
            importance=self.importance[numbers],
            curvature=self.curvature[numbers],
        )

    def one(self, number: int) -> "BlockProblem":
        """Return one of the problems, no longer a batch."""
        if self.factor.ndim == 2:
            return self
        alone = self.some(slice(number, number + 1))
        return replace(
            alone,
            factor=alone.factor[0],
            column_class=alone.column_class[0],
            importance=alone.importance[0],
            curvature=alone.curvature[0],
        )

    def block(self, columns: slice, x: Tensor) -> "BlockProblem":
        """Return the problem of some neighbouring columns, whose weights are now `x`."""
        return replace(
            self,
            x=x,
            factor=self.factor[..., columns, columns],
            column_class=self.column_class[..., columns],
            importance=self.importance[..., columns],
            curvature=self.curvature[..., columns],
        )

    def check(self) -> None:
        """Raise ValueError unless the fields fit each other."""
        if self.x.ndim != 2:
            raise ValueError(f"x has {self.x.ndim} dimensions: give a matrix [rows, columns].")
        rows, columns = self.x.shape
        alphabet, device = self.alphabet, self.x.device
        several = self.factor.shape[:-2]
        if several and (several[0] == 0 or rows % several[0]):
            raise ValueError(f"{rows} rows are not those of {several[0]} problems of equal shape.")
        real, integer = torch.float32, torch.int64
        tables, width = alphabet.rates.shape[0], alphabet.size + int(alphabet.escapes)
        expected = {
            "x": (self.x, real, (rows, columns)),
            "factor": (self.factor, real, (*several, columns, columns)),
            "rates": (alphabet.rates, real, (tables, width)),
            "row_class": (self.row_class, integer, (rows,)),
            "column_class": (self.column_class, integer, (*several, columns)),
            "lmbda": (self.lmbda, real, (rows,)),
            "importance": (self.importance, real, (*several, columns)),
            "curvature": (self.curvature, real, (*several, columns)),
        }
        if alphabet.levels is not None:
            expected["levels"] = (alphabet.levels, real, (alphabet.size,))
        for name, (tensor, dtype, shape) in expected.items():
            if tensor.dtype != dtype or tuple(tensor.shape) != shape or tensor.device != device:
                raise ValueError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}: "
                    f"give {dtype} {list(shape)} on {device}."
                )

    def check_trellis(self, states: int, start: Tensor, commit: int) -> None:
        """Raise ValueError unless this is a problem of a trellis, and the arguments fit it."""
        self.check()
        rows, columns = self.x.shape
        if states not in TRELLIS_NEXT:
            known = ", ".join(map(str, TRELLIS_NEXT))
            raise ValueError(f"a trellis of {states} states is not known: give one of {known}.")
        if not 1 <= commit <= columns:
            raise ValueError(f"commit is {commit}: give 1 ... {columns}, the columns of the block.")
        if not self.alphabet.escapes or self.alphabet.levels is not None:
            raise ValueError("a trellis takes integers with an escape: give rates for one.")
        if start.shape != (rows,) or start.dtype != torch.int64 or start.device != self.x.device:
            raise ValueError(
                f"start is no int64 [{rows}] on {self.x.device}: give every row its state."
            )
