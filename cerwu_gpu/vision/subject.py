"""A plain module as the subject of a sweep: calibrated once, measured from files."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cerwu_gpu.attempt import plain_bytes
from cerwu_gpu.baselines.nncodec import pass_through_nncodec
from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.container.reader import open_directory
from cerwu_gpu.files import digest
from cerwu_gpu.progress import Clock
from cerwu_gpu.sweep.points import Point
from cerwu_gpu.sweep.subject import Outcome, Quality
from cerwu_gpu.vision.calibration import CalibratedLayers
from cerwu_gpu.vision.layers import find_weights
from cerwu_gpu.vision.loading import fill
from cerwu_gpu.vision.norms import FollowingNorms, following_norms
from cerwu_gpu.vision.running import Batch, held
from cerwu_gpu.vision.sensitivity import Loss, output_sensitivities
from cerwu_gpu.vision.writing import Writing, nothing_more

UNLIMITED = 1 << 62
"""All Hessians are kept for all points."""


class PlainModule:
    """A module, judged by a function of one's own (sweep.subject.Subject).

    Its Hessians and sensitivities are kept in memory; the original weights are put back before
    each point.
    """

    quality: Quality = "accuracy"

    def __init__(
        self,
        name: str,
        module: nn.Module,
        batches: Iterable[Batch],
        evaluate: Callable[[nn.Module], float],
        *,
        base: CompressionConfig,
        data: str,
        loss: Loss | None = None,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> None:
        """Nothing is run yet.

        Args:
            name: what tables and pictures call it.
            batches: inputs that calibrate (running.Batch).
            evaluate: accuracy (a share of 1) of the module as it is.
            base: which weights, and the seed; points' settings of these are ignored.
            data: says in words what `evaluate` looks at; part of the identity.
            loss: what the sensitivities are of (sensitivity.py).

        Raises:
            CerwuError: there is nothing to compress, or no batch.
        """
        self.name = name
        self._module = module.eval()
        self._batches = held(batches)
        self._evaluate = evaluate
        self._base = base
        self._data = data
        self._loss = loss
        self._device = torch.device(device)
        self._progress = progress
        chosen = find_weights(module, base.include, base.exclude).chosen
        self._layouts = {layout.name: layout for layout in chosen}
        self._originals = copy.deepcopy(module.state_dict())
        self._blocks: CalibratedLayers | None = None
        self._gradients: Mapping[tuple[str, int], Tensor] | None = None
        self._norms: FollowingNorms | None = None

    def identity(self) -> Mapping[str, str]:
        """Digests of the weights and calibration inputs, and what is evaluated."""
        return {
            "model": digest(self._originals.values()),
            "calibration inputs": digest(
                tensor for batch in self._batches for tensor in _tensors(batch)
            ),
            "evaluation": self._data,
            "weights": f"{self._base.include} {self._base.exclude}",
        }

    def original(self) -> float:
        """Accuracy of the module as it came."""
        self._module.load_state_dict(self._originals)
        return self._evaluate(self._module)

    def run(self, point: Point, folder: Path) -> Outcome:
        """Compress, load and evaluate; NNCodec points leave no files.

        Raises:
            CerwuError: a subclass that says what is wrong.
        """
        self._module.load_state_dict(self._originals)
        if point.qp is not None:
            return self._run_nncodec(point.qp, point.dependent)
        clock = Clock()
        gradients, blocks, norms = self._prepared(point.config, clock)
        with Writing(
            self._module, self._layouts, folder, False, False, nothing_more, clock, norms
        ) as writing:
            attempt = writing.attempt(blocks, gradients, point.config)
            attempt.writer.publish()
        with clock.stage("decode"):
            self._module.load_state_dict(self._originals)
            fill(self._module, open_directory(folder), device=torch.device("cpu"))
        with clock.stage("evaluate"):
            quality = self._evaluate(self._module)
        return Outcome(
            bits_per_weight=attempt.bits_per_weight,
            directory_bytes=attempt.directory_bytes,
            original_bytes=plain_bytes(self._module, {}),
            quality=quality,
            seconds=clock.seconds,
            events=attempt.events(self._layouts),
        )

    def _prepared(
        self, config: CompressionConfig, clock: Clock
    ) -> tuple[Mapping[tuple[str, int], Tensor], CalibratedLayers, FollowingNorms | None]:
        """Sensitivities and batch norms where `config` needs them, and the layers, made once."""
        layouts = tuple(self._layouts.values())
        if config.needs_gradients and self._gradients is None:
            with clock.stage("sensitivity"):
                self._gradients = output_sensitivities(
                    self._module,
                    layouts,
                    self._batches,
                    loss=self._loss,
                    device=self._device,
                    seed=self._base.seed,
                    progress=self._progress,
                )
        if self._blocks is None:
            with clock.stage("calibrate"):
                self._blocks = CalibratedLayers(
                    self._module,
                    layouts,
                    self._batches,
                    device=self._device,
                    hessian_bytes=UNLIMITED,
                    seed=self._base.seed,
                    progress=self._progress,
                )
        if config.correct_drift and self._norms is None:
            with clock.stage("calibrate"):
                self._norms = following_norms(
                    self._module,
                    self._batches,
                    config,
                    device=self._device,
                    progress=self._progress,
                )
        gradients = self._gradients if config.needs_gradients else None
        norms = self._norms if config.correct_drift else None
        return gradients or {}, self._blocks, norms

    def _run_nncodec(self, qp: int, dependent: bool) -> Outcome:
        clock = Clock()
        parameters = {name: self._module.get_parameter(name) for name in self._layouts}
        with clock.stage("quantize"):
            coded_bytes = pass_through_nncodec(parameters, qp=qp, dependent=dependent)
        with clock.stage("evaluate"):
            quality = self._evaluate(self._module)
        return Outcome(
            bits_per_weight=8 * coded_bytes / sum(p.numel() for p in parameters.values()),
            directory_bytes=coded_bytes + plain_bytes(self._module, self._layouts),
            original_bytes=plain_bytes(self._module, {}),
            quality=quality,
            seconds=clock.seconds,
        )


def _tensors(batch: Batch) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
        return
    for value in batch.values() if isinstance(batch, Mapping) else batch:
        if isinstance(value, Tensor):
            yield value
