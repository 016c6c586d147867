r"""One pass over a matrix: blocks of columns, the rest of the matrix updated lazily.

Inside a block the columns are rounded one after the other; what the block leaves behind is
X[:, rest] -= E V[block, rest], one matrix product (design.md 2.2, step 4).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cerwu_gpu import backend
from cerwu_gpu.block_problem import BlockProblem
from cerwu_gpu.threads import run

LOOKAHEAD = 32
"""Columns beyond the decided ones that a trellis path is judged by; more brings nothing."""
CHUNK_ROWS = {"numba": 256, "torch": 2048, "triton": 8192}
"""Rows at a time, by form: few where workers share them, many where each call costs time,
as many as the survivors of a trellis leave memory for on a GPU. Fixed, so that results do not
depend on the number of workers."""


def scalar_pass(problem: BlockProblem, *, block_size: int, exhaustive: bool) -> Tensor:
    """Return the symbols [m, n] int32 of a pass over all columns."""
    return _by_rows(partial(_scalar_rows, block_size=block_size, exhaustive=exhaustive), problem)


def trellis_pass(problem: BlockProblem, *, block_size: int, states: int) -> Tensor:
    """Return the symbols [m, n] int32 of a pass under a trellis; blocks overlap by LOOKAHEAD."""
    return _by_rows(partial(_trellis_rows, block_size=block_size, states=states), problem)


def _by_rows(solve: Callable[[BlockProblem, Tensor], None], problem: BlockProblem) -> Tensor:
    """Return the symbols [m, n] that `solve` writes chunk by chunk."""
    device = problem.x.device
    symbols = torch.empty(problem.x.shape, dtype=torch.int32, device=device)
    step = CHUNK_ROWS[backend.form(device)]
    chunks = [slice(first, first + step) for first in range(0, len(problem.x), step)]
    run((partial(solve, problem.of_rows(rows), symbols[rows]) for rows in chunks), device)
    return symbols


def _scalar_rows(
    problem: BlockProblem, symbols: Tensor, *, block_size: int, exhaustive: bool
) -> None:
    """Write the symbols of some rows."""
    columns = problem.x.shape[1]
    rest = _working_copy(problem.x)
    for first in range(0, columns, block_size):
        last = min(first + block_size, columns)
        block = slice(first, last)
        symbols[:, block], error = backend.quantize_block(
            problem.block(block, rest[:, block]), exhaustive=exhaustive
        )
        if last < columns:
            rest[:, last:].addmm_(error, problem.factor[block, last:], alpha=-1)


def _trellis_rows(problem: BlockProblem, symbols: Tensor, *, block_size: int, states: int) -> None:
    """Write the symbols of some rows under a trellis."""
    rows, columns = problem.x.shape
    rest = _working_copy(problem.x)
    state = torch.zeros(rows, dtype=torch.int64, device=rest.device)
    first = 0
    while first < columns:
        seen = slice(first, min(first + block_size + LOOKAHEAD, columns))
        last = columns if seen.stop == columns else first + block_size
        symbols[:, first:last], error, state = backend.quantize_block_trellis(
            problem.block(seen, rest[:, seen]), states=states, start=state, commit=last - first
        )
        if last < columns:
            rest[:, last:].addmm_(error, problem.factor[first:last, last:], alpha=-1)
        first = last


def _working_copy(x: Tensor) -> Tensor:
    """Return a copy of x [m, n]: on the CPU column by column, as its form of a block reads them."""
    if x.device.type == "cpu":
        return x.t().clone(memory_format=torch.contiguous_format).t()
    return x.clone(memory_format=torch.contiguous_format)
