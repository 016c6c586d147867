"""The decoding kernel and the compiled decoder against their definition: the same symbols, weights
and complaints.

Streams are made short, since the interpreter takes milliseconds for every step of a lane.
"""

import importlib
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cerwu_gpu.coded import CodedMatrix, Reconstruction, check
from cerwu_gpu.coding import streams
from cerwu_gpu.coding.tables import codes_from_counts, table_from_codes
from cerwu_gpu.errors import CorruptionError
from cerwu_gpu.kernels import ans
from cerwu_gpu.reference import ans as reference
from cerwu_gpu.reference import weights
from cerwu_gpu.reference.dequantize import trellis_quantizers
from cerwu_gpu.spec import CODE_MAX
from tests.conftest import GPU
from tests.kernels.memory import guarded
from tests.reference.test_ans import coded, flip, random_matrix

STREAM_SYMBOLS = 12
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.fixture(autouse=True)
def short_streams(monkeypatch):
    monkeypatch.setattr(streams, "STREAM_SYMBOLS", STREAM_SYMBOLS)
    monkeypatch.setattr(streams, "STREAM_BITS", 1)


@pytest.fixture(params=["kernels", "compiled"], autouse=True)
def form(request, monkeypatch):
    """Every test of this file is run on both forms: `ans` is the module of one of them."""
    module = importlib.import_module(f"cerwu_gpu.{request.param}.ans")
    monkeypatch.setattr(sys.modules[__name__], "ans", module)
    return request.param


@pytest.fixture
def device(form):
    """The GPU where there is one and the form can use it, else the CPU."""
    return torch.device("cuda" if GPU and form == "kernels" else "cpu")


def placed(thing, device):
    """The same dataclass with its tensors on `device`."""
    fields = {k: v.to(device) for k, v in vars(thing).items() if torch.is_tensor(v)}
    return replace(thing, **fields)


def random_batch(generator, kinds):
    """Symbols, and matrices (m, n, alphabet, classes, trellis states)."""
    made = [random_matrix(generator, *kind, sharp=i % 2 == 1) for i, kind in enumerate(kinds)]
    return [torch.from_numpy(symbols) for symbols, _ in made], [matrix for _, matrix in made]


KINDS = [
    (77, 9, 17, 6, 4),  # more lanes than a program has, some with a row more than others
    (3, 31, 300, 1, 0),  # an alphabet of two bytes
    (70, 12, 5, 7, 8),  # a row a stream
    (1, 1, 1, 1, 0),  # one symbol, no words
    (5, 4, 2, 2, 0),  # less than a stream
]


@pytest.mark.usefixtures("poisoned_empty")
def test_matrices_of_all_kinds_are_decoded_in_one_launch(device):
    expected, batch = random_batch(np.random.default_rng(0), KINDS)
    decoded = ans.decode([placed(matrix, device) for matrix in batch])
    for symbols, ours, theirs in zip(expected, decoded, reference.decode(batch), strict=True):
        assert ours.dtype == torch.int32
        assert torch.equal(ours.cpu(), symbols)
        assert torch.equal(theirs, symbols)


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_any_batch_comes_back(data):
    draw = data.draw
    kinds = [
        (
            draw(st.integers(1, 40)),
            draw(st.integers(1, 8)),
            draw(st.integers(1, 300)),
            draw(st.sampled_from([1, 2, 7])),
            draw(st.sampled_from([0, 4, 8])),
        )
        for _ in range(draw(st.integers(1, 3)))
    ]
    expected, batch = random_batch(np.random.default_rng(draw(st.integers(0, 2**32 - 1))), kinds)
    assert all(map(torch.equal, ans.decode(batch), expected))


