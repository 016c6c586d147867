"""Tables: codes to integers, the same on every machine."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cerwu_gpu.coding.tables import bits, codes_from_counts, table_from_codes
from cerwu_gpu.errors import FormatError
from cerwu_gpu.quantize import rate
from cerwu_gpu.spec import CODE_MAX, CODE_RESOLUTION, CODE_WEIGHTS, PRECISION

codes_arrays = hnp.arrays(
    np.uint8,
    st.tuples(st.integers(1, 5), st.integers(1, 300)),
    elements=st.integers(0, CODE_MAX),
)
counts_arrays = hnp.arrays(
    np.int64,
    st.tuples(st.integers(1, 5), st.integers(1, 40)),
    elements=st.one_of(st.just(0), st.integers(0, 10**9)),
)


@given(codes_arrays)
def test_a_table_is_whole_and_has_no_zero(codes):
    table = table_from_codes(codes)
    assert table.dtype == np.int64
    assert (table >= 1).all()
    assert (table.sum(axis=1) == 1 << PRECISION).all()


@given(codes_arrays)
def test_a_smaller_code_is_no_less_likely(codes):
    table = table_from_codes(codes)
    for code, row in zip(codes, table, strict=True):
        ordered = row[np.argsort(code, kind="stable")]
        assert (np.diff(ordered) <= 0).all()


@given(codes_arrays)
def test_a_table_agrees_with_arithmetic_on_whole_numbers_of_any_size(codes):
    for code, row in zip(codes.tolist(), table_from_codes(codes).tolist(), strict=True):
        weights = [CODE_WEIGHTS[c % CODE_RESOLUTION] >> c // CODE_RESOLUTION for c in code]
        free = (1 << PRECISION) - len(code)
        expected = [1 + weight * free // sum(weights) for weight in weights]
        expected[expected.index(max(expected))] += (1 << PRECISION) - sum(expected)
        assert row == expected


def test_a_table_is_pinned():
    codes = np.array([[8, 8, 16, 24, 24, 191]], dtype=np.uint8)
    assert table_from_codes(codes).tolist() == [[5592407, 5592404, 2796202, 1398101, 1398101, 1]]


def test_equal_codes_give_equal_shares_and_the_first_takes_the_rest():
    table = table_from_codes(np.zeros((1, 3), dtype=np.uint8))
    assert table.tolist() == [[5592406, 5592405, 5592405]]


@pytest.mark.parametrize("size", [65536, 4097])
def test_large_alphabets_do_not_overflow(size):
    table = table_from_codes(np.zeros((1, size), dtype=np.uint8))
    assert int(table.sum()) == 1 << PRECISION
    assert table.min() >= (1 << PRECISION) // size - 1


@pytest.mark.parametrize(
    "codes",
    [
        pytest.param(np.array([[0, CODE_MAX + 1]], dtype=np.uint8), id="code too large"),
        pytest.param(np.zeros((1, 0), dtype=np.uint8), id="no symbol"),
        pytest.param(np.zeros((1, 65537), dtype=np.uint8), id="too many symbols"),
    ],
)
def test_wrong_codes_are_refused(codes):
    with pytest.raises(FormatError, match="table"):
        table_from_codes(codes)


@given(counts_arrays)
def test_codes_fit_their_histogram(counts):
    codes = codes_from_counts(counts)
    assert codes.max() <= CODE_MAX
    cost = bits(table_from_codes(codes)).astype(np.float64)
    assert cost.min() >= 0 and cost.max() <= PRECISION
    for count, row in zip(counts, cost, strict=True):
        total = count.sum()
        if total == 0:
            continue
        share = count[count > 0] / total
        entropy = -(share * np.log2(share)).sum()
        mean = (count * row).sum() / total
        # A sixteenth of a bit for rounding the codes, and what smoothing takes away.
        assert mean <= entropy + 1 / 16 + len(count) / 16 / total / np.log(2) + 1e-3


def test_a_large_histogram_is_coded_within_a_thousandth_of_a_bit():
    share = np.exp(-0.5 * (np.arange(-16, 17) / 3.3) ** 2)
    counts = np.rint(100_000 * share).astype(np.int64)[None]
    share = counts / counts.sum()
    entropy = -(share * np.log2(np.where(share > 0, share, 1))).sum()
    mean = (share * bits(table_from_codes(codes_from_counts(counts)))).sum()
    assert entropy < mean < entropy + 1e-3


def test_an_empty_histogram_makes_all_symbols_equal():
    counts = np.array([[0, 0, 0], [9, 0, 0]])
    codes = codes_from_counts(counts)
    assert codes[0].tolist() == [0, 0, 0]
    assert codes[1, 1] > 50


def test_bits_of_powers_of_two_are_exact():
    table = np.array([[1 << 23, 1 << 22, 1 << 22]])
    assert bits(table).dtype == np.float32
    assert bits(table).tolist() == [[1.0, 2.0, 2.0]]


@settings(max_examples=50)
@given(st.integers(0, 6), st.integers(0, 2), st.integers(0, 2**32 - 1))
def test_symmetric_alphabets_have_symmetric_tables(middle, unpaired, seed):
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, 1000, (1, 2 * middle + 1 + unpaired))
    (coded,) = rate.codes([torch.from_numpy(counts)[:, None]], [2 * middle + 1])
    codes = coded[:, 0].numpy()
    paired = codes[:, : 2 * middle + 1]
    assert np.array_equal(paired, paired[:, ::-1])
    # They are the tables of the histogram made symmetric.
    mirrored = counts.copy()
    mirrored[:, : 2 * middle + 1] += counts[:, : 2 * middle + 1][:, ::-1]
    mirrored[:, 2 * middle + 1 :] *= 2
    assert np.array_equal(codes, codes_from_counts(mirrored))
