"""Side data: what is packed comes back, it is short, and no bytes make the reader misbehave."""

import contextlib
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cerwu_gpu.coding.side import pack, sizes, unpack
from cerwu_gpu.coding.streams import stream_count
from cerwu_gpu.errors import FormatError


def integers(dtype):
    """Values of the whole range, or multiples of a number within a small range."""
    info = np.iinfo(dtype)
    return st.one_of(
        st.integers(info.min, info.max),
        st.integers(0, 7).map(lambda unit: unit * 16),
    )


@st.composite
def matrices(draw):
    m, n = draw(st.integers(1, 50)), draw(st.integers(1, 400))
    table_shape = st.tuples(st.integers(1, 6), st.integers(1, 2), st.integers(1, 40))

    def array(dtype, shape):
        return hnp.arrays(dtype, shape, elements=integers(dtype))

    def floats(shape):
        bits = hnp.arrays(np.uint32, shape, elements=integers(np.uint32))
        return bits.map(lambda values: values.view(np.float32))

    choices = {
        "table_codes": array(np.uint8, table_shape),
        "row_class": array(np.uint8, m),
        "column_class": array(np.uint8, n),
        "step_code": array(np.int16, n),
        "row_scale_code": array(np.int16, m),
        "lengths": array(np.uint32, st.integers(1, stream_count(m, n))),
        "escapes": array(np.int32, st.integers(0, min(m * n, 60))),
        "grid": floats(st.integers(0, 60)),
    }
    names = draw(st.sets(st.sampled_from(list(choices))))
    return m, n, {name: draw(choices[name]) for name in names}


def realistic(m=576, n=576):
    """A 2.5 bit matrix: steps within some 4 octaves, classes in quarters of an octave.

    A column's class follows from its step and the spread of its weights, as in real layers.
    """
    generator = np.random.default_rng(0)
    octaves = generator.normal(0, 0.5, n)
    column = np.rint(4 * (generator.normal(0, 0.15, n) - octaves))
    table = np.arange(24)[:, None, None]
    width = 1 + 0.15 * table
    codes = 8 * (np.arange(20) / width) ** 2 / 2 + 8 * np.log2(2.5 * width)
    codes = codes + generator.normal(0, 1, codes.shape) * (codes > 80)
    return {
        "table_codes": np.rint(codes).clip(0, 191).astype(np.uint8),
        "row_class": np.rint(generator.normal(4, 1.2, m)).clip(0, 9).astype(np.uint8),
        "column_class": (column - column.min()).clip(0, 15).astype(np.uint8),
        "step_code": (16 * np.rint(16 * octaves) - 1600).astype(np.int16),
        "lengths": generator.normal(360, 12, stream_count(m, n)).astype(np.uint32),
    }


@settings(deadline=None)
@given(matrices())
def test_what_is_packed_comes_back(matrix):
    m, n, arrays = matrix
    back = unpack(pack(arrays, m, n), m, n)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes(), name
    taken = sizes(pack(arrays, m, n), m, n)
    assert taken.keys() == arrays.keys()
    assert sum(taken.values()) == len(pack(arrays, m, n))
    for name in arrays.keys() - {"step_code", "row_scale_code"}:  # which others predict
        assert taken[name] == len(pack({name: arrays[name]}, m, n))


def test_the_side_data_of_a_small_matrix_is_below_one_percent_of_its_words():
    blob = pack(realistic(), 576, 576)
    assert len(blob) < 0.01 * 576 * 576 * 2.5 / 8


def test_a_column_class_makes_its_step_shorter():
    arrays = realistic()
    known = len(pack(arrays, 576, 576))
    step = arrays.pop("step_code")
    alone = len(pack({"step_code": step}, 576, 576))
    assert known - len(pack(arrays, 576, 576)) < 0.8 * alone


def test_constant_arrays_cost_a_few_bytes():
    arrays = {
        "row_scale_code": np.full(5000, -1234, np.int16),
        "column_class": np.zeros(3000, np.uint8),
    }
    assert len(pack(arrays, 5000, 3000)) < 24


