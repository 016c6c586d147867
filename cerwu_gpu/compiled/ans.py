"""Decoding of many matrices' streams on the CPU; `reference.ans` defines every step.

LANES neighbouring streams advance together, so that one's arithmetic fills the other's waiting
times. A symbol is looked up by the leading bits of v; where several share them, a bisection finds
it. Weights are rounded and written straight to where they belong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cerwu_gpu.coded import CodedMatrix, Reconstruction
from cerwu_gpu.compiled.ans_streams import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    LANES,
    SYMBOL,
    decode_streams,
    lay_out,
)
from cerwu_gpu.errors import CorruptionError
from cerwu_gpu.spec import PRECISION, TRELLIS_REGISTER
from cerwu_gpu.steps import step_values
from cerwu_gpu.threads import run

LOOKUP_BITS = 10
"""Leading bits of v by which a symbol is looked up: 4 KB for each table."""
LOOKUP_ENTRIES = 1 << 20
"""Maximum entries of the lookups of a matrix: with many tables, fewer bits are looked up."""
TASK_SYMBOLS = 1 << 18
"""Symbols of one task of a worker, about."""

_FORMS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


def decode(batch: Sequence[CodedMatrix]) -> list[Tensor]:
    """Decode all matrices to their symbols.

    Args:
        batch: matrices of any shapes, on the CPU, that `coded.check` accepted.

    Returns:
        One int32 [m, n] tensor of symbols per matrix.

    Raises:
        CorruptionError: a matrix (named) has a stream that does not end in state 0 with all its
            words used.
    """
    out = [torch.empty(matrix.shape, dtype=torch.int32) for matrix in batch]
    _decode([_Matrix.of(x, None, to) for x, to in zip(batch, out, strict=True)])
    return out


def decode_weights(
    batch: Sequence[CodedMatrix],
    rules: Sequence[Reconstruction],
    dtype: torch.dtype,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Decode all matrices to weights; their symbols are never in memory.

    Args:
        batch: as for `decode`.
        rules: each matrix's rule from symbols to weights.
        dtype: the dtype that the weights are rounded to, once: float32, bfloat16 or float16.
        out: tensors [m, n] of that dtype to write to, with any strides; default: new ones.

    Returns:
        One [m, n] tensor per matrix: those of `out`, or new contiguous ones.

    Raises:
        CorruptionError: as for `decode`, or a matrix has not as many escapes as values for them, or
            of another parity under a trellis.
    """
    if out is None:
        out = [torch.empty(matrix.shape, dtype=dtype) for matrix in batch]
    matrices = [_Matrix.of(*stored) for stored in zip(batch, rules, out, strict=True)]
    for matrix, places in zip(matrices, _decode(matrices), strict=True):
        matrix.fill_escapes(places)
    return list(out)


def _decode(matrices: Sequence["_Matrix"]) -> list[NDArray[np.int64]]:
    """Decode the streams; return the places of each matrix's escapes, in the order of its rows."""
    tasks = [(i, task) for i, matrix in enumerate(matrices) for task in matrix.tasks()]
    results = run([task for _, task in tasks])
    places: list[list[NDArray[np.int64]]] = [[] for _ in matrices]
    counts = [0] * len(matrices)
    for (i, _), (ended, count, task_places) in zip(tasks, results, strict=True):
        if not ended:
            raise CorruptionError(
                f"{matrices[i].name}: a stream does not end where it must: get the file again."
            )
        counts[i] += count
        places[i].append(task_places)
    for matrix, count in zip(matrices, counts, strict=True):
        matrix.check_escapes(count)
    return [np.sort(np.concatenate(parts)) for parts in places]


