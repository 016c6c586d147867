"""The arrays that the decoder reads on the GPU: the matrices of a batch in flat arrays.

Everything is done for all matrices at once and where the tensors are: a matrix costs no launches of
its own. `coded.check` keeps a matrix's numbers within those of the kernel.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from cerwu_gpu.coded import CodedMatrix
from cerwu_gpu.spec import PRECISION, TRELLIS_NEXT, TRELLIS_QUANTIZER

LANES = 32
"""Streams of a program: one warp, because a model has few streams for each processor of a GPU."""
LOOKUP_BITS = 8
"""Leading bits of v by which a symbol is looked up: 1 KB for each table."""


class Items:
    """Items of all matrices one after the other: sizes and firsts per matrix, owner per item."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.sizes = list(sizes)
        self.firsts = list(accumulate(sizes, initial=0))
        self.total = self.firsts.pop()
        self.size = torch.tensor(self.sizes, device=device)
        self.first = torch.tensor(self.firsts, device=device)
        numbers = torch.arange(len(self.sizes), device=device)
        self.owner = numbers.repeat_interleave(self.size, output_size=self.total)

    def number(self) -> Tensor:
        """Number of each item in its matrix."""
        return torch.arange(self.total, device=self.owner.device) - self.first[self.owner]

    def sum(self, values: Tensor) -> Tensor:
        """Sum of each matrix's items."""
        return torch.zeros_like(self.size).scatter_add_(0, self.owner, values.to(torch.int64))

    def greatest(self, values: Tensor) -> Tensor:
        """The greatest of each matrix's items, or 0."""
        return torch.zeros_like(self.size).scatter_reduce_(0, self.owner, values, "amax")


class _Flat:
    """The fields of all matrices, one flat tensor for each field.

    Attributes:
        symbol, table: [slots] int64, the symbol of each slot and the number of its table.
    """

    def __init__(self, batch: Sequence[CodedMatrix]) -> None:
        device = batch[0].words.device
        self.rows = Items([matrix.shape[0] for matrix in batch], device)
        self.columns = Items([matrix.shape[1] for matrix in batch], device)
        self.streams = Items([len(matrix.lengths) for matrix in batch], device)
        self.tables = Items([len(matrix.tables) for matrix in batch], device)
        self.symbols = Items([matrix.tables.shape[1] for matrix in batch], device)
        self.slots = Items([matrix.tables.numel() for matrix in batch], device)
        self.quantizers = torch.tensor([2 if x.states else 1 for x in batch], device=device)
        # One word more, for what is never used but read: there may be none at all.
        words = [_as_int32(matrix.words) for matrix in batch]
        self.words = torch.cat([*words, words[0].new_zeros(1)])
        self.word_counts = torch.tensor([len(each) for each in words], device=device)
        self.lengths = _joined([matrix.lengths for matrix in batch])
        self.width = _joined([matrix.tables for matrix in batch])
        self.row_class = _joined([matrix.row_class for matrix in batch])
        self.column_class = _joined([matrix.column_class for matrix in batch])
        self.parity = _joined([matrix.parity for matrix in batch])
        self.ends = torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0))
        size = self.symbols.size[self.slots.owner]
        self.symbol = self.slots.number() % size
        self.table = self.tables.first[self.slots.owner] + self.slots.number() // size


