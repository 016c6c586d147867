"""From a module to a directory and back: plain modules and transformers' image classifiers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

import cerwu_gpu
from cerwu_gpu import Batches, CompressionConfig, ConfigError, FormatError, ModelError
from cerwu_gpu.config import MaxSize
from cerwu_gpu.container.reader import inventory, open_directory
from tests.configs import compress_flat, configured
from tests.models.toys import FAMILIES, images, toy


class Plain(nn.Module):
    """Convolutions of every kind, odd sizes, a shared layer, and things that are left alone."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.mix = nn.Conv2d(width, width, 5, padding="same", padding_mode="reflect")
        self.grouped = nn.Conv2d(width, 2 * width, 3, groups=width, padding=2, dilation=2)
        self.wide = nn.Conv2d(2 * width, 12, 3, groups=2)
        self.again = nn.Linear(12, 12)
        self.tied = nn.Linear(12, 12)
        self.tied.weight = self.again.weight
        self.head = nn.Linear(12, 5)
        self.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.wide(self.grouped(torch.relu(self.mix(x)))).mean(dim=(2, 3))
        x = self.tied(torch.relu(self.again(torch.relu(self.again(x)))))
        return self.head(torch.relu(x)) * self.scale.to(x.dtype)


def compress(model: Any, output: Path, batches: Any = None, **settings: Any) -> Any:
    options = {k: settings.pop(k) for k in ("loss", "overwrite") if k in settings}
    config = configured(**{"lmbda": 1e-3, "sensitivity": "relative", **settings})
    return compress_flat(
        model, output, batches=batches or images(), config=config, progress=False, **options
    )


