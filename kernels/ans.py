"""Decoding of many matrices' streams on the GPU, one lane per stream.

The lanes of a program are 32 consecutive streams of one matrix, so that all of them are at the same
column of consecutive rows (docs/format.md, "Streams"): what they write side by side is one piece
of the transposed matrix. One step of a lane is reference/ans.py's, bit for bit,

    v = state mod 2**24;  s = the symbol with low[s] <= v < low[s] + width[s]
    state = (state >> 24) * width[s] + v - low[s]
    if state < 2**32 and words are left: state = state << 32 | the last word, which is then dropped

with s found from the leading bits of v and a few steps of bisection, and the next word fetched one
word ahead. With FUSED the lane writes fl(fl32(fl32(level * step) * scale)) instead of s; level is
looked up, too, so that plain integers, lists and trellises are one code. No v is without a symbol,
and the number of steps depends on the shape alone: whatever the words are, nothing is read or
written out of range, and every lane ends.

The arrays that the kernel reads are made for all matrices at once and where the tensors are: a
matrix costs no launches of its own. `coded.check` keeps a matrix's numbers within those of the
kernel.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerwu_gpu.coded import CodedMatrix, Reconstruction
from cerwu_gpu.errors import CorruptionError
from cerwu_gpu.spec import PRECISION, TRELLIS_REGISTER, WORD_BITS
from cerwu_gpu.steps import step_values

LANES = 32
"""Streams of a program: one warp, because a model has few streams for each processor of a GPU."""
LOOKUP_BITS = 8
"""Leading bits of v by which a symbol is looked up: 1 KB for each table."""


@triton.jit
def _take_word(p_stack, b_state, b_left, b_word, m_take, WORD: tl.constexpr):
    """Take, where m_take, the word fetched before into the state; fetch the word below it."""
    b_unsigned = b_word.to(tl.uint32, bitcast=True).to(tl.uint64)
    b_state = tl.where(m_take, (b_state << WORD) | b_unsigned, b_state)
    b_left = tl.where(m_take, b_left - 1, b_left)
    # `other` is the word itself, so that nothing waits for the load before the next word is due.
    b_word = tl.load(p_stack + b_left - 1, mask=m_take & (b_left > 0), other=b_word)
    return b_state, b_left, b_word


@triton.jit
def _symbol(p_table, b_bucket, b_v, LOW: tl.constexpr):
    """Return the symbol whose interval holds v, from the lookup of v's bucket: [BL] int32."""
    b_from = b_bucket & 0xFFFF  # [BL] first symbol of the bucket
    b_to = b_from + ((b_bucket >> 16) & 0xFFFF)  # [BL] and its last
    while tl.max(b_to - b_from, axis=0) > 0:
        b_middle = (b_from + b_to + 1) >> 1
        m_open = b_from < b_to
        b_low = tl.load(p_table + b_middle, mask=m_open, other=0) & LOW
        b_to = tl.where(b_low <= b_v, b_to, b_middle - 1)
        b_from = tl.where(b_low <= b_v, b_middle, b_from)
    return b_from


@triton.jit
def _rounded(b_x, dtype: tl.constexpr):
    """Return the nearest number of the dtype, ties to even."""
    if dtype == tl.bfloat16:
        # Spelled out, because Triton's interpreter would cut off the lower half.
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16
        b_bits = tl.where(b_x == b_x, b_bits, 0x7FC0)
        return b_bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return b_x.to(dtype)


@triton.jit
def _note_escapes(p_alphabet, p_count, p_places, b_place, m_escape):
    """Append the places to the matrix's list, in any order, as far as there is room."""
    if tl.max(m_escape.to(tl.int32), axis=0) > 0:
        first = tl.load(p_alphabet + 1)
        room = tl.load(p_alphabet + 2)
        p_counts = p_count + tl.zeros_like(b_place)  # [BL], all the same
        o_place = tl.atomic_add(p_counts, 1, mask=m_escape, sem="relaxed")  # [BL]
        tl.store(p_places + first + o_place, b_place, mask=m_escape & (o_place < room))