class Batch:
    """Matrices as ans.decode_kernel reads them; the kernel gives the shapes of the tensors.

    Attributes:
        names: of the matrices;  shapes: (m, n) of each.
        rows, columns, slots: the rows, columns and slots of all matrices; a slot is a symbol of a
            table, and a table's slots follow one another.
        symbol, quantizer: [slots] int64, of each slot.
        quantizers: [matrices] int64, 2 under a trellis, else 1.
        alphabets: symbols of a table, in each matrix.
        matrices: per matrix FIELDS numbers: rows, columns, streams; the numbers of its first
            stream, row, column, table, slot and element; symbols of a table; its trellis machine.
        programs: matrix and first stream of each program, the longest first.
        lookup: for each table and value of the leading bits of v the first symbol that they can
            mean, and in the upper half how many more there are.
        low_width: low | parity << PRECISION | width << 32 of each slot.
        row_table, column_table: their sum is the number of an element's table in its matrix.
        streams, elements: how many there are in all matrices together.
    """

    FIELDS = 11

    def __init__(self, batch: Sequence[CodedMatrix]) -> None:
        """Lay the matrices out; `coded.check` accepted all of them."""
        self.names = [matrix.name for matrix in batch]
        self.shapes = [matrix.shape for matrix in batch]
        flat = _Flat(batch)
        self.device, self.words, self.ends = flat.words.device, flat.words, flat.ends
        self.rows, self.columns, self.slots = flat.rows, flat.columns, flat.slots
        self.symbol, self.quantizers = flat.symbol, flat.quantizers
        self.alphabets = flat.symbols.sizes
        own_table = flat.table - flat.tables.first[flat.slots.owner]
        self.quantizer = own_table % flat.quantizers[flat.slots.owner]
        self.lookup, self.low_width = _lookup(flat)
        row_table = flat.row_class * flat.quantizers[flat.rows.owner]
        column_table = flat.column_class * flat.quantizers[flat.columns.owner]
        # One more, which is read but never used.
        self.column_table = torch.nn.functional.pad(column_table, (0, 1)).to(torch.int32)
        self.row_table = row_table.to(torch.int32)
        self.first_element = list(accumulate((m * n for m, n in self.shapes), initial=0))
        self.elements = self.first_element.pop()
        self.streams, self._first_stream = flat.streams.total, flat.streams.firsts
        counted = (flat.rows, flat.columns, flat.streams)
        numbered = (flat.streams, flat.rows, flat.columns, flat.tables, flat.slots)
        fields = [
            *(items.sizes for items in counted),
            *(items.firsts for items in numbered),
            self.first_element,
            flat.symbols.sizes,
            [_machine(matrix.states) for matrix in batch],
        ]
        self.matrices = torch.tensor(fields, device=self.device).T.contiguous()
        self.programs = torch.tensor(_programs(self.shapes, flat.streams.sizes), device=self.device)

    def name_of_stream(self, stream: int) -> str:
        """The matrix that has this stream of the batch."""
        return self.names[bisect_right(self._first_stream, stream) - 1]

    def split(self, out: Tensor) -> list[Tensor]:
        """The matrices [m, n] in `out` [elements], which has their transposes."""
        return [
            out[first : first + m * n].view(n, m).T
            for first, (m, n) in zip(self.first_element, self.shapes, strict=True)
        ]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1).to(torch.int64) for tensor in tensors])


def _as_int32(words: Tensor) -> Tensor:
    """The lowest 32 bits of words of any integer dtype."""
    if words.element_size() == 4:
        return words.contiguous().view(torch.int32)
    return words.to(torch.int64).to(torch.int32)


def _lookup(flat: _Flat) -> tuple[Tensor, Tensor]:
    """`lookup` and `low_width` of a batch."""
    low = flat.width.cumsum(0) - flat.width - (flat.table << PRECISION)
    first_parity = flat.symbols.first[flat.slots.owner]
    parity = flat.parity[first_parity + flat.symbol]
    low_width = low | (parity << PRECISION) | (flat.width << 32)

    # One column more: what begins after a bucket's first v counts from the next bucket on.
    buckets = (1 << LOOKUP_BITS) + 1
    shift = PRECISION - LOOKUP_BITS
    counts = torch.zeros(flat.tables.total * buckets, dtype=torch.int64, device=low.device)
    begins = flat.table * buckets + ((low + (1 << shift) - 1) >> shift)
    counts.scatter_add_(0, begins, torch.ones_like(begins))
    last = counts.view(-1, buckets).cumsum(1) - 1
    first, more = last[:, :-1], last[:, 1:] - last[:, :-1]
    return (first | (more << 16)).to(torch.int32), low_width


def _machine(states: int) -> int:
    """Four bits for every state and parity: the next state, and its quantizer in bit 3; signed."""
    machine = 0
    for state, ways in enumerate(TRELLIS_NEXT.get(states, ())):
        for parity, follow in enumerate(ways):
            node = follow | TRELLIS_QUANTIZER[states][follow] << 3
            machine |= node << (8 * state + 4 * parity)
    return machine - (machine >> 63 << 64)


def _programs(shapes: Sequence[tuple[int, int]], streams: Sequence[int]) -> list[tuple[int, int]]:
    """Matrix and first stream of each program, the most steps first."""
    steps = [-(-m // s) * n for (m, n), s in zip(shapes, streams, strict=True)]
    order = sorted(range(len(steps)), key=lambda i: -steps[i])
    return [(i, first) for i in order for first in range(0, streams[i], LANES)]
