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
CHUNK_ROWS = {"numba": 256, "torch": 2048, "triton": 1 << 17}
"""Rows at a time, of one problem or of several, by form: few where workers share them, many where
each call costs time, all experts of a mixture on a GPU, whose kernel limits its own memory. Fixed,
so that results do not depend on the number of workers."""


def scalar_pass(problem: BlockProblem, *, block_size: int, exhaustive: bool) -> Tensor:
    """Return the symbols [m, n] int32 of a pass over all columns."""
    return _by_rows(partial(_scalar_rows, block_size=block_size, exhaustive=exhaustive), problem)


def trellis_pass(problem: BlockProblem, *, block_size: int, states: int) -> Tensor:
    """Return the symbols [m, n] int32 of a pass under a trellis; blocks overlap by LOOKAHEAD."""
    return _by_rows(partial(_trellis_rows, block_size=block_size, states=states), problem)


def _by_rows(solve: Callable[[BlockProblem, Tensor], None], problem: BlockProblem) -> Tensor:
    """Return the symbols [m, n] that `solve` writes chunk by chunk: some of the rows of a problem,
    or several small problems of a batch."""
    device = problem.x.device
    symbols = torch.empty(problem.x.shape, dtype=torch.int32, device=device)
    step, batch = CHUNK_ROWS[backend.form(device)], problem.batch
    height = len(problem.x) // batch
    tasks = []
    if height <= step:
        several = step // max(1, height)
        for first in range(0, batch, several):
            rows = slice(first * height, min(first + several, batch) * height)
            tasks.append(partial(solve, problem.some(slice(first, first + several)), symbols[rows]))
    else:
        for number in range(batch):
            alone, own = problem.one(number), symbols[number * height : (number + 1) * height]
            for first in range(0, height, step):
                rows = slice(first, first + step)
                tasks.append(partial(solve, alone.of_rows(rows), own[rows]))
    run(tasks, device)
    return symbols


def _scalar_rows(
    problem: BlockProblem, symbols: Tensor, *, block_size: int, exhaustive: bool
) -> None:
    """Write the symbols of some rows."""
    columns = problem.x.shape[1]
    rest = _working_copy(problem)
    for first in range(0, columns, block_size):
        last = min(first + block_size, columns)
        block = slice(first, last)
        symbols[:, block], error = backend.quantize_block(
            problem.block(block, _rows_of(rest, block)), exhaustive=exhaustive
        )
        _update(rest, error, problem.factor, block)


def _trellis_rows(problem: BlockProblem, symbols: Tensor, *, block_size: int, states: int) -> None:
    """Write the symbols of some rows under a trellis."""
    rows, columns = problem.x.shape
    rest = _working_copy(problem)
    state = torch.zeros(rows, dtype=torch.int64, device=rest.device)
    first = 0
    while first < columns:
        seen = slice(first, min(first + block_size + LOOKAHEAD, columns))
        last = columns if seen.stop == columns else first + block_size
        symbols[:, first:last], error, state = backend.quantize_block_trellis(
            problem.block(seen, _rows_of(rest, seen)),
            states=states,
            start=state,
            commit=last - first,
        )
        _update(rest, error, problem.factor, slice(first, last))
        first = last


def _working_copy(problem: BlockProblem) -> Tensor:
    """Return a copy [B, m / B, n] of x: on the CPU column by column, as its form of a block reads
    them."""
    x = problem.x.view(problem.batch, -1, problem.x.shape[1])
    if x.device.type == "cpu":
        return x.mT.clone(memory_format=torch.contiguous_format).mT
    return x.clone(memory_format=torch.contiguous_format)


def _rows_of(rest: Tensor, columns: slice) -> Tensor:
    """Return some columns of rest [B, m / B, n] as [m, .], the rows of all problems."""
    return rest[0, :, columns] if len(rest) == 1 else rest[..., columns].flatten(0, 1)


def _update(rest: Tensor, error: Tensor, factor: Tensor, block: slice) -> None:
    """Take the effect of a block's errors [m, .] from the columns after it, in place."""
    after = slice(block.stop, rest.shape[2])
    if after.start >= after.stop:
        return
    errors, effects = error.view(len(rest), -1, error.shape[1]), factor[..., block, after]
    if rest.device.type != "cpu" and len(rest) > 1:
        rest[..., after].baddbmm_(errors, effects, alpha=-1)
        return
    if len(rest) > 1:
        errors = errors.mT.contiguous().mT  # as the form of a block gives those of one problem
    for own, made, effect in zip(rest, errors, effects.expand(len(rest), -1, -1), strict=True):
        own[:, after].addmm_(made, effect, alpha=-1)
