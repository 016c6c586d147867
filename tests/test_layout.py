"""WeightLayout: where the matrices of a parameter lie."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cerwu_gpu.layout import WeightLayout


@st.composite
def layouts(draw):
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    parts, several = draw(st.integers(1, 4)), draw(st.booleans())
    shape = (parts, rows, columns) if several else (rows, columns)
    return WeightLayout("w", shape, parts if several else 1, draw(st.booleans()))


@given(layouts())
def test_what_is_stored_comes_back_and_the_matrices_cover_the_parameter(layout):
    parameter = torch.zeros(layout.shape, dtype=torch.int64)
    rows, columns = layout.matrix_shape
    for part in range(layout.parts):
        numbers = torch.arange(1, rows * columns + 1) + 100 * part
        layout.store(parameter, part, numbers.view(rows, columns))
    for part in range(layout.parts):
        expected = torch.arange(1, rows * columns + 1) + 100 * part
        assert torch.equal(layout.matrix(parameter, part).reshape(-1), expected)
    assert bool((parameter > 0).all())


def test_a_transposed_layout_is_inputs_by_outputs():
    layout = WeightLayout("c_fc.weight", (2, 3), 1, True)
    parameter = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert layout.matrix_shape == (3, 2)
    assert torch.equal(layout.matrix(parameter, 0), torch.tensor([[1, 4], [2, 5], [3, 6]]))


def test_storing_rounds_once_to_the_parameters_dtype_and_works_on_parameters():
    layout = WeightLayout("w", (2, 2), 1, False)
    parameter = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    matrix = torch.tensor([[1 / 3, 1e-3], [-2 / 3, 1e6]])
    layout.store(parameter, 0, matrix)
    assert torch.equal(parameter.detach(), matrix.to(torch.bfloat16))


def test_a_key_names_the_expert_only_where_there_are_several():
    assert WeightLayout("w", (2, 2), 1, False).key(0) == "w"
    assert WeightLayout("w", (3, 2, 2), 3, False).key(2) == "w[2]"


@pytest.mark.parametrize("part", [-1, 3])
def test_a_part_that_is_not_there_is_refused(part):
    layout = WeightLayout("w", (3, 2, 2), 3, False)
    with pytest.raises(IndexError, match="w has 3 matrices"):
        layout.matrix(torch.zeros(3, 2, 2), part)


@pytest.mark.parametrize(("shape", "parts"), [((4,), 1), ((2, 2), 2), ((3, 2, 2), 2)])
def test_a_shape_that_does_not_hold_the_parts_is_refused(shape, parts):
    with pytest.raises(ValueError, match="does not hold"):
        WeightLayout("w", shape, parts, False)


def test_a_matrix_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\) does not fit \(3, 2\)"):
        WeightLayout("w", (3, 2), 1, False).store(torch.zeros(3, 2), 0, torch.zeros(2, 3))
