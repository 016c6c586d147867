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

The arrays that the kernel reads are made in ans_batch.py and ans_levels.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cerwu_gpu.coded import CodedMatrix, Reconstruction
from cerwu_gpu.errors import CorruptionError
from cerwu_gpu.kernels.ans_batch import LANES, LOOKUP_BITS, Batch
from cerwu_gpu.kernels.ans_levels import Levels
from cerwu_gpu.spec import PRECISION, WORD_BITS
from cerwu_gpu.steps import step_values


@triton.jit
def _take_word(p_stack, b_state, b_left, b_word, m_take, WORD: tl.constexpr):
    """Where m_take: state << 32 | the word fetched before; fetch the word below it."""
    b_unsigned = b_word.to(tl.uint32, bitcast=True).to(tl.uint64)
    b_state = tl.where(m_take, (b_state << WORD) | b_unsigned, b_state)
    b_left = tl.where(m_take, b_left - 1, b_left)
    # `other` is the word itself, so that nothing waits for the load before the next word is due.
    b_word = tl.load(p_stack + b_left - 1, mask=m_take & (b_left > 0), other=b_word)
    return b_state, b_left, b_word


@triton.jit
def _symbol(p_table, b_bucket, b_v, LOW: tl.constexpr):
    """The symbol whose interval holds v, from what the lookup says of v's bucket: [BL] int32."""
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
    """The nearest number of the dtype, ties to even."""
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
    p_found,  # [matrices] int32, zeros: how many escapes there are
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
    machine = tl.load(p_matrix + 10).to(tl.uint64)
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
        b_node = tl.zeros([BL], tl.int32)  # trellis state, and its quantizer in bit 3
        p_column = p_out + first_element + o_r  # [BL]
        if FUSED:
            b_scale = tl.load(p_scales + first_row + o_r, mask=m_r, other=0.0)  # [BL]
        column_table = tl.load(p_column_table + first_column)
        for j in range(0, columns):
            b_quantizer = b_node >> 3
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
            o_way = 8 * (b_node & 7) + 4 * (b_low >> BITS)
            b_node = (machine >> o_way.to(tl.uint64)).to(tl.int32) & 15

            if FUSED:
                b_level = tl.load(p_levels + b_quantizer * size + b_symbol)  # [BL]
                b_weight = b_level * tl.load(p_steps + first_column + j) * b_scale
                tl.store(p_column, _rounded(b_weight, p_out.dtype.element_ty), mask=m_r)
                if ESCAPES:
                    o_element = first_element + o_r * columns + j  # [BL] int64
                    b_place = 4 * o_element + 2 * (b_low >> BITS) + b_quantizer
                    m_escape = m_r & (b_symbol >= regular)
                    _note_escapes(p_alphabet, p_found + i_matrix, p_places, b_place, m_escape)
            else:
                tl.store(p_column, b_symbol, mask=m_r)
            p_column += rows

    b_status = (b_state != 0).to(tl.int32) + 2 * (b_left > 0).to(tl.int32)
    tl.store(p_status + first_stream + o_l, b_status, mask=m_l)


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
        rules: what each matrix's symbols stand for.
        dtype: what the weights are rounded to, once.
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
    """Decode symbols into `out` [elements] int32; return what `_check` reads."""
    return _launch(batch, out, None, None, None)


def launch_weights(
    batch: Batch, levels: Levels, steps: Tensor, scales: Tensor, out: Tensor
) -> Tensor:
    """Decode weights into `out` [elements], without the escapes; return what `_check` reads."""
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
        levels and levels.found,
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
    """Name the first matrix that has a stream which did not end well."""
    if bool(status.any()):
        name = batch.name_of_stream(int(status.nonzero()[0]))
        raise CorruptionError(f"{name}: a stream does not end where it must: get the file again.")
