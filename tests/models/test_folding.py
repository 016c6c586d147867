"""Batch norms fold into the layer in front of them, and only where that changes nothing."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import cerwu_gpu
from cerwu_gpu import fold_batch_norm
from tests.configs import compress_flat, configured
from tests.models.toys import images, toy

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def trained(module: nn.Module) -> nn.Module:
    """With statistics and factors in its batch norms as training leaves them."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(child.running_var, 0.5, 2.0)
            nn.init.normal_(child.running_mean)
            nn.init.uniform_(child.weight, 0.5, 2.0)
            nn.init.normal_(child.bias)
    return module.eval()


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.grouped_norm = nn.BatchNorm2d(4)
        self.twice, self.twice_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.also_read, self.also_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.linear, self.linear_norm = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.alone = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.conv(x)))
        x = self.grouped_norm(self.grouped(x))
        x = self.twice_norm(self.twice(x)) + self.twice_norm(self.twice(x + 1))
        y = self.also_read(x)
        x = (self.also_norm(y) + y).mean(dim=(2, 3))
        return self.alone(torch.tanh(self.linear_norm(self.linear(x))))


def test_outputs_stay_equal_and_only_sole_users_are_folded() -> None:
    module, (x, other) = trained(Network()), images()
    expected = module(other)
    assert fold_batch_norm(module, x) == ["norm", "grouped_norm", "linear_norm"]
    torch.testing.assert_close(module(other), expected, **TOLERANCE)
    assert isinstance(module.norm, nn.Identity)
    assert isinstance(module.twice_norm, nn.BatchNorm2d)
    assert module.conv.bias is not None
    assert fold_batch_norm(module, x) == []


def test_a_transformers_resnet_folds_whole() -> None:
    model, (x, other) = toy("resnet"), images()
    expected = model(other).logits
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert sorted(fold_batch_norm(model, {"pixel_values": x})) == sorted(norms)
    torch.testing.assert_close(model(other).logits, expected, **TOLERANCE)


def test_the_mode_stays() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    assert fold_batch_norm(module, images()[0]) == ["1"]
    assert all(child.training for child in module.children() if not isinstance(child, nn.Identity))


def test_a_folded_module_is_compressed_and_filled(tmp_path: Path) -> None:
    module, (x, other) = trained(Network()), images()
    fold_batch_norm(module, x)
    config = configured(lmbda=1e-3, sensitivity="relative")
    compress_flat(module, tmp_path / "out", batches=[x], config=config, progress=False)
    fresh = Network().eval()
    fold_batch_norm(fresh, x)
    cerwu_gpu.load_compressed(tmp_path / "out", into=fresh)
    assert torch.equal(fresh(other), module(other))
