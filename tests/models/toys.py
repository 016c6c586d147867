"""Tiny randomly initialised image classifiers of the families that docs/models.md names."""

from collections.abc import Callable
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