@dataclass(frozen=True)
class _Matrix:
    """A matrix as the compiled loop reads it, and the memory that it writes to.

    Attributes:
        name, rule, trellis: of the matrix; no rule: symbols are written.
        streams: arguments of `decode_streams` about the words.
        tables: arguments about the tables and classes.
        output: arguments about the weights.
        target, copy: where the matrix goes, by way of `copy` if its strides are unusual.
    """

    name: str
    shape: tuple[int, int]
    trellis: bool
    rule: Reconstruction | None
    streams: tuple[Any, ...]
    tables: tuple[Any, ...]
    output: tuple[Any, ...]
    target: Tensor
    copy: Tensor

    @staticmethod
    def of(coded: CodedMatrix, rule: Reconstruction | None, target: Tensor) -> "_Matrix":
        """Lay out a matrix that is to be written to `target`."""
        words = coded.words
        words = words if words.element_size() == 4 else words.to(torch.int64).to(torch.int32)
        flat = words.contiguous().view(torch.int32).numpy().view(np.uint32)
        ends = np.zeros(len(coded.lengths) + 1, np.int64)
        np.cumsum(coded.lengths.numpy(), out=ends[1:])
        plain = target.is_contiguous() or target.t().is_contiguous()
        copy = target if plain else torch.empty(coded.shape, dtype=target.dtype)
        return _Matrix(
            name=coded.name,
            shape=coded.shape,
            trellis=coded.states > 0,
            rule=rule,
            streams=(flat if len(flat) else np.zeros(1, np.uint32), ends),
            tables=_tables(coded),
            output=_output(coded, rule, copy),
            target=target,
            copy=copy,
        )

    def tasks(self) -> list[Any]:
        """Return functions that decode some streams each: (all ended well, escapes, places)."""
        m, n = self.shape
        streams = len(self.streams[1]) - 1
        size = max(1, TASK_SYMBOLS * streams // (m * n))
        size = -(-size // LANES) * LANES
        return [
            partial(self._decode_streams, first, min(first + size, streams))
            for first in range(0, streams, size)
        ]

    def _decode_streams(self, first: int, last: int) -> tuple[bool, int, NDArray[np.int64]]:
        (m, n), streams = self.shape, len(self.streams[1]) - 1
        symbols = (last - first) * -(-m // streams) * n
        room = 0 if self.rule is None else min(len(self.rule.escapes), symbols)
        places = np.empty(room, np.int64)
        ended, count = decode_streams(
            *self.streams, first, last, *self.tables, self.trellis, *self.output, places
        )
        return ended, count, places[: min(count, room)].copy()

    def check_escapes(self, count: int) -> None:
        """Raise CorruptionError unless there are as many escapes as values for them."""
        if self.rule is not None and count != len(self.rule.escapes):
            raise CorruptionError(f"{self.name}: escapes are missing; get it again.")

    def fill_escapes(self, places: NDArray[np.int64]) -> None:
        """Write the weights of the escapes, and the matrix to its target."""
        assert self.rule is not None
        if len(places):
            element, parity, second = places >> 2, places >> 1 & 1, places & 1
            values = self.rule.escapes.numpy()
            if self.trellis and bool((parity != (values & 1)).any()):
                raise CorruptionError(f"{self.name}: an escape has the wrong parity; get it again.")
            second = second.astype(np.int32)
            level = values * 2 - second * np.sign(values) if self.trellis else values
            row, column = np.divmod(element, self.shape[1])
            _, steps, scales = self.output[:3]
            with np.errstate(over="ignore"):  # such a weight is infinite, as everywhere
                weight = level.astype(np.float32) * steps[column] * scales[row]
            at = torch.from_numpy(row), torch.from_numpy(column)
            self.copy[at] = torch.from_numpy(weight).to(self.copy.dtype)
        if self.copy is not self.target:
            self.target.copy_(self.copy)


def _tables(coded: CodedMatrix) -> tuple[Any, ...]:
    """Return the arguments of `decode_streams` from `lookup` to `enter`."""
    widths = coded.tables.to(torch.int64).contiguous().numpy()
    tables, symbols = widths.shape
    bits = max(0, min(LOOKUP_BITS, (LOOKUP_ENTRIES // tables).bit_length() - 1))
    lookup, slots = np.empty(tables << bits, np.uint32), np.empty(widths.size, np.uint64)
    lay_out(widths, coded.parity.to(torch.uint8).numpy(), PRECISION - bits, lookup, slots)
    quantizers = 2 if coded.states else 1
    rows = coded.row_class.to(torch.int64).numpy() * quantizers
    columns = coded.column_class.to(torch.int64).numpy() * quantizers
    shift, size = np.uint64(PRECISION - bits), np.uint64(symbols)
    return lookup, shift, slots, size, rows, columns, *_register(coded.states)


def _output(coded: CodedMatrix, rule: Reconstruction | None, copy: Tensor) -> tuple[Any, ...]:
    """Return the arguments of `decode_streams` from `levels` to `column_stride`."""
    (m, n), (tables, symbols) = coded.shape, coded.tables.shape
    memory = copy if copy.is_contiguous() else copy.t()
    integers = torch.int32 if copy.element_size() == 4 else torch.int16
    place = (memory.reshape(-1).view(integers).numpy(), *copy.stride())
    if rule is None:
        none = np.empty(0, np.float32)
        return (none, none, none, symbols, SYMBOL, *place)
    levels = _levels(rule, tables, symbols, 2 if coded.states else 1).reshape(-1)
    steps = step_values(rule.column_step).expand(n).contiguous().numpy()
    scales = step_values(rule.row_scale).expand(m).contiguous().numpy()
    return (levels, steps, scales, rule.size, _FORMS[copy.dtype], *place)


def _levels(
    rule: Reconstruction, tables: int, symbols: int, quantizers: int
) -> NDArray[np.float32]:
    """Return the level of each symbol in each table [tables, symbols], before it is scaled."""
    if rule.grid is not None:
        levels = rule.grid.numpy()
        return np.ascontiguousarray(np.broadcast_to(levels, (tables, symbols)))
    integers = np.arange(rule.lowest, rule.lowest + symbols)
    if quantizers == 1:
        levels = integers[None]
    else:
        levels = np.stack([2 * integers, 2 * integers - np.sign(integers)])
    return np.ascontiguousarray(np.tile(levels.astype(np.float32), (tables // quantizers, 1)))


def _register(states: int) -> tuple[np.uint64, np.uint64]:
    """Return feedback and entry of the trellis's shift register; 0 without a trellis."""
    feedback, entry = TRELLIS_REGISTER.get(states, (0, 0))
    return np.uint64(feedback), np.uint64(entry)
