"""The numbers that are part of the file format; changing one breaks it (docs/format.md)."""

from typing import Final

FORMAT_VERSION: Final = 2
"""Latest version that is read; a file states the least version that has all that it holds."""
QUANT_METHOD: Final = "cerwu"
SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
"""Name of the file that holds all tensors, or of the index of several such files."""
METADATA_KEY: Final = "cerwu"
"""Key of the JSON manifest in the metadata of each safetensors file."""
HEADER_KEY: Final = "cerwu_sha256"
"""Key of the checksum of the manifest and of every tensor's name, dtype and shape."""

PRECISION: Final = 24
"""Probabilities are integers k >= 1 in units of 2**-PRECISION; each table sums to 2**PRECISION."""
STATE_BITS: Final = 64
WORD_BITS: Final = 32

STREAM_SYMBOLS: Final = 4096
"""Minimum symbols of a stream, unless the matrix has fewer."""
STREAM_BITS: Final = 6500
"""Minimum bits, about, that a writer gives a stream: its fixed cost of some 35 is then 0.55 %."""
STREAM_SYMBOLS_MOST: Final = 1 << 16
"""Maximum symbols that a writer gives a stream of more than one row: bounds a decoder's time."""
STREAM_SYMBOLS_LIMIT: Final = 1 << 17
"""Maximum symbols of a stream that a reader accepts."""

WEIGHTS_PER_BYTE: Final = 1 << 8
"""Maximum weights for each byte of a directory's files with tensors: in float32 they are 1024 times
the bytes, which is about what deflate can make of its own."""
CLASSES_LIMIT: Final = 511
"""Maximum classes of a matrix: an element's is the sum of two bytes."""
SLOTS_PER_BYTE: Final = 1 << 6
SLOTS_FREE: Final = 1 << 20
"""Maximum table entries that a reader accepts: SLOTS_FREE, and SLOTS_PER_BYTE for each byte."""

SYMBOLS_LIMIT: Final = 1 << 16
"""Maximum symbols of an alphabet, escapes included."""
TABLE_SLOTS_LIMIT: Final = 1 << 20
"""Maximum entries in the tables of one matrix."""
INTEGER_LIMIT: Final = 1 << 31
"""Bound of the magnitude of integers: they fit 32 bits."""
TRELLIS_INTEGER_LIMIT: Final = 1 << 30
"""Bound of the magnitude under a trellis: twice of one fits 32 bits."""

CODE_RESOLUTION: Final = 8
"""A table code c stands for a probability proportional to 2**(-c / CODE_RESOLUTION)."""
CODE_MAX: Final = 191
"""Largest table code: 2**-23.9, just above one unit of probability."""
CODE_WEIGHTS: Final = (
    1073741824,
    984625594,
    902905651,
    827968132,
    759250125,
    696235434,
    638450708,
    585461881,
)
"""round(2**(30 - i/8)) for i = 0..7; the weight of code c is CODE_WEIGHTS[c % 8] >> (c // 8)."""

STEP_RESOLUTION: Final = 256
"""A step code s stands for the step 2**(s / STEP_RESOLUTION), rounded once to float32."""

TRELLIS_REGISTER: Final = {4: (2, 1), 8: (7, 2), 16: (13, 4), 32: (24, 5)}
"""A trellis as a shift register, by its number of states: feedback f and entry e. State s uses the
quantizer s & 1 and leads to s >> 1, exclusive or f if s is odd, exclusive or e if the symbol is.
That is the systematic encoder of the code with the parity checks h0 = 2f + 1 and h1 = 2e
(Ungerboeck, IEEE Trans. Inf. Theory 28, 1982); docs/method.md, section 7, has how they were chosen.
"""


def _ways(states: int) -> tuple[tuple[int, int], ...]:
    feedback, entry = TRELLIS_REGISTER[states]
    halves = [state >> 1 ^ (feedback if state & 1 else 0) for state in range(states)]
    return tuple((half, half ^ entry) for half in halves)


TRELLIS_NEXT: Final = {
    4: ((0, 2), (2, 0), (1, 3), (3, 1)),
    8: ((0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5)),
    16: _ways(16),
    32: _ways(32),
}
"""TRELLIS_NEXT[states][state][parity of the symbol] is the next state; a row starts in state 0.
4 and 8 states have the numbers that VVC gives them; the registers number the same machines anew."""
TRELLIS_QUANTIZER: Final = {4: (0, 0, 1, 1), 8: (0, 1) * 4, 16: (0, 1) * 8, 32: (0, 1) * 16}
"""Quantizer, 0 or 1, that a state uses (checked against the published VVC tables in tests)."""


def is_mirrored(lowest: int, size: int) -> bool:
    """Return whether q and -q share a code: lowest ... lowest + size - 1 are symmetric around 0."""
    return size % 2 == 1 and lowest == -(size // 2)
