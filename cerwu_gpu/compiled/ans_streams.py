"""The loops of the decoder: tables laid out for it, and symbols or weights of some streams."""

# mypy: allow-untyped-decorators, allow-untyped-defs

from typing import Any

import numpy as np
from numba import njit

from cerwu_gpu.spec import PRECISION, WORD_BITS

LANES = 8
"""Streams that one worker decodes at the same time."""
SYMBOL, FLOAT32, BFLOAT16, FLOAT16 = range(4)
"""Forms of the output: symbols, or weights rounded to a dtype."""

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
f32, u32, u64, i64 = np.float32, np.uint32, np.uint64, np.int64
_LOW = u64((1 << PRECISION) - 1)
_PRECISION, _WORD = u64(PRECISION), u64(WORD_BITS)


@njit(cache=True, **OPTIONS)
def lay_out(widths, parity, shift, lookup, slots):
    """Fill `lookup` and `slots` of all tables.

    A bucket of `lookup` has the first symbol that its v can mean, and in its upper half how many
    more there are; a slot has low | parity << PRECISION | width << 32.
    """
    tables, symbols = widths.shape
    buckets = (1 << PRECISION) >> shift
    for t in range(tables):
        low, bucket = 0, 0
        for s in range(symbols):
            width = widths[t, s]
            slots[t * symbols + s] = u64(low) | u64(parity[s]) << _PRECISION | u64(width) << u64(32)
            high = low + width
            # Buckets that begin inside of this interval have it as their first symbol.
            while bucket < buckets and (bucket << shift) < high:
                lookup[t * buckets + bucket] = u32(s)
                bucket += 1
            low = high
        for b in range(buckets):
            first = lookup[t * buckets + b]
            last = i64(first)
            end = (b + 1) << shift
            if b + 1 < buckets:
                after = i64(lookup[t * buckets + b + 1])
                begins = i64(slots[t * symbols + after] & _LOW) == end
                last = after - 1 if begins else after
            else:
                last = symbols - 1
            lookup[t * buckets + b] = first | u32(last - i64(first)) << u32(16)


@njit(**OPTIONS)
def _look_up(state, table, lookup, shift, slots, symbols):
    """Return the slot of the symbol that a state stands for, and the symbol."""
    v = state & _LOW
    bucket = lookup[(table << (_PRECISION - shift)) + (v >> shift)]
    base = table * symbols
    symbol, more = u64(bucket & u32(0xFFFF)), u64(bucket >> u32(16))
    while more > u64(0):
        half = (more + u64(1)) >> u64(1)
        above = (slots[base + symbol + half] & _LOW) <= v
        symbol = symbol + half if above else symbol
        more = more - half if above else half - u64(1)
    return base + symbol, symbol


@njit(**OPTIONS)
def _advance(state, left, start, words, entry):
    """Return the state after a symbol, with one more word where it is short and one is left."""
    state = (state >> _PRECISION) * (entry >> _WORD) + (state & _LOW) - (entry & _LOW)
    take = u64(state >> _WORD == u64(0)) & u64(left > start)
    word = u64(words[left - u64(left > u64(0))])
    return (state << _WORD) | word if take else state, left - take


@njit(**OPTIONS)
def _half(weight):
    """Return the bits of the float16 nearest to a float32; ties go to even."""
    bits, size = f32(weight).view(np.uint32), f32(abs(weight)).view(np.uint32)
    # Below 2^-14 numbers are multiples of 2^-24, as are float32s from 1/2 to 1.
    small = f32(abs(weight) + f32(0.5)).view(np.uint32) - u32(0x3F000000)
    rebased = size - u32(112 << 23)
    large = (rebased + u32(0xFFF) + ((rebased >> u32(13)) & u32(1))) >> u32(13)
    rounded = small if size < u32(113 << 23) else large
    rounded = u32(0x7C00) if size >= u32(0x477FF000) else rounded  # rounds to 65536 or more
    rounded = u32(0x7E00) if size > u32(0x7F800000) else rounded
    return ((bits >> u32(16)) & u32(0x8000)) | rounded