@pytest.mark.parametrize("quantizer", ["scalar", "trellis8"])
def test_a_plain_module_comes_back(quantizer: str, tmp_path: Path) -> None:
    module = Plain()
    module.train()
    report = compress(
        module, tmp_path / "out", quantizer=quantizer, include=("*", "*grouped*"), block_size=32
    )
    assert module.training
    fresh = Plain().eval()
    assert cerwu_gpu.load_compressed(tmp_path / "out", into=fresh) is fresh
    for (name, ours), theirs in zip(
        module.state_dict().items(), fresh.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert fresh.tied.weight is fresh.again.weight
    x = images()[0]
    assert torch.equal(module.eval()(x), fresh(x))
    names = [layer.name for layer in report.layers]
    assert set(names) == {
        f"{n}.weight" for n in ("stem", "mix", "grouped", "wide", "again", "head")
    }
    assert names.count("grouped.weight") == 7
    assert names.count("wide.weight") == 2
    assert not report.events
    assert all(0 < layer.relative_loss < 0.5 for layer in report.layers)
    assert not (tmp_path / "out" / "config.json").exists()
    size = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert report.directory_bytes == size == inventory(tmp_path / "out").total_bytes
    cerwu_gpu.verify(tmp_path / "out")


def test_the_file_holds_convolutions_in_their_own_shapes(tmp_path: Path) -> None:
    compress(Plain(), tmp_path / "out", include=("*", "grouped"))
    shapes = {n: e.shape for n, e in open_directory(tmp_path / "out").compressed().items()}
    assert shapes["stem.weight"] == (7, 3, 3, 3)
    assert shapes["grouped.weight"] == (14, 1, 3, 3)
    assert shapes["wide.weight"] == (12, 7, 3, 3)
    assert "tied.weight" not in shapes


def test_tiny_groups_are_left_alone_and_named(tmp_path: Path) -> None:
    report = compress(Plain(), tmp_path / "out")
    assert "grouped.weight" not in {layer.name for layer in report.layers}
    assert [event.partition(":")[0] for event in report.events] == ["grouped.weight"]
    with pytest.raises(ModelError, match=r"grouped\.weight.*\(strict\)"):
        compress(Plain(), tmp_path / "other", strict=True)


def half() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.Flatten(), nn.Linear(128, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    module = half().to(dtype)
    compress(module, tmp_path / "out", [batch.to(dtype) for batch in images()])
    fresh = half().to(dtype)
    cerwu_gpu.load_compressed(tmp_path / "out", into=fresh)
    assert torch.equal(fresh[0].weight, module[0].weight)
    assert torch.equal(fresh[2].weight, module[2].weight)


def test_channels_last_weights_come_back(tmp_path: Path) -> None:
    module = Plain().to(memory_format=torch.channels_last)
    compress(module, tmp_path / "out", include=("*", "grouped"))
    fresh = Plain()
    cerwu_gpu.load_compressed(tmp_path / "out", into=fresh)
    assert torch.equal(fresh.wide.weight, module.wide.weight)
    assert torch.equal(fresh.grouped.weight, module.grouped.weight)


def test_more_loss_for_fewer_bits(tmp_path: Path) -> None:
    found = [
        compress(Plain(), tmp_path / str(lmbda), lmbda=lmbda, quantizer=q)
        for lmbda, q in ((1e-4, "scalar"), (1e-2, "scalar"))
    ]
    fine, coarse = found
    assert coarse.bits_per_weight < fine.bits_per_weight
    assert sum(x.relative_loss for x in coarse.layers) > sum(x.relative_loss for x in fine.layers)


@pytest.mark.parametrize("method", ["cerwu", "cerwu-gamma0", "optq", "rtn"])
def test_uniform_grids(method: Any, tmp_path: Path) -> None:
    report = compress(
        Plain(), tmp_path / "out", method=method, levels=15, sensitivity="none", lmbda=1e-3
    )
    fresh = Plain()
    cerwu_gpu.load_compressed(tmp_path / "out", into=fresh)
    assert len(fresh.mix.weight[0].unique()) <= 15
    assert report.bits_per_weight < 8


def test_a_rate_and_a_size_are_reached(tmp_path: Path) -> None:
    report = compress(nn.Linear(32, 256), tmp_path / "out", bits=4.0)
    assert report.bits_per_weight == pytest.approx(4.0, abs=0.02)
    limit = report.directory_bytes + 300
    sized = compress(nn.Linear(32, 256), tmp_path / "sized", max_size=limit)
    assert 0.97 * limit < sized.directory_bytes <= limit


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.aside = nn.Linear(32, 4), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_layers_that_are_not_used_are_named(tmp_path: Path) -> None:
    report = compress(Unused(), tmp_path / "out")
    assert report.events == (
        "aside.weight: no calibration token reached it: quantized against H = I",
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_image_classifiers_come_back(family: str, tmp_path: Path) -> None:
    model = toy(family)
    batches = [{"pixel_values": batch} for batch in images()]
    report = compress(model, tmp_path / "out", batches)
    loaded = cerwu_gpu.load_compressed(tmp_path / "out")
    assert type(loaded) is type(model)
    for (name, ours), (other, theirs) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs), name
    pixels = images()[0]
    assert torch.equal(model(pixels).logits, loaded(pixels).logits)
    transformers_own = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(transformers_own(pixels).logits, loaded(pixels).logits)
    quantized = {layer.name for layer in report.layers}
    left = {event.partition(":")[0] for event in report.events}
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    assert quantized | left == matrices
    assert all("conv_3x3" in name or "dwconv" in name for name in left)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "cerwu", "format": 1}


def test_an_image_classifier_comes_from_a_directory(tmp_path: Path) -> None:
    model = toy("resnet")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text("{ }\n")
    compress(tmp_path / "model", tmp_path / "out")
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == "{}"
    compress(model, tmp_path / "again")
    ours, theirs = (cerwu_gpu.load_compressed(tmp_path / name) for name in ("out", "again"))
    assert torch.equal(ours(images()[0]).logits, theirs(images()[0]).logits)
    cerwu_gpu.decompress(tmp_path / "out", tmp_path / "plain")
    plain = type(model).from_pretrained(tmp_path / "plain")
    assert torch.equal(plain(images()[0]).logits, ours(images()[0]).logits)


def test_modules_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    compress(Plain(), tmp_path / "out")
    other = Plain(width=5)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(FormatError, match=r"stem\.weight as \[7, 3, 3, 3\], Plain as"):
        cerwu_gpu.load_compressed(tmp_path / "out", into=other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    more = Plain()
    more.extra = nn.Linear(2, 2)
    with pytest.raises(FormatError, match=r"lacks extra\.weight of Plain"):
        cerwu_gpu.load_compressed(tmp_path / "out", into=more)
    fewer = Plain()
    del fewer.head
    with pytest.raises(FormatError, match=r"has head\.(weight|bias), which Plain lacks"):
        cerwu_gpu.load_compressed(tmp_path / "out", into=fewer)
    with pytest.raises(FormatError, match=r" as float(32|64), Plain as bfloat16"):
        cerwu_gpu.load_compressed(tmp_path / "out", into=Plain().bfloat16())
    with pytest.raises(FormatError, match=r"no config\.json: fill a module"):
        cerwu_gpu.load_compressed(tmp_path / "out")
    with pytest.raises(ConfigError, match="dtype and resident"):
        cerwu_gpu.load_compressed(tmp_path / "out", into=Plain(), dtype=torch.float16)  # type: ignore[call-overload]


def test_wrong_calls_are_one_sentence(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(ModelError, match="Plain is no language model: give batches"):
        compress_flat(Plain(), output)
    with pytest.raises(ModelError, match="ResNetForImageClassification is no language model"):
        compress_flat(toy("resnet"), output)
    with pytest.raises(ConfigError, match="keep_head is for language models"):
        compress(Plain(), output, keep_head=True)
    with pytest.raises(ModelError, match="ReLU has no linear layer"):
        compress(nn.ReLU(), output)
    with pytest.raises(ModelError, match="not as its configuration says"):
        model = toy("resnet")
        cerwu_gpu.fold_batch_norm(model, images()[0])
        compress(model, output)
    with pytest.raises(ModelError, match="does not exist"):
        compress(tmp_path / "nowhere", output)
    assert not output.exists()


def test_hessians_are_those_of_the_module_and_its_inputs(tmp_path: Path) -> None:
    """The key has what is no weight: activations, names of inputs, the seed; a loss is in none."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.first(x) + self.second(y)

    def pair() -> Pair:
        torch.manual_seed(3)
        return Pair()

    def layers(batch: Any, cache: Path | None, module: Any = None, **settings: Any) -> Any:
        report = compress_flat(
            module or pair(),
            tmp_path / "out",
            batches=[batch],
            config=configured(lmbda=1e-3, **{"sensitivity": "none", **settings}),
            hessian_cache=cache,
            overwrite=True,
            progress=False,
            **({"loss": loss} if settings.get("sensitivity") == "row" else {}),
        )
        return [layer.relative_loss for layer in report.layers]

    def loss(output: Tensor, batch: Any) -> Tensor:
        return output[:, 0].square() * scale

    scale = 1.0
    a, b = torch.randn(16, 8), 30 * torch.randn(16, 8)
    cache = tmp_path / "cache"
    layers({"x": a, "y": b}, cache)
    assert layers({"x": b, "y": a}, cache) == layers({"x": b, "y": a}, None)
    first = layers({"x": a, "y": b}, cache, sensitivity="row")
    scale = 1e6
    assert layers({"x": a, "y": b}, cache, sensitivity="row") != first
    for activation in (nn.ReLU(), nn.Tanh()):
        torch.manual_seed(4)
        network = nn.Sequential(nn.Linear(8, 8), activation, nn.Linear(8, 8))
        torch.manual_seed(4)
        again = nn.Sequential(nn.Linear(8, 8), activation, nn.Linear(8, 8))
        assert layers(a, cache, network) == layers(a, None, again)


def test_a_module_that_changes_its_inputs_leaves_the_batches_alone(tmp_path: Path) -> None:
    module = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8))
    batch = torch.randn(4, 8)
    before = batch.clone()
    compress(module, tmp_path / "out", [batch])
    assert torch.equal(batch, before)


def test_a_size_that_headers_seem_to_exceed_is_reached(tmp_path: Path) -> None:
    free = compress(toy("mobilenet_v2"), tmp_path / "free", include=("*",), lmbda=1e-3)
    limit = MaxSize(free.directory_bytes)
    config = CompressionConfig(calibration=Batches(inputs=images()), target=limit)
    report = cerwu_gpu.compress(
        toy("mobilenet_v2"), tmp_path / "out", config=config, progress=False
    )
    assert report.directory_bytes <= free.directory_bytes


def test_a_classifier_is_known_by_its_type_where_no_architecture_is_named(tmp_path: Path) -> None:
    toy("resnet").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    content = json.loads(file.read_text())
    del content["architectures"]
    file.write_text(json.dumps(content))
    report = compress(tmp_path / "model", tmp_path / "out")
    assert report.bits_per_weight > 0
