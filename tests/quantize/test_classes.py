"""Classes: what a table's number is worth, and when a small matrix does without."""

import pytest
import torch

from cerwu_gpu.quantize.classes import choose_classes, classify


def spread(rows: int, columns: int, octaves: float) -> torch.Tensor:
    """Integers of rows and columns that differ by so many octaves (standard deviation)."""
    generator = torch.Generator().manual_seed(rows)
    x = 3 * torch.randn(rows, columns, generator=generator)
    x *= 2 ** (octaves * torch.randn(rows, 1, generator=generator))
    return x * 2 ** (octaves * torch.randn(columns, generator=generator))


def test_a_small_even_matrix_has_one_table():
    assert choose_classes(spread(16, 24, 0.0)[None]).counts == (1,)


def test_a_large_matrix_has_fine_classes():
    x = spread(400, 400, 0.7)[None]
    chosen, fine = choose_classes(x), classify(x)
    assert torch.equal(chosen.row, fine.row) and torch.equal(chosen.column, fine.column)


@pytest.mark.parametrize("turned", [False, True])
def test_where_only_one_side_differs_only_that_side_is_told(turned: bool):
    x = 3 * torch.randn(64, 200, generator=torch.Generator().manual_seed(1))
    x[::2] *= 16
    chosen = choose_classes((x.t() if turned else x)[None])
    (told,), (other,) = (chosen.column, chosen.row) if turned else (chosen.row, chosen.column)
    assert int(other.max()) == 0
    assert int(told[0]) != int(told[1])


def test_more_tables_to_pay_for_make_coarser_classes():
    x = spread(60, 60, 0.5)[None]
    cheap, dear = choose_classes(x), choose_classes(x, matrices=4, quantizers=2)
    assert dear.counts[0] <= cheap.counts[0]


def test_the_classes_count_the_tables_they_name():
    for octaves in (0.0, 0.4, 1.5):
        chosen = choose_classes(spread(48, 90, octaves)[None])
        assert int(chosen.row.min()) == int(chosen.column.min()) == 0
        assert chosen.counts == (int(chosen.row.max() + chosen.column.max()) + 1,)


def test_stacks_side_by_side_have_the_classes_that_each_would_have_alone():
    x = torch.stack([spread(48, 90, octaves) for octaves in (0.0, 0.4, 1.5)])
    x[1, 3] = 0
    together = choose_classes(x, matrices=2, quantizers=2)
    for number in range(3):
        alone = choose_classes(x[number : number + 1], matrices=2, quantizers=2)
        assert torch.equal(together.row[number], alone.row[0])
        assert torch.equal(together.column[number], alone.column[0])
        assert together.counts[number] == alone.counts[0]