def test_the_bytes_are_pinned():
    """Written by hand from docs/format.md: an array of width 1 as is, one of width 0, a table."""
    blob = bytes([3, 0x01, 6, 2, 0, 1, 2])  # column_class: base 3, divisor 2, units 0 1 2
    blob += bytes([4, 0x00, 0x80, 0x01, 0x10, 0x01])  # step_code: base 64, divisor 16, slope -1
    blob += bytes([9, 0x01, 2, 0x07, 1, 0, 5])  # escapes: 2 of them, base -4, divisor 1
    arrays = unpack(blob, 1, 3)
    assert arrays["column_class"].tolist() == [3, 5, 7]
    assert arrays["step_code"].tolist() == [16, -16, -48]
    assert arrays["escapes"].tolist() == [-4, 1]
    table = bytes([1, 0x01, 2, 1, 3, 10, 255, 2, 1, 1, 0])
    assert unpack(table, 1, 1)["table_codes"].tolist() == [[[10, 9, 11]], [[11, 11, 13]]]


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("row_class", np.zeros(4, np.uint8)),
        ("row_class", np.zeros(3, np.int16)),
        ("column_class", np.zeros((1, 5), np.uint8)),
        ("lengths", np.zeros(2, np.uint32)),
        ("escapes", np.zeros(16, np.int32)),
        ("table_codes", np.zeros((1, 3, 2), np.uint8)),
        ("table_codes", np.zeros((2, 1, 1 << 20), np.uint8)),
        ("rows", np.zeros(3, np.uint8)),
    ],
)
def test_what_does_not_fit_the_matrix_is_not_packed(name, array):
    with pytest.raises(ValueError, match=name):
        pack({name: array}, 3, 5)


HOSTILE = {
    "unknown array": [11, 0, 0, 1],
    "array 0": [0],
    "out of order": [3, 0, 0, 1, 2, 0, 0, 1],
    "twice": [3, 0, 0, 1, 3, 0, 0, 1],
    "ends in a head": [3, 1, 6],
    "ends in a payload": [3, 1, 0, 1, 0, 0],
    "unknown width": [3, 3, 0, 1, *[0] * 30],
    "unknown coding": [3, 0x21, 0, 1, *[0] * 30],
    "value too large": [3, 1, 0, 100, 1, 2, 3, 4, 5],
    "value negative": [3, 0, 1, 1],
    "divisor enormous": [3, 1, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0x0F, 0, 0, 0, 0, 255],
    "number without end": [3, 0, *[0xFF] * 12],
    "slope without classes": [4, 0, 0, 1, 2],
    "slope enormous": [3, 0, 0, 1, 4, 0, 0, 1, 0x84, 0x80, 0x10],
    "too many escapes": [9, 0, 16, 0, 1],
    "table too large": [1, 0, 0x80, 0x80, 0x40, 2, 1],
    "table empty": [1, 0, 0, 1, 1],
    "table of two bytes": [1, 2, 1, 1, 1, 5, 1],
    "three quantizers": [1, 0, 1, 3, 1],
    "no deflate": [3, 0x11, 0, 1, 3, 0xFF, 0xFF, 0xFF],
    "deflate cut off": [3, 0x11, 0, 1, 3, *zlib.compress(bytes(5), 9, -15)[:3]],
    "deflate too short": [3, 0x11, 0, 1, 4, *zlib.compress(bytes(3), 0, -15)[:4]],
}


@pytest.mark.parametrize("blob", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_refused(blob):
    with pytest.raises(FormatError, match="side data"):
        unpack(bytes(blob), 3, 5)


@pytest.mark.parametrize("items", [3, 6, 100_000_000], ids=["short", "long", "a bomb"])
def test_deflated_data_of_the_wrong_size_is_refused_in_little_memory(items):
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = packed.compress(bytes(items)) + packed.flush()
    length = [len(data) & 0x7F | 0x80, len(data) >> 7 & 0x7F | 0x80, len(data) >> 14]
    blob = bytes([3, 0x11, 0, 1, *length]) + data
    tracemalloc.start()
    with pytest.raises(FormatError, match="side data"):
        unpack(blob, 3, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_are_refused_or_read_as_other_values(data):
    blob = bytearray(pack(realistic(9, 500), 9, 500))
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    blob = blob[: data.draw(st.integers(0, len(blob)))]
    try:
        arrays = unpack(bytes(blob), 9, 500)
    except FormatError:
        return
    assert all(array.size <= 1 << 20 for array in arrays.values())


@given(st.binary(max_size=80))
def test_any_bytes_are_refused_or_read(blob):
    with contextlib.suppress(FormatError):
        unpack(blob, 3, 5)
