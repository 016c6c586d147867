"""Streams: constriction's words, as many streams as the format says, at the tables' cost."""

import constriction
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cerwu_gpu.coding.streams import encode, stream_count
from cerwu_gpu.coding.tables import bits, codes_from_counts, table_from_codes
from cerwu_gpu.reference.dequantize import trellis_quantizers
from cerwu_gpu.spec import (
    CODE_MAX,
    PRECISION,
    STREAM_SYMBOLS,
    STREAM_SYMBOLS_MOST,
    TRELLIS_NEXT,
    TRELLIS_QUANTIZER,
)
from scripts.benchmark_coding import decode_constriction


def random_tables(generator, count, size):
    """From flat to extreme: codes over the whole range, and tables with a single likely symbol."""
    return table_from_codes(generator.integers(0, CODE_MAX + 1, (count, size)).astype(np.uint8))


def reference_words(symbols, tables, index):
    """Each symbol under constriction's exact model of its whole table, one by one."""
    coder = constriction.stream.stack.AnsCoder()
    for symbol, table in zip(symbols[::-1], index[::-1], strict=True):
        model = constriction.stream.model.Categorical(
            tables[table] / (1 << PRECISION), perfect=True
        )
        coder.encode_reverse(int(symbol), model)
    return coder.get_compressed()


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_streams_are_as_many_as_stay_full(m, n):
    streams = stream_count(m, n)
    assert 1 <= streams <= m
    if streams > 1:
        assert m // streams * n >= STREAM_SYMBOLS
    if streams < m:
        assert m // (streams + 1) * n < STREAM_SYMBOLS


@pytest.mark.parametrize(
    ("m", "n", "streams"), [(576, 576, 72), (49152, 576, 6144), (1, 1, 1), (3, 4096, 3), (7, 5, 1)]
)
def test_stream_counts_are_pinned(m, n, streams):
    assert stream_count(m, n) == streams


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 300), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_words_are_those_of_the_whole_tables(size, count, seed):
    generator = np.random.default_rng(seed)
    tables = random_tables(generator, count, size)
    symbols = generator.integers(0, size, (3, 40)).astype(np.int32)
    rows, columns = np.zeros(3, np.uint8), generator.integers(0, count, 40)
    words, lengths = encode(symbols, tables, rows, columns)
    expected = reference_words(symbols.reshape(-1), tables, np.tile(columns, 3))
    assert words.dtype == lengths.dtype == np.uint32
    assert lengths.tolist() == [len(expected)]
    assert np.array_equal(words, expected)


@pytest.mark.parametrize("count", [1, 2], ids=["one table", "a choice of two"])
@pytest.mark.parametrize(
    "table",
    [
        pytest.param([(1 << 24) - 1, 1], id="two symbols, the second at the least probability"),
        pytest.param([1, (1 << 24) - 1], id="two symbols, the first at the least probability"),
        pytest.param([(1 << 24) - 2, 1, 1], id="three symbols, a certain first"),
        pytest.param([1, (1 << 24) - 2, 1], id="three symbols, a certain middle"),
        pytest.param([1, 1, (1 << 24) - 2], id="three symbols, a certain last"),
    ],
)
def test_extreme_tables_are_exact(table, count):
    tables = np.array([table] * count)
    symbols = np.arange(60, dtype=np.int32).reshape(1, -1) % len(table)
    words, _ = encode(symbols, tables, np.zeros(1), np.arange(60) % count)
    assert np.array_equal(words, reference_words(symbols[0], tables, np.arange(60) % count))


def test_one_table_and_many_equal_tables_give_the_same_words():
    generator = np.random.default_rng(0)
    table = random_tables(generator, 1, 33)
    symbols = generator.integers(0, 33, (20, 1000)).astype(np.int32)
    one = encode(symbols, table, np.zeros(20), np.zeros(1000))
    many = encode(symbols, table.repeat(3, axis=0), np.zeros(20), np.arange(1000) % 3)
    assert np.array_equal(one[0], many[0]) and np.array_equal(one[1], many[1])


