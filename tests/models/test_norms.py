"""Batch norms that follow the weights in front of them."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import cerwu_gpu
from cerwu_gpu import ConfigError
from cerwu_gpu.models.norms import GAIN_LIMIT, FollowingNorms
from cerwu_gpu.sweep.model import module_subject
from cerwu_gpu.sweep.points import Axes, grid_points
from tests.configs import compress_flat, configured
from tests.models.toys import toy


class Deep(nn.Module):
    """Two convolutions and a linear layer, with a batch norm behind each."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, bias=False) for a, b in ((3, 8), (8, 16)))
            self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in (8, 16))
            self.head = nn.Linear(16, 6)
            self.last = nn.BatchNorm1d(6)
            for norm in (*self.norms, self.last):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2.0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        return self.last(self.head(x.mean(dim=(2, 3))))


def inputs(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, 3, 9, 9, generator=generator) + 0.3 for size in sizes]


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.named_buffers() if "running" in name}


@torch.no_grad()
def test_other_scales_of_channels_are_undone(device: torch.device) -> None:
    module, batches = Deep(), inputs(12, 12)
    wanted = [module(batch) for batch in batches]
    norms = FollowingNorms(module, batches, device=device)
    assert len(norms) == 3
    for layer in (*module.convs, module.head):
        layer.weight *= torch.linspace(0.4, 2.5, len(layer.weight)).view(
            -1, *[1] * (layer.weight.dim() - 1)
        )
    for norm in module.modules():
        if hasattr(norm, "eps"):
            norm.eps = 1e-12
    norms.follow()
    for batch, output in zip(batches, wanted, strict=True):
        assert_close(module(batch), output, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_unchanged_weights_move_nothing_and_statistics_come_back() -> None:
    module, batches = Deep(), inputs(5, 8, 1)
    before = statistics(module)
    norms = FollowingNorms(module, batches)
    norms.follow()
    for name, tensor in statistics(module).items():
        assert_close(tensor, before[name], rtol=1e-5, atol=1e-6)
    module.convs[0].weight.mul_(0.5).add_(0.1)
    norms.follow()
    assert not torch.allclose(module.norms[0].running_var, before["norms.0.running_var"])
    norms.put_back()
    assert all(torch.equal(tensor, before[name]) for name, tensor in statistics(module).items())


@torch.no_grad()
def test_the_first_norm_gets_what_the_formula_says_of_all_batches_together() -> None:
    module, batches = Deep(), inputs(7, 3, 4)
    conv, norm = module.convs[0], module.norms[0]
    mu, sigma2 = norm.running_mean.double(), norm.running_var.double()
    norms = FollowingNorms(module, batches)
    x = torch.cat(batches)
    was = conv(x).double()
    conv.weight.copy_((8 * conv.weight).round() / 8)
    now = conv(x).double()
    norms.follow()
    axes = (0, 2, 3)
    gain = now.var(dim=axes, correction=0) / was.var(dim=axes, correction=0)
    mean = now.mean(dim=axes) - (was.mean(dim=axes) - mu) * gain.sqrt()
    assert_close(norm.running_var.double(), sigma2 * gain, rtol=1e-4, atol=1e-5)
    assert_close(norm.running_mean.double(), mean, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_channels_that_vanish_or_appear_stay_finite() -> None:
    module, batches = Deep(), inputs(6)
    module.convs[0].weight[0] = 0
    before = statistics(module)
    norms = FollowingNorms(module, batches)
    module.convs[0].weight[0] = 1.0
    module.convs[0].weight[1] = 0
    module.convs[0].weight[2] *= 1e-6
    norms.follow()
    variance, own = module.norms[0].running_var, before["norms.0.running_var"]
    assert_close(variance[:2], own[:2])
    assert_close(variance[2], own[2] / GAIN_LIMIT)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in statistics(module).values())


@torch.no_grad()
def test_norms_that_are_used_twice_or_have_no_statistics_are_left_alone() -> None:
    shared = nn.BatchNorm2d(3)
    free = nn.BatchNorm2d(3, track_running_stats=False)
    module = nn.Sequential(nn.Conv2d(3, 3, 1), shared, nn.Conv2d(3, 3, 1), shared, free).eval()
    norms = FollowingNorms(module, inputs(4, 4))
    assert len(norms) == 0
    module[0].weight.mul_(3)
    norms.follow()
    assert torch.equal(shared.running_var, torch.ones(3))


def compressed(module: nn.Module, output: Path, **settings: Any) -> nn.Module:
    config = configured(**{"lmbda": 1e-3, "sensitivity": "relative", **settings})
    batches = inputs(8, 8)
    compress_flat(module, output, batches=batches, config=config, progress=False)
    loaded = cerwu_gpu.load_compressed(output, into=Deep())
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    return module


@pytest.mark.parametrize("target", [{}, {"bits": 2.0}])
def test_what_is_compressed_has_norms_that_follow(target: dict[str, float], tmp_path: Path) -> None:
    module = compressed(Deep(), tmp_path / "out", include=("convs.*",), **target)
    expected = Deep()
    norms = FollowingNorms(expected, inputs(8, 8))
    for ours, theirs in zip(expected.convs, module.convs, strict=True):
        ours.load_state_dict(theirs.state_dict())
    norms.follow()
    for name, tensor in statistics(module).items():
        assert torch.equal(tensor, expected.state_dict()[name])
    assert not torch.equal(module.norms[0].running_var, Deep().norms[0].running_var)


@pytest.mark.parametrize(
    "settings", [{"correct_drift": False}, {"levels": 8}, {"sequential": True}]
)
def test_norms_stay_as_they_are_where_drift_is_not_corrected(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    module = compressed(Deep(), tmp_path / "out", include=("convs.*",), **settings)
    before = statistics(Deep())
    assert all(torch.equal(tensor, before[name]) for name, tensor in statistics(module).items())


def test_without_a_norm_there_is_nothing_to_ask_for(tmp_path: Path) -> None:
    model, batches = toy("vit"), [torch.randn(4, 3, 32, 32)]
    config = configured(lmbda=1e-3, sensitivity="relative", correct_drift=True)
    with pytest.raises(ConfigError, match="this one has none with stored statistics"):
        compress_flat(model, tmp_path / "out", batches=batches, config=config, progress=False)
    assert not (tmp_path / "out").exists()


def test_points_of_a_sweep_with_and_without_do_not_touch_each_other(tmp_path: Path) -> None:
    module = Deep()
    seen: list[dict[str, Tensor]] = []

    def evaluate(now: nn.Module) -> float:
        seen.append(statistics(now))
        return 1.0

    base = configured(include=("convs.*",))
    subject = module_subject(
        "deep",
        module,
        inputs(8),
        evaluate,
        base=base,
        data="none",
        hessian_cache=tmp_path / "hessians",
    )
    axes = Axes(
        systems=("waterfilled",), drifts=(False, True), sensitivities=("relative",), lmbdas=(1e-3,)
    )
    (ignore, correct) = grid_points(axes, base)
    for number, point in enumerate((ignore, correct, ignore, correct)):
        subject.run(point, tmp_path / str(number))
    same = [all(torch.equal(a[n], b[n]) for n in a) for a, b in pairwise(seen)]
    assert same == [False, False, False]
    assert all(torch.equal(seen[0][n], seen[2][n]) for n in seen[0])
    assert all(torch.equal(seen[1][n], seen[3][n]) for n in seen[1])
    assert all(torch.equal(seen[0][n], tensor) for n, tensor in statistics(Deep()).items())