@pytest.mark.parametrize("size", [2, 60000])
def test_tables_with_one_likely_symbol_are_searched_exactly(size, device):
    """Thousands of symbols share a bucket of the lookup, on either side of a wide interval."""
    codes = np.full((2, size), CODE_MAX, dtype=np.uint8)
    codes[0, size // 2] = codes[1, 0] = 0
    symbols = np.random.default_rng(0).integers(0, size, (40, 6)).astype(np.int32)
    columns = np.arange(6) % 2 == 1
    matrix = coded(symbols, table_from_codes(codes), np.zeros(40, np.uint8), columns)
    assert torch.equal(ans.decode([placed(matrix, device)])[0].cpu(), torch.from_numpy(symbols))


def test_words_may_come_as_any_integers():
    (expected,), (matrix,) = random_batch(np.random.default_rng(3), [(9, 8, 9, 3, 0)])
    unsigned = replace(matrix, words=matrix.words.view(torch.uint32))
    wide = replace(matrix, words=matrix.words.to(torch.int64) & 0xFFFFFFFF)
    assert all(torch.equal(one, expected) for one in ans.decode([unsigned, wide, matrix]))


def test_no_matrix_decodes_to_nothing():
    assert ans.decode([]) == []
    assert ans.decode_weights([], [], torch.float32) == []


@dataclass(frozen=True)
class Stored:
    """A matrix, what its symbols stand for, and its dequantization by the definition."""

    coded: CodedMatrix
    rule: Reconstruction


def stored(generator, m, n, states=0, escapes=0, values=None, steps=(-2000, 500)):
    """A matrix of integers with some far outside of an alphabet of 9, or of a list's positions."""
    size = 9 if values is None else len(values)
    lowest = -4 if values is None else 0
    integers = generator.integers(0, size, (m, n)) + lowest
    if escapes:
        far = generator.integers(-(1 << 31), 1 << 31, (m, n))
        integers = np.where(generator.random((m, n)) < 0.1, far, integers)
    indices = integers - lowest
    outside = (indices < 0) | (indices >= size)
    indices[outside] = size + (integers[outside] & (escapes - 1) if escapes else 0)
    parity = [*((np.arange(size) + lowest) & 1), *range(escapes)]
    row_class, column_class = generator.integers(0, 2, m), generator.integers(0, 2, n)
    counts = generator.integers(1, 100, (3 * (2 if states else 1), size + escapes))
    tables = table_from_codes(codes_from_counts(counts))
    second = None
    if states:
        second = trellis_quantizers(torch.from_numpy(integers), states).numpy()
    words, lengths = streams.encode(
        indices.astype(np.int32), tables, row_class, column_class, second
    )
    matrix = CodedMatrix(
        name=f"{m} x {n}",
        shape=(m, n),
        words=torch.from_numpy(words.view(np.int32)),
        lengths=torch.from_numpy(lengths.astype(np.int64)),
        tables=torch.from_numpy(tables),
        row_class=torch.from_numpy(row_class),
        column_class=torch.from_numpy(column_class),
        states=states,
        parity=torch.tensor(parity),
    )
    rule = Reconstruction(
        lowest=lowest,
        size=size,
        escapes=torch.from_numpy(integers[outside].astype(np.int32)),
        column_step=torch.from_numpy(generator.integers(*steps, n).astype(np.int16)),
        row_scale=torch.from_numpy(generator.integers(-99, 99, m).astype(np.int16)),
        grid=None if values is None else torch.tensor(values, dtype=torch.float32),
    )
    return Stored(matrix, rule)


def fused(batch, dtype, device):
    return ans.decode_weights(
        [placed(each.coded, device) for each in batch],
        [placed(each.rule, device) for each in batch],
        dtype,
    )


def assert_same_weights(batch, dtype, device):
    expected = weights.decode_weights([x.coded for x in batch], [x.rule for x in batch], dtype)
    for ours, theirs in zip(fused(batch, dtype, device), expected, strict=True):
        assert ours.dtype == dtype
        bits, wanted = (x.cpu().contiguous().view(BITS[dtype]) for x in (ours, theirs))
        assert torch.equal(bits, wanted)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_weights_are_the_definition_s_to_the_last_bit(dtype, device):
    """Integers, a list, trellises; some with escapes, and the values of those far and near."""
    generator = np.random.default_rng(5)
    batch = [
        stored(generator, 37, 5, states=4, escapes=2),
        stored(generator, 9, 7, escapes=1),
        stored(generator, 6, 9, values=[-1.5, -1e-3, 0.1, 1 / 3, 7.7]),
        stored(generator, 11, 6, states=8, escapes=2),
        stored(generator, 4, 6, states=8),
    ]
    assert sum(len(each.rule.escapes) for each in batch) > 20
    assert_same_weights(batch, dtype, device)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_weights_without_any_escape_symbol(dtype, device):
    """Steps of all sizes, from weights that vanish in the dtype to some that exceed it."""
    generator = np.random.default_rng(6)
    assert_same_weights([stored(generator, 9, 30, steps=(-32768, 32767))], dtype, device)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_weights_go_where_they_are_wanted(dtype, device):
    """Into a contiguous matrix, a transposed one, and a part of a larger one."""
    generator = np.random.default_rng(13)
    batch = [stored(generator, 7, 5, states=s, escapes=1 + (s > 0)) for s in (0, 4, 8)]
    larger = torch.zeros(9, 12, dtype=dtype, device=device)
    out = [
        torch.empty(7, 5, dtype=dtype, device=device),
        torch.empty(5, 7, dtype=dtype, device=device).t(),
        larger[1:8, 2:12:2],
    ]
    coded = [placed(each.coded, device) for each in batch]
    rules = [placed(each.rule, device) for each in batch]
    decoded = ans.decode_weights(coded, rules, dtype, out)
    expected = weights.decode_weights([x.coded for x in batch], [x.rule for x in batch], dtype)
    for to, ours, theirs in zip(out, decoded, expected, strict=True):
        assert ours.data_ptr() == to.data_ptr()
        assert torch.equal(to.cpu(), theirs)
    assert int((larger != 0).sum()) <= 35, "something was written beside the matrix"


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 40),
    columns=st.integers(1, 9),
    states=st.sampled_from([0, 4, 8]),
    escapes=st.booleans(),
    dtype=st.sampled_from(sorted(BITS, key=str)),
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_any_weights_are_the_definition_s(seed, rows, columns, states, escapes, dtype, device):
    generator = np.random.default_rng(seed)
    number = (2 if states else 1) if escapes else 0
    steps = (-32768, 32767) if seed % 2 else (-3000, 500)
    batch = [stored(generator, rows, columns, states=states, escapes=number, steps=steps)]
    assert_same_weights(batch, dtype, device)


