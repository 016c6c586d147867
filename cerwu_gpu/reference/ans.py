"""The decoder of the streams, and their definition: plain torch, one lane per stream.

All streams of many matrices advance by one symbol per step. One step of a lane (docs/format.md,
"Decoding"), with p = PRECISION, an unsigned 64-bit state and cdf the running sum of its table:

    v = state mod 2**p;  s = the symbol with cdf[s] <= v < cdf[s + 1]
    state = (state >> p) * (cdf[s + 1] - cdf[s]) + v - cdf[s]
    if state < 2**32 and words are left: state = state << 32 | the last word, which is then dropped
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from cerwu_gpu.coded import CodedMatrix
from cerwu_gpu.errors import CorruptionError
from cerwu_gpu.spec import PRECISION, STATE_BITS, TRELLIS_NEXT, TRELLIS_QUANTIZER, WORD_BITS

SECOND = 1 << 30
"""Mark added to a symbol of the second quantizer; no alphabet is that large."""
_LANES_MAX = 32768
"""Maximum lanes of one loop: more fall out of the cache."""
_LANES_MIN = 12288
"""Minimum lanes for which another thread pays: torch's cost per call outweighs less work."""
_STEPS = 512
"""Maximum steps whose symbols are kept before they are moved to their matrices."""
_BUCKET_BITS = 9
"""Leading bits of v in the lookup from which the search for a symbol starts."""


@dataclass(frozen=True)
class _Group:
    """Neighbouring lanes of one matrix that hold equally many rows; `stream` is the first one's."""

    matrix: int
    stream: int
    lanes: int
    rows: int
    columns: int

    @property
    def steps(self) -> int:
        return self.rows * self.columns


def decode(batch: Sequence[CodedMatrix], threads: int | None = None) -> list[Tensor]:
    """Decode all matrices together; the more lanes (streams), the faster, up to some 30,000.

    Args:
        batch: matrices of any shapes, on one device, that `coded.check` accepted.
        threads: number of threads that share the lanes; default: torch's number on the CPU, else 1.

    Returns:
        One int32 [m, n] tensor of symbols per matrix; a transposed view of contiguous memory.

    Raises:
        CorruptionError: a matrix (named) has a stream that does not end in state 0 with all its
            words used.
    """
    return _decode(batch, threads, marked=False)


def decode_marked(batch: Sequence[CodedMatrix], threads: int | None = None) -> list[Tensor]:
    """Decode as `decode` does, and add SECOND to the symbols of the second quantizer of a trellis,
    so that the caller need not run the state machine again."""
    return _decode(batch, threads, marked=True)


def _decode(batch: Sequence[CodedMatrix], threads: int | None, *, marked: bool) -> list[Tensor]:
    if not batch:
        return []
    batch = [_widened(matrix) for matrix in batch]
    device = batch[0].words.device
    if threads is None:
        threads = torch.get_num_threads() if device.type == "cpu" else 1
    model, streams = _Model(batch, marked=marked), _Streams(batch)
    decoded = [torch.empty(m.shape[::-1], dtype=torch.int32, device=device) for m in batch]
    loops = _loops([group for i, m in enumerate(batch) for group in _groups(i, m)], threads)
    if threads == 1 or len(loops) == 1:
        wrong = [i for loop in loops for i in _decode_loop(loop, model, streams, decoded)]
    else:
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(_decode_loop, loop, model, streams, decoded) for loop in loops]
            wrong = [i for future in futures for i in future.result()]
    if wrong:
        name = batch[min(wrong)].name
        raise CorruptionError(f"{name}: a stream does not end where it must: get the file again.")
    return [symbols.T for symbols in decoded]


def _widened(matrix: CodedMatrix) -> CodedMatrix:
    """Return the matrix with int64 tensors, its words as unsigned numbers."""
    fields = ("words", "lengths", "tables", "row_class", "column_class", "parity")
    wide = {name: getattr(matrix, name).to(torch.int64) for name in fields}
    wide["words"] = wide["words"] & ((1 << WORD_BITS) - 1)
    return replace(matrix, **wide)


