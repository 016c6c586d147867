"""Stored matrices whose fields contradict each other are refused by name, and never decoded."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cerwu_gpu.coded import CodedMatrix, Reconstruction, check
from cerwu_gpu.errors import CorruptionError, FormatError
from tests.reference.test_ans import flip, random_matrix


@pytest.fixture(scope="module")
def matrix() -> CodedMatrix:
    _, matrix = random_matrix(np.random.default_rng(8), 10, 1500, 9, 3, 4)
    return replace(matrix, name="blocks.1.weight")


def rule(**changes: object) -> Reconstruction:
    codes = torch.zeros(1, dtype=torch.int16)
    good = Reconstruction(-4, 9, torch.empty(0, dtype=torch.int32), codes, codes)
    return replace(good, **changes)  # type: ignore[arg-type]


DAMAGES = {
    "words of zeros": (lambda x: {"words": torch.zeros_like(x.words)}, "last word of a stream"),
    "words missing": (lambda x: {"words": x.words[1:]}, "number of words"),
    "words in two axes": (lambda x: {"words": x.words[None]}, "number of streams"),
    "negative length": (
        lambda x: {"lengths": torch.tensor([-1, *x.lengths[1:-1], x.lengths[0] + 1])},
        "number of words",
    ),
    "enormous lengths": (lambda x: {"lengths": x.lengths << 62}, "number of words"),
    "no streams": (lambda x: {"lengths": x.lengths[:0]}, "number of streams"),
    "more streams than rows": (
        lambda x: {"lengths": x.lengths.new_full((11,), 0), "words": x.words[:0]},
        "number of streams",
    ),
    "table not whole": (lambda x: {"tables": flip(x.tables, (0, 0), 1)}, "tables"),
    "negative probability": (
        lambda x: {"tables": flip(flip(x.tables, (0, 0), -(1 << 24)), (0, 1), 1 << 24)},
        "tables",
    ),
    "enormous probability": (
        lambda x: {"tables": flip(flip(x.tables, (0, 0), 1 << 62), (0, 1), -(1 << 62))},
        "tables",
    ),
    "odd number of tables": (lambda x: {"tables": x.tables[:5]}, "number of tables"),
    "no tables": (lambda x: {"tables": x.tables[:0]}, "number of tables"),
    "class too large": (lambda x: {"row_class": flip(x.row_class, 0, 50)}, "classes"),
    "enormous classes": (
        lambda x: {
            "row_class": x.row_class.to(torch.int64) + (1 << 62),
            "column_class": x.column_class.to(torch.int64) + (1 << 62),
        },
        "classes",
    ),
    "class missing": (lambda x: {"column_class": x.column_class[1:]}, "number of classes"),
    "class negative": (
        lambda x: {"column_class": x.column_class.to(torch.int64) - 1},
        "classes",
    ),
    "parity of 2": (lambda x: {"parity": x.parity + 1}, "parity"),
    "parity missing": (lambda x: {"parity": x.parity[1:]}, "parity"),
    "5 states": (lambda x: {"states": 5}, "shape or number of states"),
    "another width": (lambda x: {"shape": (10, 1499)}, "number of classes"),
    "no rows": (lambda x: {"shape": (0, 1500)}, "shape or number of states"),
}


def test_a_matrix_as_it_was_stored_is_accepted(matrix: CodedMatrix) -> None:
    check(matrix, rule())


@pytest.mark.parametrize(("damage", "field"), DAMAGES.values(), ids=DAMAGES)
def test_a_contradiction_is_refused_by_name(damage, field: str, matrix: CodedMatrix) -> None:
    with pytest.raises(CorruptionError) as error:
        check(replace(matrix, **damage(matrix)))
    assert str(error.value) == f"blocks.1.weight: wrong {field}: get the file again."


def test_an_alphabet_beyond_the_format_is_refused(matrix: CodedMatrix) -> None:
    """More symbols than a field of a decoder's lookup can hold."""
    tables = torch.ones(2, (1 << 16) + 1, dtype=torch.int64)
    tables[:, 0] = (1 << 24) - (1 << 16)
    parity = torch.zeros_like(tables[0])
    with pytest.raises(CorruptionError, match=r"^blocks\.1\.weight: wrong number of tables"):
        check(replace(matrix, tables=tables, parity=parity))


def test_a_stream_longer_than_a_reader_takes_is_refused(matrix: CodedMatrix) -> None:
    long = replace(
        matrix,
        shape=(1 << 17, 1500),
        row_class=torch.zeros(1 << 17, dtype=torch.int64),
    )
    with pytest.raises(FormatError, match=r"^blocks\.1\.weight: 3 streams are too few"):
        check(replace(long, lengths=torch.tensor([len(matrix.words), 0, 0])))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"escapes": torch.tensor([3, 1 << 30], dtype=torch.int32)}, "an escaped integer is too"),
        ({"escapes": torch.tensor([-(1 << 30)], dtype=torch.int32)}, "an escaped integer is too"),
        ({"grid": torch.zeros(5)}, "side data and manifest disagree on grid"),
        ({"grid": torch.zeros(9)}, "its grid is not finite and ascending"),
        ({"grid": torch.arange(9) / torch.zeros(9)}, "its grid is not finite and ascending"),
    ],
)
def test_what_symbols_stand_for_is_checked(changes, sentence: str, matrix: CodedMatrix) -> None:
    with pytest.raises(FormatError, match=rf"^blocks\.1\.weight: {sentence}"):
        check(matrix, rule(**changes))
