"""A device that is not there is refused by name."""

import pytest
import torch

from cerwu_gpu import ConfigError
from cerwu_gpu.device import find_device


def test_without_a_wish_it_is_the_gpu_where_there_is_one(device: torch.device) -> None:
    assert find_device(None) == device


@pytest.mark.parametrize("name", ["cpu", torch.device("cpu")])
def test_a_device_that_is_there_is_taken(name: str | torch.device) -> None:
    assert find_device(name) == torch.device("cpu")


@pytest.mark.parametrize("name", ["no-such-device", "cuda:99", "", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}'"):
        find_device(name)