@triton.jit
def decode_kernel(
    p_programs,  # [programs, 2] int64: number of the matrix, first stream
    p_matrices,  # [matrices, FIELDS] int64, see Batch
    p_words,  # [words] int32, all streams, one after the other
    p_ends,  # [streams + 1] int64: stream l holds words[ends[l]] ... words[ends[l + 1] - 1]
    p_lookup,  # [tables, 2 ** LOOKUP] int32
    p_slots,  # [slots] int64: low | parity << BITS | width << 32
    p_row_table,  # [rows of all matrices] int32
    p_column_table,  # [columns of all matrices + 1] int32
    p_out,  # elements of all matrices, each [columns, rows]: int32, or with FUSED a float
    p_status,  # [streams] int32, out: 1 if the state is not 0 at the end, 2 if words are left
    p_levels,  # [slots] float32; this and all that follow are read only with FUSED
    p_alphabets,  # [matrices, ALPHABET_FIELDS] int64, see Levels
    p_steps,  # [columns of all matrices] float32
    p_scales,  # [rows of all matrices] float32
    p_escape_count,  # [matrices] int32, zeros: how many escapes there are
    p_places,  # [escapes] int64, out: 4 * (number of the element) + 2 * parity + quantizer
    BL: tl.constexpr,
    FIELDS: tl.constexpr,
    ALPHABET_FIELDS: tl.constexpr,
    LOOKUP: tl.constexpr,
    BITS: tl.constexpr,
    WORD: tl.constexpr,
    FUSED: tl.constexpr,
    ESCAPES: tl.constexpr,
):
    i_program = tl.program_id(0).to(tl.int64)
    i_matrix = tl.load(p_programs + 2 * i_program)
    first = tl.load(p_programs + 2 * i_program + 1)
    p_matrix = p_matrices + i_matrix * FIELDS
    rows = tl.load(p_matrix)
    columns = tl.load(p_matrix + 1)
    streams = tl.load(p_matrix + 2)
    first_stream = tl.load(p_matrix + 3)
    first_row = tl.load(p_matrix + 4)
    first_column = tl.load(p_matrix + 5)
    p_lookup += tl.load(p_matrix + 6) << LOOKUP  # from the matrix's first table
    first_slot = tl.load(p_matrix + 7)
    p_slots += first_slot
    first_element = tl.load(p_matrix + 8)
    size = tl.load(p_matrix + 9).to(tl.int32)
    register = tl.load(p_matrix + 10).to(tl.int32)
    feedback, enter = register & 255, register >> 8
    if FUSED:
        p_levels += first_slot
    if ESCAPES:
        p_alphabet = p_alphabets + i_matrix * ALPHABET_FIELDS
        regular = tl.load(p_alphabet).to(tl.int32)

    o_l = first + tl.arange(0, BL)  # [BL] int64
    m_l = o_l < streams
    b_start = tl.load(p_ends + first_stream + o_l, mask=m_l, other=0)  # [BL] int64
    b_left = tl.load(p_ends + first_stream + o_l + 1, mask=m_l, other=0) - b_start
    p_stack = p_words + b_start  # [BL]
    b_word = tl.load(p_stack + b_left - 1, mask=b_left > 0, other=0)  # [BL] int32
    b_state = tl.zeros([BL], tl.uint64)
    for _ in tl.static_range(2):
        b_state, b_left, b_word = _take_word(p_stack, b_state, b_left, b_word, b_left > 0, WORD)

    for i_turn in range(0, tl.cdiv(rows - first, streams)):
        o_r = o_l + i_turn * streams  # [BL] int64
        m_r = m_l & (o_r < rows)
        b_row_table = tl.load(p_row_table + first_row + o_r, mask=m_r, other=0)  # [BL]
        b_node = tl.zeros([BL], tl.int32)  # trellis state, its quantizer in bit 0
        p_column = p_out + first_element + o_r  # [BL]
        if FUSED:
            b_scale = tl.load(p_scales + first_row + o_r, mask=m_r, other=0.0)  # [BL]
        column_table = tl.load(p_column_table + first_column)
        for j in range(0, columns):
            b_quantizer = b_node & 1
            b_table = b_row_table + column_table + b_quantizer  # [BL] int32
            column_table = tl.load(p_column_table + first_column + j + 1)
            b_v = (b_state & ((1 << BITS) - 1)).to(tl.int32)  # [BL]
            o_bucket = (b_table << LOOKUP) + (b_v >> (BITS - LOOKUP))
            p_table = p_slots + b_table * size  # [BL]
            b_symbol = _symbol(p_table, tl.load(p_lookup + o_bucket), b_v, (1 << BITS) - 1)
            b_slot = tl.load(p_table + b_symbol)  # [BL] int64
            b_low = b_slot.to(tl.int32)  # low, and above it the parity

            b_over = b_v - (b_low & ((1 << BITS) - 1))
            b_width = b_slot.to(tl.uint64) >> 32
            b_next = (b_state >> BITS) * b_width + b_over.to(tl.uint64)
            b_state = tl.where(m_r, b_next, b_state)
            m_take = m_r & (b_left > 0) & ((b_state >> WORD) == 0)
            b_state, b_left, b_word = _take_word(p_stack, b_state, b_left, b_word, m_take, WORD)
            b_node = (b_node >> 1) ^ (feedback & -b_quantizer) ^ (enter & -(b_low >> BITS))

            if FUSED:
                b_level = tl.load(p_levels + b_quantizer * size + b_symbol)  # [BL]
                b_weight = b_level * tl.load(p_steps + first_column + j) * b_scale
                tl.store(p_column, _rounded(b_weight, p_out.dtype.element_ty), mask=m_r)
                if ESCAPES:
                    o_element = first_element + o_r * columns + j  # [BL] int64
                    b_place = 4 * o_element + 2 * (b_low >> BITS) + b_quantizer
                    m_escape = m_r & (b_symbol >= regular)
                    _note_escapes(
                        p_alphabet, p_escape_count + i_matrix, p_places, b_place, m_escape
                    )
            else:
                tl.store(p_column, b_symbol, mask=m_r)
            p_column += rows

    b_status = (b_state != 0).to(tl.int32) + 2 * (b_left > 0).to(tl.int32)
    tl.store(p_status + first_stream + o_l, b_status, mask=m_l)


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
        """Return the number of each item in its matrix."""
        return torch.arange(self.total, device=self.owner.device) - self.first[self.owner]


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
        # One word more, which is read but never used: there may be none at all.
        words = [_as_int32(matrix.words) for matrix in batch]
        self.words = torch.cat([*words, words[0].new_zeros(1)])
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
    """Matrices as decode_kernel reads them; the kernel gives the shapes of the tensors.

    Attributes:
        names: of the matrices;  shapes: (m, n) of each.
        rows, columns, slots: the rows, columns and slots of all matrices; a slot is a symbol of a
            table, and a table's slots follow one another.
        symbol, quantizer: [slots] int64, of each slot.
        quantizers: [matrices] int64, 2 under a trellis, else 1.
        alphabets: symbols of a table, in each matrix.
        matrices: per matrix FIELDS numbers: rows, columns, streams; the numbers of its first
            stream, row, column, table, slot and element; symbols of a table; its trellis,
            as `_register` returns it.
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
        table = flat.table - flat.tables.first[flat.slots.owner]
        self.quantizer = table % flat.quantizers[flat.slots.owner]
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
            [_register(matrix.states) for matrix in batch],
        ]
        self.matrices = torch.tensor(fields, device=self.device).T.contiguous()
        self.programs = torch.tensor(_programs(self.shapes, flat.streams.sizes), device=self.device)

    def name_of_stream(self, stream: int) -> str:
        """Return the name of the matrix that has this stream of the batch."""
        return self.names[bisect_right(self._first_stream, stream) - 1]

    def split(self, out: Tensor) -> list[Tensor]:
        """Return the matrices [m, n] in `out` [elements], which has their transposes."""
        return [
            out[first : first + m * n].view(n, m).T
            for first, (m, n) in zip(self.first_element, self.shapes, strict=True)
        ]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1).to(torch.int64) for tensor in tensors])


def _as_int32(words: Tensor) -> Tensor:
    """Return the lowest 32 bits of words of any integer dtype."""
    if words.element_size() == 4:
        return words.contiguous().view(torch.int32)
    return words.to(torch.int64).to(torch.int32)


def _lookup(flat: _Flat) -> tuple[Tensor, Tensor]:
    """Return `lookup` and `low_width` of a batch."""
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


def _register(states: int) -> int:
    """Return the trellis's shift register: feedback, and above it in bit 8 entry; 0 without one."""
    feedback, entry = TRELLIS_REGISTER.get(states, (0, 0))
    return feedback | entry << 8


