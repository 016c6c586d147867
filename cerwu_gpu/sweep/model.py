"""A model as the subject of a sweep: its adapter and a measure of its quality."""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from cerwu_gpu.baselines.nncodec import pass_through_nncodec
from cerwu_gpu.calibration.running import Batch
from cerwu_gpu.calibration.sensitivity import Loss
from cerwu_gpu.compression.adapter import HELD_OUT_TEXT, Adapter
from cerwu_gpu.compression.run import Run, directory_bytes, plain_bytes, tensors_bytes
from cerwu_gpu.config import Batches, CompressionConfig
from cerwu_gpu.container.reader import open_directory
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.models.module import ModuleAdapter, fill
from cerwu_gpu.progress import Clock
from cerwu_gpu.sweep.points import Point
from cerwu_gpu.sweep.subject import Outcome, Quality


def shared_hessians(base: CompressionConfig) -> CompressionConfig:
    """Return the settings with Hessians of original inputs, which serve all points.

    Raises:
        ConfigError: `base` asks for Hessians that belong to one setting only.
    """
    if base.drift in ("sequential", "correct"):
        raise ConfigError(f"a sweep keeps Hessians for all points: drop drift {base.drift}.")
    return replace(base, drift="ignore")


@dataclass(frozen=True)
class Measure:
    """Measure of a model's quality.

    Attributes:
        quality: name of the measure.
        evaluate: returns the quality of a model.
        load: loads a compressed directory as a model for `evaluate`.
        description: dependencies of the result, in words; part of a subject's identity.
    """

    quality: Quality
    evaluate: Callable[[nn.Module], float]
    load: Callable[[Path], nn.Module]
    description: Mapping[str, str] = field(default_factory=dict)


class ModelSubject:
    """A model with its calibration data and a measure (Subject).

    It is calibrated once: Hessians and sensitivities of all weights are in the adapter's cache. The
    original weights are restored before each point.
    """

    def __init__(
        self,
        name: str,
        adapter: Adapter,
        measure: Measure,
        base: CompressionConfig,
        original_bytes: int | None = None,
    ) -> None:
        """Take the model; nothing is run yet.

        Args:
            name: of the model in tables and pictures.
            adapter: with all weights that any point compresses, and a Hessian cache.
            base: selection of weights and calibration; the points' settings of these are ignored.
            original_bytes: of the original; default: of the dense weights.
        """
        self.name = name
        self.quality: Quality = measure.quality
        self._adapter = adapter
        self._measure = measure
        self._base = base
        adapter.keep_originals()
        self._original_bytes = original_bytes or plain_bytes(adapter.module, {})
        self._calibrated = False

    def identity(self) -> Mapping[str, str]:
        self._adapter.restore()
        identity = self._adapter.identity()
        identity.pop(HELD_OUT_TEXT, None)  # so that points with a distillation join a table
        return {
            **identity,
            **self._measure.description,
            "weights": f"{self._base.include} {self._base.exclude}",
        }

    def original(self) -> float:
        self._adapter.restore()
        return self._measure.evaluate(self._adapter.module)

    def run(self, point: Point, folder: Path) -> Outcome:
        """Compress, load and evaluate (Subject.run); NNCodec points leave no files."""
        adapter, clock = self._adapter, Clock()
        adapter.restore()
        if point.qp is not None:
            adapter.select(point.config)
            return self._run_nncodec(point.qp, point.dependent)
        self._prepare(point.config, clock)
        adapter.select(point.config)
        with Run(adapter, folder, clock=clock, verify=False) as run:
            attempt = run.attempt(point.config)
            attempt.writer.publish()
        with clock.stage("decode"):
            adapter.restore()
            decoded = self._measure.load(folder)
        with clock.stage("evaluate"):
            quality = self._measure.evaluate(decoded)
        return Outcome(
            bits_per_weight=attempt.bits_per_weight,
            directory_bytes=attempt.directory_bytes,
            original_bytes=self._original_bytes,
            quality=quality,
            seconds=clock.seconds,
            events=(*adapter.events, *attempt.events(adapter.layouts)),
        )

    def _prepare(self, config: CompressionConfig, clock: Clock) -> None:
        """Fill the cache with Hessians, and sensitivities if `config` uses them, for all weights of
        the sweep."""
        self._adapter.select(self._base)
        if not self._calibrated:
            with clock.stage("calibrate"):
                for _ in self._adapter.blocks(self._base, sampling=True):
                    pass  # passing through the blocks writes the cache
            self._calibrated = True
        if config.needs_gradients:
            with clock.stage("sensitivity"):
                self._adapter.sensitivities(config)

    def _run_nncodec(self, qp: int, dependent: bool) -> Outcome:
        adapter, clock = self._adapter, Clock()
        parameters = {name: adapter.module.get_parameter(name) for name in adapter.layouts}
        with clock.stage("quantize"):
            coded_bytes = pass_through_nncodec(parameters, qp=qp, dependent=dependent)
        with clock.stage("evaluate"):
            quality = self._measure.evaluate(adapter.module)
        with tempfile.TemporaryDirectory() as folder:
            adapter.write_files(Path(folder))
            rest = directory_bytes(Path(folder))
        rest += plain_bytes(adapter.module, adapter.layouts)
        rest += tensors_bytes(adapter.carried.values())
        return Outcome(
            bits_per_weight=8 * coded_bytes / sum(p.numel() for p in parameters.values()),
            directory_bytes=coded_bytes + rest,
            original_bytes=self._original_bytes,
            quality=quality,
            seconds=clock.seconds,
        )


def module_subject(
    name: str,
    module: nn.Module,
    batches: Iterable[Batch],
    evaluate: Callable[[nn.Module], float],
    *,
    base: CompressionConfig,
    data: str,
    hessian_cache: Path,
    loss: Loss | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> ModelSubject:
    """Return a plain module as a subject, judged by an accuracy.

    Args:
        name: of the module in tables and pictures.
        batches: calibration inputs (running.Batch).
        evaluate: returns the accuracy (a share of 1) of the module.
        base: selection of weights, and the seed; the points' settings of these are ignored.
        data: name of the data of `evaluate`; part of the identity.
        hessian_cache: directory for Hessians and sensitivities.
        loss: for the sensitivities (calibration/sensitivity.py).

    Raises:
        CerwuError: there is nothing to compress, or no batch.
    """
    calibration = Batches(inputs=batches, loss=loss, seed=base.seed)
    base = replace(shared_hessians(base), calibration=calibration)
    adapter = ModuleAdapter(
        module.eval(),
        base,
        device=torch.device(device),
        hessian_cache=hessian_cache,
        progress=progress,
    )

    def load(folder: Path) -> nn.Module:
        return fill(module, open_directory(folder), device=torch.device("cpu"))

    measure = Measure("accuracy", evaluate, load, {"evaluation": data})
    return ModelSubject(name, adapter, measure, base)