def test_stream_l_holds_rows_l_and_every_s_th_after_it():
    generator = np.random.default_rng(1)
    table = random_tables(generator, 1, 9)
    symbols = generator.integers(0, 9, (9, 2048)).astype(np.int32)
    words, lengths = encode(symbols, table, np.zeros(9), np.zeros(2048))
    assert len(lengths) == 4
    model = constriction.stream.model.Categorical(table[0] / (1 << PRECISION), perfect=True)
    first = constriction.stream.stack.AnsCoder(words[: lengths[0]])
    assert np.array_equal(first.decode(model, 3 * 2048), symbols[[0, 4, 8]].reshape(-1))
    assert np.array_equal(decode_constriction(words, lengths, table[0], 9, 2048), symbols)


def test_streams_without_entropy_are_not_endless():
    """However few bits: a decoder's time goes by the symbols of its longest stream."""
    tables = table_from_codes(np.array([[0, 191]], dtype=np.uint8))
    m, n = 200, 4096
    symbols = np.zeros((m, n), dtype=np.int32)
    classes = np.zeros(m, np.int64), np.zeros(n, np.int64)
    words, lengths = encode(symbols, tables, *classes)
    assert len(words) <= len(lengths) == -(-m // (STREAM_SYMBOLS_MOST // n))


def test_a_single_symbol_needs_no_words():
    tables = np.full((1, 1), 1 << PRECISION)
    words, lengths = encode(np.zeros((5, 4096), np.int32), tables, np.zeros(5), np.zeros(4096))
    assert words.size == 0 and words.dtype == np.uint32
    assert lengths.tolist() == [0]  # nothing to share among streams


@pytest.mark.parametrize("states", TRELLIS_NEXT)
def test_the_trellis_walks_each_row_by_parity(states):
    generator = np.random.default_rng(states)
    symbols = generator.integers(-2, 3, (7, 50)).astype(np.int32)
    expected = []
    for row in symbols:
        state = 0
        for symbol in row:
            expected.append(TRELLIS_QUANTIZER[states][state])
            state = TRELLIS_NEXT[states][state][symbol & 1]
    quantizers = trellis_quantizers(torch.from_numpy(symbols), states)
    assert quantizers.reshape(-1).tolist() == expected
    assert set(expected) == {0, 1}


@pytest.mark.parametrize("states", [0, 4])
@pytest.mark.parametrize("wanted", [2.0, 3.5])
def test_streams_cost_what_their_tables_say(states, wanted):
    """The words of a matrix of 250,000 weights: less than 0.6 % above the symbols' cost."""
    m, n, size, classes = 432, 579, 65, 12
    generator = np.random.default_rng(2)
    rows, columns = generator.integers(0, 5, m), generator.integers(0, 8, n)
    spread = 2 ** (wanted - 2.3) * 2.0 ** (0.25 * (rows[:, None] + columns - 5))
    symbols = np.rint(generator.standard_normal((m, n)) * spread).clip(-32, 32).astype(np.int32)
    symbols += 32
    index, second = rows[:, None] + columns, None
    if states:
        second = trellis_quantizers(torch.from_numpy(symbols), states).numpy()
        index = 2 * index + second
    counts = np.zeros((classes * (2 if states else 1), size), dtype=np.int64)
    np.add.at(counts, (index, symbols), 1)
    tables = table_from_codes(codes_from_counts(counts))
    cost = float(bits(tables)[index, symbols].astype(np.float64).sum())
    words, lengths = encode(symbols, tables, rows, columns, second)
    assert cost / symbols.size == pytest.approx(wanted, abs=0.3)
    assert cost < 32 * len(words) < 1.006 * cost
    assert (32 * len(words) - cost) / len(lengths) < 40
    share = counts / counts.sum(axis=1, keepdims=True).clip(1)
    entropy = -(counts * np.log2(np.where(share > 0, share, 1))).sum()
    assert 32 * len(words) < 1.006 * entropy


def test_symbols_and_classes_outside_the_tables_are_refused():
    tables = np.full((2, 2), 1 << 23)
    symbols, zeros = np.zeros((2, 3), np.int32), np.zeros(3)
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match="symbol"):
            encode(symbols + wrong, tables, np.zeros(2), zeros)
    for rows, columns in (([0, 2], zeros), ([0, 1], [0, 0, 1]), ([0, -1], zeros)):
        with pytest.raises(ValueError, match="classes"):
            encode(symbols, tables, np.array(rows), np.array(columns))
    with pytest.raises(ValueError, match="classes"):
        encode(symbols, tables, np.array([0, 1]), zeros, symbols > 0)