@njit(**OPTIONS)
def _brain(weight):
    """Return the bits of the bfloat16 nearest to a float32; ties go to even."""
    bits, size = f32(weight).view(np.uint32), f32(abs(weight)).view(np.uint32)
    rounded = (bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16)
    return u32(0x7FC0) if size > u32(0x7F800000) else rounded


@njit(**OPTIONS)
def _rounded(weight, form):
    """Return the bits of a weight, rounded to its form."""
    if form == BFLOAT16:
        return u32(_brain(weight))
    if form == FLOAT16:
        return u32(_half(weight))
    return u32(f32(weight).view(np.uint32))


@njit(**OPTIONS)
def _note(places, escapes, element, entry, quantizer):
    """Note the place of an escape, as long as there is room; return how many there are now."""
    if escapes < len(places):
        parity = entry >> _PRECISION & u64(1)
        places[escapes] = 4 * element + 2 * i64(parity) + i64(quantizer)
    return escapes + 1


@njit(**OPTIONS)
def _follow(node, feedback, enter, entry):
    """Return the state of a trellis's shift register after a symbol."""
    parity = entry >> _PRECISION & u64(1)
    fed = feedback & (u64(0) - (node & u64(1)))
    return node >> u64(1) ^ fed ^ (enter & (u64(0) - parity))


@njit(cache=True, **OPTIONS)
def decode_streams(
    words,
    ends,
    first,
    last,
    lookup,
    shift,
    slots,
    symbols,
    row_table,
    column_table,
    feedback,
    enter,
    trellis,
    levels,
    steps,
    scales,
    regular,
    form,
    out,
    row_stride,
    column_stride,
    places,
):
    """Decode streams first ... last - 1; return whether all ended well, and the number of escapes.

    An escape leaves 4 * element + 2 * parity + quantizer in `places`, elements counted row by row.
    """
    rows, columns, streams = len(row_table), len(column_table), len(ends) - 1
    state, left = np.empty(LANES, np.uint64), np.empty(LANES, np.uint64)
    start, table = np.empty(LANES, np.uint64), np.empty(LANES, np.uint64)
    node, at = np.empty(LANES, np.uint64), np.empty(LANES, np.uint64)
    scale = np.zeros(LANES, np.float32)
    escapes, ended = 0, True
    stream = first
    while stream < last:
        turns = (rows - stream + streams - 1) // streams
        lanes = 1  # neighbouring streams with equally many rows
        while lanes < min(LANES, last - stream) and stream + lanes + (turns - 1) * streams < rows:
            lanes += 1
        for i in range(lanes):
            start[i], left[i], state[i] = ends[stream + i], ends[stream + i + 1], u64(0)
            for _ in range(2):
                if left[i] > start[i]:
                    left[i] -= u64(1)
                    state[i] = state[i] << _WORD | u64(words[left[i]])
        for turn in range(turns):
            row = stream + turn * streams
            for i in range(lanes):
                table[i], node[i], at[i] = row_table[row + i], u64(0), (row + i) * row_stride
                if form != SYMBOL:
                    scale[i] = scales[row + i]
            for j in range(columns):
                step = steps[j] if form != SYMBOL else f32(0)
                for i in range(lanes):
                    now = table[i] + u64(column_table[j]) + (node[i] & u64(1))
                    slot, symbol = _look_up(state[i], now, lookup, shift, slots, symbols)
                    entry = slots[slot]
                    state[i], left[i] = _advance(state[i], left[i], start[i], words, entry)
                    if trellis:
                        node[i] = _follow(node[i], feedback, enter, entry)
                    if form == SYMBOL:
                        out[at[i]] = symbol
                    else:
                        if symbol >= u64(regular):
                            element = (row + i) * columns + j
                            escapes = _note(places, escapes, element, entry, now & u64(1))
                        out[at[i]] = _rounded(f32(levels[slot] * step) * scale[i], form)
                    at[i] += u64(column_stride)
        for i in range(lanes):
            ended &= state[i] == u64(0) and left[i] == start[i]
        stream += lanes
    return ended, escapes
