"""The numbers that are part of the file format; changing one breaks it (docs/format.md)."""

from typing import Final

FORMAT_VERSION: Final = 1
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

TRELLIS_NEXT: Final = {
    4: ((0, 2), (2, 0), (1, 3), (3, 1)),
    8: ((0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5)),
}
"""TRELLIS_NEXT[states][state][parity of the symbol] is the next state; a row starts in state 0."""
TRELLIS_QUANTIZER: Final = {4: (0, 0, 1, 1), 8: (0, 1, 0, 1, 0, 1, 0, 1)}
"""Quantizer, 0 or 1, that a state uses (checked against the published VVC tables in tests)."""


def is_mirrored(lowest: int, size: int) -> bool:
    """Return whether q and -q share a code: lowest ... lowest + size - 1 are symmetric around 0."""
    return size % 2 == 1 and lowest == -(size // 2)