def _programs(shapes: Sequence[tuple[int, int]], streams: Sequence[int]) -> list[tuple[int, int]]:
    """Return matrix and first stream of each program, the most steps first."""
    steps = [-(-m // s) * n for (m, n), s in zip(shapes, streams, strict=True)]
    order = sorted(range(len(steps)), key=lambda i: -steps[i])
    return [(i, first) for i in order for first in range(0, streams[i], LANES)]


class Levels:
    """Levels of a batch's symbols; escapes are noted by the kernel and filled in afterwards.

    Attributes:
        levels: [slots] float32, a symbol's weight before it is scaled; nan for escapes.
        alphabets: per matrix FIELDS numbers: size of the alphabet without escape symbols; number of
            the matrix's first escape, and how many it has.
        escape_counts: [matrices] int32, filled by the kernel.
        places: [escapes] int64, filled by the kernel: 4 * element + 2 * parity of the
            escape symbol + quantizer, elements counted row by row.
        present: whether there are escape symbols.
    """

    FIELDS = 3

    def __init__(self, batch: Batch, rules: Sequence[Reconstruction]) -> None:
        self._batch = batch
        device = batch.device
        sizes = [rule.size for rule in rules]
        counts = [len(rule.escapes) for rule in rules]
        self._escapes = Items(counts, device)
        self._values = torch.cat([rule.escapes.to(torch.int32) for rule in rules])
        fields = [sizes, self._escapes.firsts, counts]
        self.alphabets = torch.tensor(fields, device=device).T.contiguous()
        self.present = sizes != batch.alphabets
        self.escape_counts = torch.zeros(len(sizes), dtype=torch.int32, device=device)
        self.places = torch.empty(sum(counts), dtype=torch.int64, device=device)

        owner = batch.slots.owner
        lowest = torch.tensor([rule.lowest for rule in rules], device=device)[owner]
        integer = (batch.symbol + lowest).to(torch.int32)
        escape = batch.symbol >= self.alphabets[owner, 0]
        levels = _level(integer, batch.quantizer, batch.quantizers[owner])
        self.levels = levels.masked_fill(escape, torch.nan)
        for first, rule in zip(batch.slots.firsts, rules, strict=True):
            if rule.grid is not None:
                self.levels[first : first + rule.size] = rule.grid

    def fill_escapes(self, out: Tensor, steps: Tensor, scales: Tensor) -> None:
        """Write the weights of the escapes to the places that the kernel noted.

        Args:
            out: [elements], the transposes of all matrices.
            steps, scales: float32, of all columns and of all rows.

        Raises:
            CorruptionError: a matrix (named) has not as many escapes as values for them, or one of
                another parity.
        """
        if not self.present:
            return
        batch, owner = self._batch, self._escapes.owner
        for name, count, stored in zip(
            batch.names, self.escape_counts.tolist(), self._escapes.sizes, strict=True
        ):
            if count != stored:
                raise CorruptionError(f"{name}: escapes are missing; get it again.")
        places = self.places.sort().values
        m, n = batch.rows.size[owner], batch.columns.size[owner]
        element, parity, quantizer = places >> 2, (places >> 1) & 1, places & 1
        wrong = (parity != (self._values & 1)) & (batch.quantizers[owner] > 1)
        if bool(wrong.any()):
            name = batch.names[int(owner[wrong][0])]
            raise CorruptionError(f"{name}: an escape has the wrong parity; get it again.")
        first = torch.tensor(batch.first_element, device=out.device)[owner]
        row = (element - first) // n
        column = element - first - row * n
        level = _level(self._values, quantizer, batch.quantizers[owner])
        level *= steps[batch.columns.first[owner] + column]
        level *= scales[batch.rows.first[owner] + row]
        out[first + column * m + row] = level.to(out.dtype)


def _level(integer: Tensor, quantizer: Tensor, quantizers: Tensor) -> Tensor:
    """Return the integer, or 2q - sgn(q) [quantizer 1] for q under a trellis (2 quantizers)."""
    second = (quantizer * integer.sign()).to(torch.int32)
    return (integer * quantizers.to(torch.int32) - second).to(torch.float32)


def decode(batch: Sequence[CodedMatrix]) -> list[Tensor]:
    """Decode all matrices in one launch.

    Args:
        batch: matrices of any shapes, on one device, that `coded.check` accepted.

    Returns:
        One int32 [m, n] tensor of symbols per matrix, a transposed view; all of them share memory.

    Raises:
        CorruptionError: a matrix (named) has a stream that does not end in state 0 with all its
            words used.
    """
    if not batch:
        return []
    prepared = Batch(batch)
    out = torch.empty(prepared.elements, dtype=torch.int32, device=prepared.device)
    _check(prepared, launch(prepared, out))
    return prepared.split(out)


def decode_weights(
    batch: Sequence[CodedMatrix],
    rules: Sequence[Reconstruction],
    dtype: torch.dtype,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Decode all matrices to weights in one launch; their symbols are never in memory.

    Args:
        batch: as for `decode`.
        rules: each matrix's rule from symbols to weights.
        dtype: the dtype that the weights are rounded to, once.
        out: tensors [m, n] of that dtype to write to, with any strides; default: new ones.

    Returns:
        One [m, n] tensor per matrix: those of `out`, or transposed views that share memory.

    Raises:
        CorruptionError: as for `decode`, or a matrix has not as many escapes as values for them, or
            of another parity under a trellis.
    """
    if not batch:
        return []
    prepared = Batch(batch)
    levels = Levels(prepared, rules)
    steps = [rule.column_step.expand(m.shape[1]) for m, rule in zip(batch, rules, strict=True)]
    scales = [rule.row_scale.expand(m.shape[0]) for m, rule in zip(batch, rules, strict=True)]
    step, scale = step_values(torch.cat(steps)), step_values(torch.cat(scales))
    flat = torch.empty(prepared.elements, dtype=dtype, device=prepared.device)
    _check(prepared, launch_weights(prepared, levels, step, scale, flat))
    levels.fill_escapes(flat, step, scale)
    decoded = prepared.split(flat)
    return decoded if out is None else [to.copy_(x) for to, x in zip(out, decoded, strict=True)]


def launch(batch: Batch, out: Tensor) -> Tensor:
    """Decode symbols into `out` [elements] int32; return the status for `_check`."""
    return _launch(batch, out, None, None, None)


def launch_weights(
    batch: Batch, levels: Levels, steps: Tensor, scales: Tensor, out: Tensor
) -> Tensor:
    """Decode weights into `out` [elements], without the escapes; return the status for `_check`."""
    return _launch(batch, out, levels, steps, scales)


def _launch(
    batch: Batch, out: Tensor, levels: Levels | None, steps: Tensor | None, scales: Tensor | None
) -> Tensor:
    status = torch.empty(batch.streams, dtype=torch.int32, device=batch.device)
    decode_kernel[(len(batch.programs),)](
        batch.programs,
        batch.matrices,
        batch.words,
        batch.ends,
        batch.lookup,
        batch.low_width,
        batch.row_table,
        batch.column_table,
        out,
        status,
        levels and levels.levels,
        levels and levels.alphabets,
        steps,
        scales,
        levels and levels.escape_counts,
        levels and levels.places,
        BL=LANES,
        FIELDS=Batch.FIELDS,
        ALPHABET_FIELDS=Levels.FIELDS,
        LOOKUP=LOOKUP_BITS,
        BITS=PRECISION,
        WORD=WORD_BITS,
        FUSED=levels is not None,
        ESCAPES=levels is not None and levels.present,
        num_warps=1,
    )
    return status


def _check(batch: Batch, status: Tensor) -> None:
    """Raise CorruptionError for the first matrix with a stream that did not end well."""
    if bool(status.any()):
        name = batch.name_of_stream(int(status.nonzero()[0]))
        raise CorruptionError(f"{name}: a stream does not end where it must: get the file again.")