class _Model:
    """The tables of all matrices, one after the other, as the loop wants them.

    A slot is one symbol of one table; slots are numbered through all tables, and the number after
    the last (`unsure`) stands for "search". A node is a state of a trellis (scalar: of one state);
    nodes are numbered 0, 2, 4, ... so that node + parity numbers their two ways out.

    Attributes:
        lookup: [tables << _BUCKET_BITS] int32: the slot of the bucket's first v, or `unsure` where
            more than two slots share the bucket.
        low, high, width: [slots + 1] int64: the interval of v that is the slot's.
        key: [slots] int64, increasing: table << PRECISION | low.
        symbol: [slots + 1] int32, marked or not;  parity: [slots + 1] int64.
        next_node: [2 * nodes] int64: the node that node + parity leads to.
        node_table: [2 * nodes] int64: what a node's quantizer adds to an index into `lookup`.
        row_table, column_table: per matrix, [m] and [n] int64: their sum is the index into `lookup`
            of the first bucket of an element's table (its first quantizer's).
        first_node, streams: per matrix, the node at the start of a row, and S.
    """

    def __init__(self, batch: Sequence[CodedMatrix], *, marked: bool) -> None:
        shapes = [matrix.tables.shape for matrix in batch]
        device = batch[0].tables.device
        size = torch.tensor([k for t, k in shapes for _ in range(t)], device=device)
        table = torch.arange(len(size), device=device).repeat_interleave(size)
        self.unsure = len(table)
        self.width = _per_slot([m.tables.reshape(-1) for m in batch], 1)
        self.high = _per_slot([m.tables.cumsum(1).reshape(-1) for m in batch], 1 << PRECISION)
        self.low = self.high - self.width
        self.key = (table << PRECISION) + self.low[:-1]
        self.parity = _per_slot([m.parity.repeat(len(m.tables)) for m in batch], 0)
        symbols = [torch.arange(k, device=device).repeat(t) for t, k in shapes]
        if marked:
            for indices, (t, k), matrix in zip(symbols, shapes, batch, strict=True):
                if matrix.states:
                    indices.view(t, k)[1::2] += SECOND
        self.symbol = _per_slot(symbols, 0).to(torch.int32)
        self.lookup = self._lookup(table, len(size))
        self._make_nodes([matrix.states for matrix in batch])
        self.streams = [len(matrix.lengths) for matrix in batch]
        self.row_table, self.column_table = [], []
        first = 0
        for matrix in batch:
            shift = _BUCKET_BITS + (1 if matrix.states else 0)
            self.row_table.append((first << _BUCKET_BITS) + (matrix.row_class << shift))
            self.column_table.append(matrix.column_class << shift)
            first += len(matrix.tables)

    def _lookup(self, table: Tensor, tables: int) -> Tensor:
        """Count the intervals that end at or before each bucket's first v, and before its last."""
        bits = PRECISION - _BUCKET_BITS
        high = self.high[:-1]
        # One bucket more per table, for the last interval, which ends where the table does.
        bucket = (table << _BUCKET_BITS) + table
        buckets = (tables << _BUCKET_BITS) + tables
        ended = torch.bincount(bucket + ((high + (1 << bits) - 1) >> bits), minlength=buckets)
        ending = torch.bincount(bucket + (high >> bits), minlength=buckets)
        first = ended.cumsum(0).view(tables, -1)[:, :-1]
        last = ending.cumsum(0).view(tables, -1)[:, :-1]
        return torch.where(last - first <= 1, first, self.unsure).to(torch.int32).reshape(-1)

    def _make_nodes(self, states: list[int]) -> None:
        ways, quantizers, first_node = [(0, 0)], [0], {0: 0}
        for number, transitions in TRELLIS_NEXT.items():
            first = first_node[number] = 2 * len(ways)
            ways += [(first + 2 * even, first + 2 * odd) for even, odd in transitions]
            quantizers += TRELLIS_QUANTIZER[number]
        device = self.key.device
        self.first_node = [first_node[number] for number in states]
        self.next_node = torch.tensor(ways, device=device).reshape(-1)
        self.node_table = torch.tensor(quantizers, device=device).repeat_interleave(2)
        self.node_table <<= _BUCKET_BITS


