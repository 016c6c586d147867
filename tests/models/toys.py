"""Tiny randomly initialised image classifiers of the families that docs/models.md names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    MobileNetV2Config,
    PreTrainedModel,
    ResNetConfig,
    ViTConfig,
)

CLASSES = 7
SIDE = 32

CONFIGS: dict[str, Callable[[], Any]] = {
    "resnet": lambda: ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"
    ),
    "resnet_bottleneck": lambda: ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck"
    ),
    "mobilenet_v2": lambda: MobileNetV2Config(
        image_size=SIDE, depth_multiplier=0.25, expand_ratio=2.0, finegrained_output=False
    ),
    "vit": lambda: ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=SIDE,
        patch_size=8,
    ),
    "convnext": lambda: ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
}
FAMILIES = tuple(CONFIGS)


def toy(family: str) -> PreTrainedModel:
    """A model of this family, float32, in eval mode; the same weights every time."""
    config = CONFIGS[family]()
    config.num_labels = CLASSES
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
            elif name.endswith("running_mean"):
                buffer.normal_()
    return model.eval()


def images(samples: int = 6, batches: int = 2) -> list[Tensor]:
    """float32 [samples, 3, SIDE, SIDE] each, random, the same every time."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(samples, 3, SIDE, SIDE, generator=generator) for _ in range(batches)]


NAMES = ("boat", "gull")
"""Classes of the toy pictures."""


def save_pictures(folder: Path) -> None:
    """Save random images of two classes, eight for training and six for testing."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("test", 6)):
        for number in range(count):
            place = folder / split / NAMES[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(256, (SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(place / f"{number}.png")


def save_classifier(folder: Path) -> None:
    """Save a toy ResNet of seven classes, two of them the pictures', with its image processor."""
    network = toy("resnet")
    network.config.id2label = dict(enumerate([*NAMES, *"abcde"]))
    network.config.label2id = {name: i for i, name in network.config.id2label.items()}
    network.save_pretrained(folder)
    processor = {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": SIDE},
        "crop_pct": 1.0,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
