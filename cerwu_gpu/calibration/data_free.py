"""Blocks of a model that is compressed without data: every Hessian is the identity."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial

import torch
from torch import nn

from cerwu_gpu.calibration.running import placed
from cerwu_gpu.compression.blocks import Block, BlockWeights, InputStatistics, KnownBlock
from cerwu_gpu.layout import WeightLayout


class DataFreeBlocks:
    """Parts of a model as blocks with H = I (blocks.Blocks); nothing is run."""

    def __init__(
        self,
        module: nn.Module,
        layouts: Mapping[str, WeightLayout],
        parts: Sequence[tuple[str, nn.Module]],
        device: torch.device,
    ) -> None:
        """Take the model.

        Args:
            layouts: of the weights to compress, by name.
            parts: names and modules that hold these weights, one of which is on `device` at a
                time; a weight belongs to the first that holds it.
        """
        self._module = module
        self._layouts = layouts
        self._parts = parts
        self._device = device

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Block]:
        identities = cache(partial(torch.eye, device=self._device))
        left = dict(self._layouts)
        for name, part in self._parts:
            prefix = f"{name}." if name else ""
            layouts = [left.pop(key) for key in list(left) if key.startswith(prefix)]
            matrices = [(layout, index) for layout in layouts for index in range(layout.parts)]
            inputs = {(layout.name, index): layout.key(index) for layout, index in matrices}
            statistics = {
                layout.key(index): InputStatistics(identities(layout.matrix_shape[1]), tokens=1)
                for layout, index in matrices
            }
            with placed(part, self._device):
                weights = BlockWeights(self._module, layouts, self._device)
                yield KnownBlock(name, weights, inputs, statistics)
