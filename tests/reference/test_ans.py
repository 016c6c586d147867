"""The lane-parallel decoder: exact, equal to constriction's own, and never out of bounds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cerwu_gpu.coded import CodedMatrix
from cerwu_gpu.coding.streams import encode
from cerwu_gpu.coding.tables import codes_from_counts, table_from_codes
from cerwu_gpu.errors import CorruptionError
from cerwu_gpu.reference import ans
from cerwu_gpu.reference.ans import SECOND, decode, decode_marked
from cerwu_gpu.reference.dequantize import trellis_quantizers
from cerwu_gpu.spec import CODE_MAX, TRELLIS_NEXT
from scripts.benchmark_coding import decode_constriction


def coded(symbols, tables, row_class, column_class, states=0, name="weight"):
    """The matrix as stored; odd alphabet indices have odd parity."""
    parity = (np.arange(tables.shape[1]) % 2).astype(np.int8)
    second = None
    if states:
        second = trellis_quantizers(torch.from_numpy(symbols), states).numpy()
    words, lengths = encode(symbols, tables, row_class, column_class, second)
    return CodedMatrix(
        name=name,
        shape=symbols.shape,
        words=torch.from_numpy(words.view(np.int32)),
        lengths=torch.from_numpy(lengths.astype(np.int64)),
        tables=torch.from_numpy(tables),
        row_class=torch.from_numpy(row_class),
        column_class=torch.from_numpy(column_class),
        states=states,
        parity=torch.from_numpy(parity),
    )


def random_matrix(generator, m, n, size, tables, states, sharp=False):
    """Symbols drawn from some of the tables themselves, or any symbols at all (`sharp`)."""
    row_class = generator.integers(0, (tables + 1) // 2, m).astype(np.uint8)
    column_class = generator.integers(0, tables // 2 + 1, n).astype(np.uint8)
    count = tables * (2 if states else 1)
    if sharp:
        table = table_from_codes(
            generator.integers(0, CODE_MAX + 1, (count, size)).astype(np.uint8)
        )
        symbols = generator.integers(0, size, (m, n))
    else:
        share = generator.dirichlet(np.full(size, 0.5), count)
        table = table_from_codes(codes_from_counts((1e4 * share).astype(np.int64)))
        symbols = generator.choice(size, (m, n), p=table[0] / table[0].sum())
    symbols = symbols.astype(np.int32)
    return symbols, coded(symbols, table, row_class, column_class, states)


SHAPES = [
    pytest.param(1, 1, id="one element"),
    pytest.param(1, 9001, id="one row, one stream"),
    pytest.param(5001, 1, id="one column"),
    pytest.param(3, 5000, id="a row a stream"),
    pytest.param(7, 2048, id="streams of 3 and 2 rows"),
    pytest.param(65, 577, id="odd"),
    pytest.param(10, 31, id="less than a stream"),
]


@pytest.mark.parametrize("states", [0, *TRELLIS_NEXT])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_every_shape_comes_back(m, n, states):
    generator = np.random.default_rng(m * n + states)
    symbols, matrix = random_matrix(generator, m, n, 17, 6, states)
    (decoded,) = decode([matrix])
    assert decoded.dtype == torch.int32
    assert decoded.shape == (m, n)
    assert decoded.T.is_contiguous()
    assert torch.equal(decoded, torch.from_numpy(symbols))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_batch_comes_back(data):
    """Matrices of all kinds at once, whose lanes begin rows and end at different steps."""
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    symbols, batch = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        one, matrix = random_matrix(
            generator,
            m=data.draw(st.integers(1, 30)),
            n=data.draw(st.integers(1, 300)),
            size=data.draw(st.integers(1, 300)),
            tables=data.draw(st.sampled_from([1, 2, 7, 32])),
            states=data.draw(st.sampled_from([0, *TRELLIS_NEXT])),
            sharp=data.draw(st.booleans()),
        )
        symbols.append(torch.from_numpy(one))
        batch.append(matrix)
    decoded = decode(batch)
    assert all(map(torch.equal, decoded, symbols))


@pytest.mark.parametrize("states", [0, *TRELLIS_NEXT])
def test_marks_are_the_quantizers_of_the_trellis(states):
    generator = np.random.default_rng(4)
    batch = [random_matrix(generator, 33, 70, 9, 5, s)[1] for s in (states, 4, 0)]
    for matrix, plain, marked in zip(batch, decode(batch), decode_marked(batch), strict=True):
        quantizer = trellis_quantizers(plain, matrix.states) if matrix.states else 0 * plain
        assert torch.equal(marked, plain + SECOND * quantizer.to(torch.int32))
    assert int(quantizer.sum()) == 0 < int(trellis_quantizers(decode(batch)[1], 4).sum())


def test_no_matrix_decodes_to_nothing():
    assert decode([]) == []


def test_words_may_come_as_any_integers():
    symbols, matrix = random_matrix(np.random.default_rng(3), 5, 500, 9, 3, 0)
    expected = torch.from_numpy(symbols)
    unsigned = replace(matrix, words=matrix.words.view(torch.uint32))
    wide = replace(matrix, words=matrix.words.to(torch.int64) & 0xFFFFFFFF)
    assert all(torch.equal(one, expected) for one in decode([unsigned, wide, matrix]))


@pytest.mark.parametrize("size", [2, 3, 33, 255, 2049])
def test_constriction_decodes_the_same(size):
    generator = np.random.default_rng(size)
    symbols, matrix = random_matrix(generator, 9, 2500, size, 1, 0)
    words = matrix.words.numpy().view(np.uint32)
    lengths = matrix.lengths.numpy().astype(np.uint32)
    theirs = decode_constriction(words, lengths, matrix.tables[0].numpy(), 9, 2500)
    (ours,) = decode([matrix])
    assert torch.equal(ours, torch.from_numpy(theirs))
    assert np.array_equal(theirs, symbols)


@pytest.mark.parametrize("size", [2, 300, 60000])
def test_tables_with_one_likely_symbol_are_searched_exactly(size):
    """Thousands of symbols share a bucket of the lookup, on either side of a wide interval."""
    codes = np.full((2, size), CODE_MAX, dtype=np.uint8)
    codes[0, size // 2] = codes[1, 0] = 0
    symbols = np.random.default_rng(0).integers(0, size, (11, 800)).astype(np.int32)
    matrix = coded(
        symbols, table_from_codes(codes), np.zeros(11, np.uint8), np.arange(800) % 2 == 1
    )
    assert torch.equal(decode([matrix])[0], torch.from_numpy(symbols))


def test_lanes_are_shared_out_without_a_change(monkeypatch):
    """Loops cut a matrix's lanes anywhere; so do threads."""
    generator = np.random.default_rng(5)
    made = [random_matrix(generator, m, 2048, 5, 3, 4) for m in (11, 30, 7)]
    expected = [torch.from_numpy(symbols) for symbols, _ in made]
    monkeypatch.setattr(ans, "_LANES_MIN", 4)
    for most, threads in ((7, 1), (1000, 3), (9, 2)):
        monkeypatch.setattr(ans, "_LANES_MAX", most)
        decoded = decode([matrix for _, matrix in made], threads=threads)
        assert all(map(torch.equal, decoded, expected))


