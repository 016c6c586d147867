"""Calibration of a module that runs whole, whatever the order in which it calls its layers.

Layers are taken in groups whose Hessians fit into memory; a group costs one run over the batches.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cerwu_gpu.calibration.moments import ModuleMoments, layer_groups, trace
from cerwu_gpu.calibration.running import Batch, Runner, evaluating, samples
from cerwu_gpu.compression.blocks import Block, BlockWeights, InputStatistics, KnownBlock, Matrix
from cerwu_gpu.layout import Label, WeightLayout
from cerwu_gpu.progress import tracked

HESSIAN_BYTES = 1 << 30
"""Maximum bytes of Hessians per run over the batches; at least those of one Hessian."""


class LayerGroup:
    """Layers whose statistics come from one run of the whole module (blocks.Block).

    The module is run when statistics are first asked for.
    """

    def __init__(
        self,
        layers: "CalibratedLayers",
        leaders: Sequence[str],
        weights: BlockWeights,
        inputs: Mapping[Label, str],
    ) -> None:
        self.name = leaders[0]
        self.inputs = inputs
        self._layers = layers
        self._leaders = leaders
        self._weights = weights
        self._statistics: dict[str, InputStatistics] | None = None

    def matrices(self) -> list[Matrix]:
        return self._weights.matrices(self.inputs)

    def statistics(self) -> dict[str, InputStatistics]:
        """Return key -> statistics of that input.

        Raises:
            CalibrationError: an activation is not finite.
        """
        if self._statistics is None:
            self._statistics = self._layers.accumulate(self._leaders)
        return self._statistics

    def propagate(self) -> None:
        """Do nothing: the whole module is run again for the next group."""

    def known(
        self, inputs: Mapping[Label, str], statistics: dict[str, InputStatistics]
    ) -> KnownBlock:
        return KnownBlock(self.name, self._weights, inputs, statistics)

    def replace(self, name: str, part: int, weight: Tensor) -> None:
        self._weights.store(name, part, weight)


class CalibratedLayers:
    """The layers in groups by first use (blocks.Blocks); layers that are never used come last.

    All groups are calibrated with the original weights, whatever was replaced meanwhile; with
    `sequential` each distinct input is a group and comes from the replaced layers before it.
    """

    def __init__(
        self,
        module: nn.Module,
        layouts: Sequence[WeightLayout],
        batches: Sequence[Batch],
        *,
        device: torch.device | str = "cpu",
        hessian_bytes: int = HESSIAN_BYTES,
        sequential: bool = False,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        """Run the first batch, to see which layers are used and in which order.

        Args:
            module: run in eval mode; it is on `device` while it runs.
            layouts: the weights to compress (models.selection).
            batches: the inputs of the whole module (running.materialized).
            device: of the work.
            hessian_bytes: maximum bytes of the Hessians of one group.
            sequential: take each layer's inputs from the replaced layers before it.
            seed: chooses the positions of large feature maps.
            progress: show a bar over the batches on stderr.

        Raises:
            CalibrationError: the module does not take the batches.
        """
        self._module = module
        self._layouts = {layout.name: layout for layout in layouts}
        self._batches = batches
        self._device = torch.device(device)
        self._seed = seed
        self._progress = progress
        self._parameters: dict[str, Tensor] = {
            name: module.get_parameter(name) for name in self._layouts
        }
        with self._runner() as runner:
            self._trace = trace(runner, batches[0])
        self._groups = layer_groups(self._layouts, self._trace, hessian_bytes, single=sequential)
        self._originals: dict[str, Tensor] = {}
        if len(self._groups) > 1 and not sequential:
            self._originals = {n: p.detach().clone() for n, p in self._parameters.items()}

    @property
    def unused(self) -> list[str]:
        """Weights that the module never applied, in its own order."""
        return [name for name in self._layouts if name not in self._trace.leader]

    def __len__(self) -> int:
        return len(self._groups) + bool(self.unused)

    def __iter__(self) -> Iterator[Block]:
        for leaders in self._groups:
            names = [name for name, leader in self._trace.leader.items() if leader in leaders]
            yield LayerGroup(self, leaders, self._weights(names), self._inputs(names))
        if self.unused:
            yield self._unused_layers()

    def accumulate(self, leaders: Sequence[str]) -> dict[str, InputStatistics]:
        """Run all batches and return the statistics of the inputs of these weights."""
        moments = ModuleMoments(
            list(self._layouts.values()),
            self._trace,
            leaders,
            expected=sum(map(samples, self._batches)),
            seed=self._seed,
        )
        what = f"{len(leaders)} inputs"
        with self._original_weights(), self._runner() as runner:
            for batch in tracked(
                self._batches, what=what, unit="batch", shown=self._progress, leave=False
            ):
                moments.add(runner, batch)
        return moments.statistics()

    def _unused_layers(self) -> KnownBlock:
        inputs = self._inputs(self.unused)
        statistics = {}
        for name, part in inputs:
            layout = self._layouts[name]
            n = layout.matrix_shape[1]
            zero = torch.zeros(n, n, device=self._device)
            statistics[layout.key(part)] = InputStatistics(zero, 0)
        return KnownBlock("unused", self._weights(self.unused), inputs, statistics)

    def _weights(self, names: Sequence[str]) -> BlockWeights:
        return BlockWeights(self._module, [self._layouts[name] for name in names], self._device)

    def _inputs(self, names: Sequence[str]) -> dict[Label, str]:
        """Return matrix -> key of its input: that of the weight that is used first on it."""
        return {
            (name, part): self._layouts[self._trace.leader.get(name, name)].key(part)
            for name in names
            for part in range(self._layouts[name].parts)
        }

    @contextmanager
    def _runner(self) -> Iterator[Runner]:
        with evaluating(self._module, self._device):
            yield Runner(self._module, self._parameters, self._device)

    @contextmanager
    def _original_weights(self) -> Iterator[None]:
        """Put the original weights into the module inside the context."""
        replaced = {name: self._parameters[name].detach().clone() for name in self._originals}
        self._fill(self._originals)
        try:
            yield
        finally:
            self._fill(replaced)

    @torch.no_grad()
    def _fill(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            self._parameters[name].copy_(weight)
