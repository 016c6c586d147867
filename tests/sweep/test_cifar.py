"""The ResNets for CIFAR-10 of scripts/sweep_cifar.py on their real weights and images."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import cerwu_gpu
from cerwu_gpu import CompressionConfig, ConfigError, ModelError
from cerwu_gpu.models.norms import FollowingNorms
from cerwu_gpu.sweep.model import module_subject
from cerwu_gpu.sweep.points import Axes, grid_points
from cerwu_gpu.sweep.run import run_sweep
from tests.configs import compress_flat, configured

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "sweep_cifar.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    before = list(sys.path)
    spec = spec_from_file_location("sweep_cifar", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.mark.parametrize(("name", "layers"), [("resnet20", 20), ("resnet56", 56)])
def test_the_networks_have_their_names_and_sizes(
    name: str, layers: int, script: ModuleType
) -> None:
    module = script.ResNet(script.Network(name).blocks)
    weights = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weights) == layers
    assert module(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_real_weights_classify_and_one_layer_comes_back(
    script: ModuleType, data: Path, tmp_path: Path
) -> None:
    folder = data / "cifar"
    module = script.load_network(folder, script.Network.resnet20)
    images, labels = script.load_images(folder / "test.npz", 200)
    assert script.accuracy(module, images, labels) > 0.75
    calibration, _ = script.load_images(folder / "train2k.npz", 64)
    config = configured(lmbda=1e-6, include=("layer3.0.conv1",), quantizer="trellis8")
    report = compress_flat(
        module, tmp_path / "out", batches=[calibration], config=config, progress=False
    )
    (layer,) = report.layers
    assert layer.shape == (64, 288)
    assert layer.relative_loss < 0.02
    assert layer.bits_per_weight < 4
    fresh = script.load_network(folder, script.Network.resnet20)
    cerwu_gpu.load_compressed(tmp_path / "out", into=fresh)
    assert torch.equal(fresh(images[:20]), module(images[:20]))


def test_a_missing_file_is_one_sentence(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"resnet20-12fca82f\.th cannot be read: check the folder"):
        script.load_network(tmp_path, script.Network.resnet20)


def test_a_sweep_of_a_module_puts_the_originals_back(tmp_path: Path) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)
    )
    x = torch.randn(16, 3, 8, 8)
    labels = module(x).argmax(dim=1)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    subject = module_subject(
        "toy",
        module,
        [x],
        lambda own: float((own(x).argmax(dim=1) == labels).float().mean()),
        base=CompressionConfig(),
        data="its own inputs",
        hessian_cache=tmp_path / "hessians",
    )
    axes = Axes(systems=("waterfilled", "cerwu", "rtn"), lmbdas=(1e-9, 1e-2), levels=(255,))
    rows = run_sweep(subject, grid_points(axes, CompressionConfig()), tmp_path / "sweep")
    assert [row.quality for row in rows if row.label == "rtn"] == [1.0]
    ours = [row for row in rows if row.label == "waterfilled scalar"]
    assert ours[0].quality == 1.0
    assert ours[0].bits_per_weight > ours[1].bits_per_weight
    assert rows[0].original_quality == 1.0
    assert sum(row.seconds["calibrate"] > 0.0 for row in rows) >= 1
    assert subject.original() == 1.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_norms_that_follow_keep_more_of_the_accuracy(script: ModuleType, data: Path) -> None:
    folder = data / "cifar"
    module = script.load_network(folder, script.Network.resnet20)
    images, labels = script.load_images(folder / "test.npz", 1000)
    calibration, _ = script.load_images(folder / "train2k.npz", 500)
    norms = FollowingNorms(module, [calibration])
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                step = layer.weight.abs().amax() / 5
                layer.weight.copy_((layer.weight / step).trunc() * step)
    alone = script.accuracy(module, images, labels)
    norms.follow()
    assert script.accuracy(module, images, labels) > alone + 0.2


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"drift": "follow"}, "drift is 'follow': choose from ignore, correct"),
        ({"lmbda": "1e-6,small"}, "lmbda is '1e-6,small': give numbers"),
        ({"levels": "8.5"}, "levels is '8.5': give numbers"),
    ],
)
def test_lists_of_something_else_are_refused(
    setting: dict[str, str], words: str, script: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        script.main(folder=tmp_path, output=tmp_path / "out", methods="waterfilled", **setting)
    assert not (tmp_path / "out").exists()
