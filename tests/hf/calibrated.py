"""Short ways to the calibration of a language model, for tests of its parts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cerwu_gpu import CompressionConfig
from cerwu_gpu.calibration import blockwise
from cerwu_gpu.calibration.blockwise import Drift
from cerwu_gpu.calibration.cache import CachedBlocks, CachingBlocks, HessianCache
from cerwu_gpu.compression.blocks import Blocks
from cerwu_gpu.hf.causal_lm import CausalLM, select
from cerwu_gpu.hf.models import LoadedModel, is_conv1d
from cerwu_gpu.hf.text import CalibrationTokens
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.models import selection
from cerwu_gpu.quantize.sensitivity import Sensitivities

find_weights = select


def find_blocks(model: PreTrainedModel) -> list[tuple[str, Any]]:
    return selection.find_blocks(model, is_conv1d)


class Chosen(CausalLM):
    """A language model whose weights are chosen by their layouts."""

    def __init__(
        self, layouts: Sequence[WeightLayout], model: PreTrainedModel, device: Any
    ) -> None:
        self._chosen = {layout.name: layout for layout in layouts}
        place = model.device if device is None else torch.device(device)
        super().__init__(LoadedModel(model, None, None), CompressionConfig(), device=place)

    def select(self, config: CompressionConfig) -> None:
        self.layouts = self._chosen


def adapter_of(
    model: PreTrainedModel,
    layouts: Sequence[WeightLayout],
    tokens: Tensor | None = None,
    device: Any = None,
) -> CausalLM:
    """The adapter of a model, with these weights and tokens."""
    adapter = Chosen(layouts, model, device)
    if tokens is not None:
        adapter.take(CalibrationTokens(tokens, tokens[:0]))
    return adapter


def calibrated_blocks(
    model: PreTrainedModel,
    layouts: Sequence[WeightLayout],
    tokens: Tensor,
    *,
    device: Any = None,
    batch_size: int = 8,
    sequential: bool = False,
    correct_drift: bool = False,
) -> blockwise.CalibratedBlocks:
    """The blocks of a model with the statistics of their inputs."""
    backbone, _ = adapter_of(model, layouts, tokens, device).backbone()
    return blockwise.CalibratedBlocks(
        backbone,
        tokens,
        device=device,
        batch_size=batch_size,
        drift=Drift(sequential, correct_drift),
    )


def cached_blocks(
    model: PreTrainedModel,
    layouts: Sequence[WeightLayout],
    cache: HessianCache,
    calibrate: Callable[[], Blocks],
    count: int | None = None,
) -> CachedBlocks | CachingBlocks:
    """Blocks from the cache where it is complete, else those of `calibrate`, written to it."""
    backbone, outer = adapter_of(model, layouts).backbone()
    number = len(backbone.blocks) + len(outer) if count is None else count
    if cache.complete(number):
        return CachedBlocks(model, layouts, cache, number, model.device)
    return CachingBlocks(calibrate(), cache, model.device)


def sensitivities_of(
    model: PreTrainedModel,
    layouts: Sequence[WeightLayout],
    tokens: Tensor,
    *,
    device: Any = None,
    batch_size: int = 8,
) -> Sensitivities:
    """Sensitivities of a model's weights, hessian additions and all."""
    return adapter_of(model, layouts, None, device).backward(tokens, batch_size)


def output_sensitivities(*arguments: Any, **options: Any) -> dict[tuple[str, int], Tensor]:
    """The squared gradients alone."""
    return dict(sensitivities_of(*arguments, **options).squared_gradients)
