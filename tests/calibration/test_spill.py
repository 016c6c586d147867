"""Tensors come back as they were, from memory and from the file."""

from pathlib import Path

import pytest
import torch

from cerwu_gpu.calibration.spill import TensorStore


@pytest.mark.parametrize("memory", [0, 100, 1 << 20])
def test_tensors_come_back_in_any_order(memory: int, tmp_path: Path) -> None:
    tensors = [torch.randn(3, 5), torch.randn(7).bfloat16(), torch.arange(4), torch.randn(2, 2)]
    store = TensorStore(tmp_path, memory)
    for tensor in tensors:
        store.append(tensor)
    assert len(store) == len(tensors)
    for index in (3, 0, 2, 1, 0):
        assert store[index].dtype == tensors[index].dtype
        assert torch.equal(store[index], tensors[index])
    assert list(tmp_path.iterdir()) == []
