"""Strips of rows cover a matrix once; sums over them are sums over the matrix."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from cerwu_gpu.quantize.strips import STRIP, mean_squares, strips


@given(rows=st.integers(1, 3000), columns=st.integers(0, 2 * STRIP))
def test_strips_have_every_row_once_and_few_entries(rows: int, columns: int) -> None:
    given = list(strips(rows, columns))
    assert [row for strip in given for row in range(strip.start, strip.stop)] == list(range(rows))
    assert all(strip.stop - strip.start == 1 for strip in given if columns > STRIP)
    assert all((strip.stop - strip.start) * columns <= max(STRIP, columns) for strip in given)


def test_mean_squares_are_those_of_the_whole_matrix_in_float64() -> None:
    x = torch.randn(301, 700, generator=torch.Generator().manual_seed(0))
    assert x.numel() > 3 * STRIP
    square = x.double().square()
    row, column = mean_squares(x)
    torch.testing.assert_close(row, square.mean(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(column, square.mean(0), rtol=1e-14, atol=0)