@pytest.mark.usefixtures("poisoned_empty")
def test_every_element_is_written():
    symbols, matrix = random_matrix(np.random.default_rng(6), 13, 1111, 5, 3, 8)
    assert torch.equal(decode([matrix])[0], torch.from_numpy(symbols))


@pytest.mark.gpu
def test_the_decoder_runs_on_any_device(device):
    symbols, matrix = random_matrix(np.random.default_rng(7), 65, 577, 33, 8, 4)
    tensors = {
        name: value.to(device) for name, value in vars(matrix).items() if torch.is_tensor(value)
    }
    assert torch.equal(decode([replace(matrix, **tensors)])[0].cpu(), torch.from_numpy(symbols))


@pytest.fixture(scope="module")
def batch():
    generator = np.random.default_rng(8)
    _, good = random_matrix(generator, 10, 1500, 9, 3, 0)
    _, other = random_matrix(generator, 10, 1500, 9, 3, 4)
    return replace(good, name="good"), replace(other, name="blocks.1.weight")


def flip(tensor, index, change):
    damaged = tensor.clone()
    damaged[index] += change
    return damaged


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda x: {"words": x.words ^ 1}, id="a bit of every word"),
        pytest.param(lambda x: {"words": flip(x.words, 5, 1)}, id="a word"),
        pytest.param(lambda x: {"words": torch.full_like(x.words, -1)}, id="words of ones"),
        pytest.param(
            lambda x: {"lengths": flip(flip(x.lengths, 0, 1), 1, -1)}, id="a word too many"
        ),
    ],
)
def test_damage_is_reported_by_name(batch, damage):
    good, other = batch
    with pytest.raises(CorruptionError, match=r"^blocks\.1\.weight: "):
        decode([good, replace(other, **damage(other))])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_random_words_end_in_an_error_or_in_symbols(seed, streams):
    generator = np.random.default_rng(seed)
    _, matrix = random_matrix(generator, 12, 100, 6, 3, int(generator.choice([0, 4, 8])))
    count = int(generator.integers(0, 90))
    cuts = np.sort(generator.integers(0, count + 1, streams - 1))
    lengths = np.diff(cuts, prepend=0, append=count)
    words = torch.from_numpy(generator.integers(0, 2**32, count))
    broken = replace(matrix, words=words, lengths=torch.from_numpy(lengths))
    try:
        (symbols,) = decode([broken])
    except CorruptionError:
        return
    assert int(symbols.min()) >= 0
    assert int(symbols.max()) < 6
