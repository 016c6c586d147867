"""Histograms and weights of symbols in the compiled forms, equal to the definitions' bit by bit."""

import pytest
import torch

from cerwu_gpu.compiled import counts, dequantize
from cerwu_gpu.reference import counts as reference_counts
from cerwu_gpu.reference import dequantize as reference_dequantize

ALPHABETS = [
    pytest.param(-4, 9, 0, 0, id="bounded"),
    pytest.param(-4, 9, 1, 0, id="one escape"),
    pytest.param(0, 1, 1, 0, id="one symbol"),
    pytest.param(-3, 7, 2, 4, id="4 states"),
    pytest.param(-3, 7, 2, 8, id="8 states"),
    pytest.param(-3, 7, 2, 0, id="both escapes without a trellis"),
]
SHAPES = [(1, 1), (1, 50), (33, 1), (17, 29)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("lowest", "size", "escapes", "states"), ALPHABETS)
def test_every_symbol_is_counted_under_its_table(rows, columns, lowest, size, escapes, states):
    reach = 9 if escapes else 4
    symbols = torch.randint(-reach, reach + 1, (rows, columns), dtype=torch.int32)
    if escapes:
        symbols[0, 0], symbols[-1, -1] = -(2**31) + 2, 2**31 - 1
    classes = torch.randint(0, 3, (rows,)), torch.randint(0, 2, (columns,))
    second = dequantize.trellis_quantizers(symbols, states) if states else None
    alphabet = {"lowest": lowest, "size": size, "escapes": escapes, "second": second}
    counted = counts.symbol_counts(symbols, *classes, tables=4, **alphabet)
    assert torch.equal(
        counted, reference_counts.symbol_counts(symbols, *classes, tables=4, **alphabet)
    )
    assert int(counted.sum()) == rows * columns


@pytest.mark.parametrize("states", [0, 4])
def test_the_matrices_of_a_batch_are_counted_with_columns_of_their_own(states):
    symbols = torch.randint(-4, 5, (12, 7), dtype=torch.int32)
    second = dequantize.trellis_quantizers(symbols, states) if states else None
    row_class, column_class = torch.randint(0, 3, (12,)), torch.randint(0, 2, (3, 7))
    alphabet = {"tables": 4, "lowest": -3, "size": 7, "escapes": 1}
    parts = [slice(first, first + 4) for first in (0, 4, 8)]
    wanted = sum(
        reference_counts.symbol_counts(
            symbols[rows],
            row_class[rows],
            columns,
            second=None if second is None else second[rows],
            **alphabet,
        )
        for rows, columns in zip(parts, column_class, strict=True)
    )
    for form in (counts, reference_counts):
        counted = form.symbol_counts(symbols, row_class, column_class, second=second, **alphabet)
        assert torch.equal(counted, wanted)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("states", [0, 4, 8])
@pytest.mark.parametrize("single", [True, False], ids=["one scale", "a scale a row"])
def test_weights_have_the_definition_s_bits(rows, columns, dtype, states, single):
    symbols = torch.randint(-(2**20), 2**20, (rows, columns), dtype=torch.int32)
    step = torch.randint(-9000, 2000, (columns,), dtype=torch.int16)
    scale = torch.randint(-900, 900, (1 if single else rows,), dtype=torch.int16)
    second = dequantize.trellis_quantizers(symbols, states) if states else None
    if second is not None:
        assert torch.equal(second, reference_dequantize.trellis_quantizers(symbols, states))
    weight = dequantize.dequantize(symbols, step, scale, second=second, dtype=dtype)
    wanted = reference_dequantize.dequantize(symbols, step, scale, second=second, dtype=dtype)
    assert weight.dtype == dtype
    assert torch.equal(weight, wanted)


def test_weights_of_a_list_have_the_definition_s_bits():
    positions = torch.randint(0, 5, (13, 7), dtype=torch.int32)
    grid = torch.tensor([-1.5, -1e-3, 0.1, 1 / 3, 7.7])
    one = torch.tensor([100], dtype=torch.int16)
    scale = torch.randint(-900, 900, (13,), dtype=torch.int16)
    weight = dequantize.dequantize(positions, one, scale, grid=grid)
    assert torch.equal(weight, reference_dequantize.dequantize(positions, one, scale, grid=grid))
