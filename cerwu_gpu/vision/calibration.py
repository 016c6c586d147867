"""The layers of a module with the statistics of their inputs, as many at a time as memory allows.

The whole module is run: nothing has to be known about how it calls its layers. Each lot of layers
costs one more run over the batches.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cerwu_gpu.blocks import InputStatistics, Matrix
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.progress import tracked
from cerwu_gpu.vision.layers import matrix_of, store_matrix
from cerwu_gpu.vision.moments import Moments, lots, trace
from cerwu_gpu.vision.running import Batch, Runner, evaluating, samples

HESSIAN_BYTES = 1 << 30
"""Hessians of this many bytes are accumulated in one run over the batches, at least one."""


class LayerLot:
    """Some layers in work, their statistics known (pipeline.Block).

    Matrices are read from the module when they are asked for, so a lot can be used again after the
    original weights were put back.
    """

    def __init__(
        self,
        name: str,
        layouts: Sequence[WeightLayout],
        parameters: Mapping[str, Tensor],
        leader: Mapping[str, str],
        statistics: dict[str, InputStatistics],
        device: torch.device,
    ) -> None:
        self.name = name
        self._layouts = {layout.name: layout for layout in layouts}
        self._parameters = parameters
        self._leader = leader
        self._statistics = statistics
        self._device = device

    def matrices(self) -> list[Matrix]:
        """All matrices, float32 on the device, copies that later changes do not touch."""
        return [
            Matrix(
                name=name,
                part=part,
                weight=matrix_of(layout, self._parameters[name], part).to(
                    self._device, torch.float32, copy=True
                ),
                input=self._input(layout).key(part),
            )
            for name, layout in self._layouts.items()
            for part in range(layout.parts)
        ]

    def _input(self, layout: WeightLayout) -> WeightLayout:
        return self._layouts[self._leader.get(layout.name, layout.name)]

    def statistics(self) -> dict[str, InputStatistics]:
        return self._statistics

    def pass_by(self) -> None:
        """The whole module is run again for the next lot: there is no stream to take past."""

    def replace(self, name: str, part: int, weight: Tensor) -> None:
        store_matrix(self._layouts[name], self._parameters[name], part, weight)


class CalibratedLayers:
    """The layers in lots, as called (pipeline.Blocks); layers that are never used come last.

    Lots after the first are calibrated with the original weights as well, whatever was replaced
    meanwhile; with `sequential` every distinct input is a lot of its own and comes from the layers
    that are replaced already.
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
            layouts: the weights to compress (layers.find_weights).
            batches: the inputs of the whole module (running.held).
            device: where the module runs and matrices are worked on.
            hessian_bytes: how much the Hessians of one lot may take.
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
        self._sequential = sequential
        self._seed = seed
        self._progress = progress
        self._parameters: dict[str, Tensor] = {
            name: module.get_parameter(name) for name in self._layouts
        }
        with self._runner() as runner:
            self._trace = trace(runner, batches[0])
        self._lots = lots(self._layouts, self._trace, hessian_bytes, single=sequential)
        self._only: LayerLot | None = None
        self._originals: dict[str, Tensor] = {}
        if len(self._lots) > 1 and not sequential:
            self._originals = {n: p.detach().clone() for n, p in self._parameters.items()}

    @property
    def unused(self) -> list[str]:
        """Weights that the module never applied, in its own order."""
        return [name for name in self._layouts if name not in self._trace.leader]

    def __len__(self) -> int:
        return len(self._lots) + bool(self.unused)

    def __iter__(self) -> Iterator[LayerLot]:
        if len(self._lots) == 1 and not self._sequential:
            # Nothing was replaced before it: the same for every later round.
            self._only = self._only or self._calibrated(self._lots[0])
            yield self._only
        else:
            for leaders in self._lots:
                with self._as_they_were():
                    lot = self._calibrated(leaders)
                yield lot
        if self.unused:
            yield self._unused_lot()

    def _calibrated(self, leaders: Sequence[str]) -> LayerLot:
        moments = Moments(
            list(self._layouts.values()),
            self._trace,
            leaders,
            expected=sum(map(samples, self._batches)),
            seed=self._seed,
        )
        shown = f"{len(leaders)} inputs"
        with self._runner() as runner:
            for batch in tracked(
                self._batches, what=shown, unit="batch", shown=self._progress, leave=False
            ):
                moments.add(runner, batch)
        names = [name for name, leader in self._trace.leader.items() if leader in leaders]
        return self._lot(leaders[0], names, moments.statistics())

    def _unused_lot(self) -> LayerLot:
        statistics = {}
        for name in self.unused:
            layout = self._layouts[name]
            n = layout.matrix_shape[1]
            for part in range(layout.parts):
                none = InputStatistics(torch.zeros(n, n, device=self._device), 0)
                statistics[layout.key(part)] = none
        return self._lot("unused", self.unused, statistics)

    def _lot(
        self, name: str, names: Sequence[str], statistics: dict[str, InputStatistics]
    ) -> LayerLot:
        layouts = [self._layouts[own] for own in names]
        return LayerLot(
            name, layouts, self._parameters, self._trace.leader, statistics, self._device
        )

    @contextmanager
    def _runner(self) -> Iterator[Runner]:
        with evaluating(self._module, self._device):
            yield Runner(self._module, self._parameters, self._device)

    @contextmanager
    def _as_they_were(self) -> Iterator[None]:
        """Have the original weights in the module for a while."""
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