def _per_slot(values: list[Tensor], unsure: int) -> Tensor:
    return torch.cat([*values, values[0].new_full((1,), unsure)])


class _Streams:
    """All words, and per matrix [S + 1] ends: stream l holds words[ends[l] : ends[l + 1]]."""

    def __init__(self, batch: Sequence[CodedMatrix]) -> None:
        self.words = torch.cat([matrix.words for matrix in batch])
        self.ends = []
        first = 0
        for matrix in batch:
            self.ends.append(torch.nn.functional.pad(matrix.lengths.cumsum(0), (1, 0)) + first)
            first += len(matrix.words)


def _groups(index: int, matrix: CodedMatrix) -> Iterator[_Group]:
    m, n = matrix.shape
    streams = len(matrix.lengths)
    rows, longer = divmod(m, streams)
    if longer:
        yield _Group(index, 0, longer, rows + 1, n)
    yield _Group(index, longer, streams - longer, rows, n)


def _loops(groups: list[_Group], threads: int) -> list[list[_Group]]:
    """Deal the lanes out to loops of equally many lanes, longest first."""
    lanes = sum(group.lanes for group in groups)
    count = max(1, min(threads, lanes // _LANES_MIN), -(-lanes // _LANES_MAX))
    room = -(-lanes // count)
    loops: list[list[_Group]] = [[]]
    left = room
    for group in sorted(groups, key=lambda group: -group.steps):
        stream, end = group.stream, group.stream + group.lanes
        while stream < end:
            if left == 0:
                loops.append([])
                left = room
            taken = min(left, end - stream)
            loops[-1].append(replace(group, stream=stream, lanes=taken))
            stream, left = stream + taken, left - taken
    return loops


def _spans(groups: list[_Group]) -> list[tuple[int, int]]:
    """Return ranges of at most _STEPS steps in which no group begins a row and none ends."""
    steps = {step for g in groups for step in range(g.columns, g.steps + 1, g.columns)}
    cuts = sorted(steps | set(range(0, max(steps), _STEPS)))
    return list(pairwise(cuts))


def _decode_loop(
    groups: list[_Group], model: _Model, streams: _Streams, decoded: list[Tensor]
) -> list[int]:
    """Decode groups (longest first) into `decoded`; return the matrices that did not end well."""
    lanes = _Lanes(groups, model, streams)
    for first, end in _spans(groups):
        active = [group for group in groups if group.steps > first]
        columns = torch.empty(end - first, len(active), dtype=torch.int64, device=model.key.device)
        for number, group in enumerate(active):
            column = first % group.columns
            if column == 0:
                lanes.begin_row(number, first // group.columns)
            table = model.column_table[group.matrix]
            columns[:, number] = table[column : column + end - first]
        slots = lanes.advance(columns)
        for number, group in enumerate(active):
            row, column = divmod(first, group.columns)
            row = row * model.streams[group.matrix] + group.stream
            part = slots[:, lanes.bounds[number] : lanes.bounds[number + 1]]
            symbols = model.symbol.index_select(0, part.reshape(-1)).view(part.shape)
            to = decoded[group.matrix][column : column + end - first, row : row + group.lanes]
            to.copy_(symbols)
    return lanes.wrong()


class _Lanes:
    """The position and state of each lane of a loop.

    Attributes:
        state: [lanes] int64, the bits of the unsigned state.
        start, position: [lanes] int64: words[start] ... words[position - 1] are left.
        group: [lanes] int64, the number of the lane's group;  bounds: first lane of each group.
        row_table, node: [lanes] int64, see _Model.
    """

    def __init__(self, groups: list[_Group], model: _Model, streams: _Streams) -> None:
        self.groups, self.model, self.words = groups, model, streams.words
        self.trellis = any(model.first_node[group.matrix] for group in groups)
        self.bounds = [0]
        for group in groups:
            self.bounds.append(self.bounds[-1] + group.lanes)
        ends = [streams.ends[g.matrix][g.stream : g.stream + g.lanes + 1] for g in groups]
        self.start = torch.cat([part[:-1] for part in ends])
        self.position = torch.cat([part[1:] for part in ends])
        self.state = torch.zeros_like(self.start)
        self.row_table = torch.zeros_like(self.start)
        self.node = torch.zeros_like(self.start)
        lanes = torch.arange(len(self.start), device=self.start.device)
        self.group = torch.bucketize(
            lanes, torch.tensor(self.bounds[1:], device=lanes.device), right=True
        )
        for _ in range(STATE_BITS // WORD_BITS):
            self._take_word(lanes)

    def _take_word(self, lanes: Tensor) -> None:
        """Set state = state << 32 | last word, for those of `lanes` that have a word left."""
        position = self.position.index_select(0, lanes)
        left = position > self.start.index_select(0, lanes)
        lanes, position = lanes[left], position[left] - 1
        word = self.words.index_select(0, position)
        state = self.state.index_select(0, lanes)
        self.state.index_copy_(0, lanes, (state << WORD_BITS) | word)
        self.position.index_copy_(0, lanes, position)

    def begin_row(self, number: int, row: int) -> None:
        """Give the lanes of a group their next row's tables, and the trellis its first state."""
        group = self.groups[number]
        lanes = slice(self.bounds[number], self.bounds[number + 1])
        first = row * self.model.streams[group.matrix] + group.stream
        table = self.model.row_table[group.matrix]
        self.row_table[lanes] = table[first : first + group.lanes]
        self.node[lanes] = self.model.first_node[group.matrix]

    def advance(self, columns: Tensor) -> Tensor:
        """Decode one symbol per row of `columns` in each lane of the first groups.

        Args:
            columns: [steps, groups] int64, the column_table of the step's column in each group.

        Returns:
            [steps, lanes] int32 slots.
        """
        model, live = self.model, self.bounds[columns.shape[1]]
        slots = torch.empty(len(columns), live, dtype=torch.int32, device=columns.device)
        state, node = self.state[:live], self.node[:live]
        row_table, group = self.row_table[:live], self.group[:live]
        # Memory that every step uses again: allocating it anew doubles the time.
        v, table, bucket, gathered = (torch.empty_like(state) for _ in range(4))
        flag = torch.empty_like(state, dtype=torch.bool)
        for column, slot in zip(columns.unbind(), slots.unbind(), strict=True):
            torch.index_select(column, 0, group, out=table)
            table += row_table
            if self.trellis:
                table += torch.index_select(model.node_table, 0, node, out=gathered)

            torch.bitwise_and(state, (1 << PRECISION) - 1, out=v)
            torch.bitwise_right_shift(v, PRECISION - _BUCKET_BITS, out=bucket)
            bucket += table
            torch.index_select(model.lookup, 0, bucket, out=slot)
            slot += torch.ge(v, torch.index_select(model.high, 0, slot, out=gathered), out=flag)
            unsure = torch.eq(slot, model.unsure, out=flag).nonzero().squeeze(1)
            if len(unsure):
                key = table.index_select(0, unsure) << (PRECISION - _BUCKET_BITS)
                key |= v.index_select(0, unsure)
                above = torch.searchsorted(model.key, key, right=True, out_int32=True)
                slot.index_copy_(0, unsure, above - 1)

            v -= torch.index_select(model.low, 0, slot, out=gathered)
            state >>= PRECISION
            # The shift was a signed one.
            state &= (1 << (STATE_BITS - PRECISION)) - 1
            torch.index_select(model.width, 0, slot, out=gathered)
            torch.addcmul(v, state, gathered, out=state)
            torch.bitwise_right_shift(state, WORD_BITS, out=gathered)
            short = torch.eq(gathered, 0, out=flag).nonzero().squeeze(1)
            if len(short):
                self._take_word(short)

            if self.trellis:
                node += torch.index_select(model.parity, 0, slot, out=gathered)
                node.copy_(torch.index_select(model.next_node, 0, node, out=gathered))
        return slots

    def wrong(self) -> list[int]:
        """Return the matrices that have a stream with words left or a final state other than 0."""
        bad = (self.state != 0) | (self.position != self.start)
        return sorted({self.groups[i].matrix for i in set(self.group[bad].tolist())})