@pytest.mark.parametrize("stored_values", [0, 1, 20], ids="{} values".format)
def test_escapes_and_their_values_must_agree(stored_values, form, device):
    """The matrix is named, and nothing is written past the places that there are."""
    generator = np.random.default_rng(7)
    good, bad = (stored(generator, 5, 12, escapes=1) for _ in range(2))
    values = torch.zeros(stored_values, dtype=torch.int32)
    bad = Stored(replace(bad.coded, name="bad"), replace(bad.rule, escapes=values))
    complaint = pytest.raises(CorruptionError, match=r"^bad: escapes are missing")
    if form == "compiled":
        with complaint:
            fused([good, bad], torch.float32, device)
        return
    with guarded(ans, "decode_kernel") as accesses, complaint:
        fused([good, bad], torch.float32, device)
    assert accesses.outside == 0


@pytest.mark.parametrize("states", [4, 8])
def test_an_escape_of_the_wrong_parity_is_reported_as_by_the_reference(states, device):
    """An escape symbol says whether its integer is even: a value that is not was tampered with."""
    generator = np.random.default_rng(11)
    batch = [stored(generator, 5, 9, escapes=1), stored(generator, 6, 7, states=states, escapes=2)]
    coded, rule = batch[1].coded, batch[1].rule
    bad = Stored(replace(coded, name="bad"), replace(rule, escapes=flip(rule.escapes, 2, 1)))
    with pytest.raises(CorruptionError, match=r"^bad: an escape has the wrong parity") as theirs:
        weights.decode_weights([bad.coded], [bad.rule], torch.float32)
    with pytest.raises(CorruptionError) as ours:
        fused([batch[0], bad], torch.float32, device)
    assert str(ours.value) == str(theirs.value)


DAMAGES = {
    "a bit of every word": lambda x: {"words": x.words ^ 64},
    "a word": lambda x: {"words": flip(x.words, 1, 1)},
    "words of ones": lambda x: {"words": torch.full_like(x.words, -1)},
    "words of other streams": lambda x: {"words": x.words.roll(7)},
    "a word too many": lambda x: {"lengths": flip(flip(x.lengths, 0, 1), 1, -1)},
    "another trellis": lambda x: {"states": 8},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_reported_as_by_the_reference(damage, device):
    _, (good, other) = random_batch(np.random.default_rng(8), [(4, 12, 9, 3, 0), (10, 12, 9, 3, 4)])
    bad = replace(other, name="blocks.1.weight", **damage(other))
    check(bad)
    with pytest.raises(CorruptionError, match=r"^blocks\.1\.weight: ") as theirs:
        reference.decode([good, bad])
    with pytest.raises(CorruptionError) as ours:
        ans.decode([placed(matrix, device) for matrix in (good, bad, good)])
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("seed", range(8))
def test_random_words_are_never_read_past_their_ends(seed, form):
    """They end in an error; every address on the way lies inside the kernel's own tensors."""
    generator = np.random.default_rng(seed)
    _, matrix = random_matrix(generator, 40, 10, 6, 3, int(generator.choice([0, 4, 8])))
    count = int(generator.integers(0, 120))
    cuts = np.sort(generator.integers(0, count + 1, 33))
    lengths = torch.from_numpy(np.diff(cuts, prepend=0, append=count))
    words = torch.from_numpy(generator.integers(1, 2**32, count))
    broken = replace(matrix, words=words, lengths=lengths)
    if form == "compiled":  # tests/kernels/test_bounds.py has the addresses
        with pytest.raises(CorruptionError, match="end"):
            ans.decode([broken])
        return
    with guarded(ans, "decode_kernel") as accesses, pytest.raises(CorruptionError, match="end"):
        ans.decode([broken])
    assert accesses.count > 100
    assert accesses.outside == 0


@pytest.mark.gpu
def test_a_large_batch_on_a_gpu(monkeypatch, device):
    monkeypatch.setattr(streams, "STREAM_SYMBOLS", 4096)
    generator = np.random.default_rng(9)
    kinds = [(1000, 777, 33, 8, 4), (300, 2048, 255, 16, 0), (65, 577, 9, 3, 8)]
    expected, batch = random_batch(generator, kinds)
    decoded = ans.decode([placed(matrix, device) for matrix in batch])
    assert all(torch.equal(a.cpu(), b) for a, b in zip(decoded, expected, strict=True))
    large = [stored(generator, 513, 1000, states=8, escapes=2), stored(generator, 99, 4097)]
    assert_same_weights(large, torch.bfloat16, device)
