"""A language model as the subject of a sweep: loaded once, calibrated once, measured from files."""

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from cerwu_gpu.attempt import directory_bytes, plain_bytes
from cerwu_gpu.baselines.nncodec import pass_through_nncodec
from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.hf.attempt import Attempts, write_companions
from cerwu_gpu.hf.calibration import placed
from cerwu_gpu.hf.compression import bytes_of_original
from cerwu_gpu.hf.device import find_device
from cerwu_gpu.hf.evaluation import perplexity
from cerwu_gpu.hf.hessian_cache import hessian_key
from cerwu_gpu.hf.loading import load_compressed
from cerwu_gpu.hf.models import load_model, require_tokenizer
from cerwu_gpu.hf.source import Source
from cerwu_gpu.hf.structure import find_weights
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.progress import Clock
from cerwu_gpu.sweep.points import Point
from cerwu_gpu.sweep.subject import Outcome, Quality


class LanguageModel:
    """A causal language model, judged by its perplexity (sweep.subject.Subject).

    The Hessians and sensitivities of all its weights are kept on the disk; the model stays in
    memory, with its original weights beside it, which are put back before each point.
    """

    quality: Quality = "perplexity"

    def __init__(
        self,
        model: str | Path,
        base: CompressionConfig,
        text: str,
        hessian_cache: Path,
        *,
        head: bool = True,
        context_length: int = 512,
        max_windows: int | None = None,
        batch_size: int = 4,
        device: str | torch.device | None = None,
        progress: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        """Load the model and tokenize the calibration text.

        Args:
            model: hub name, local directory or .gguf file.
            base: which weights, and what calibrates: the points' settings of these are ignored.
            text: evaluation text.
            hessian_cache: directory for Hessians and sensitivities.
            head: whether some point quantizes the head and the input embedding.
            context_length, max_windows, batch_size: of the evaluation, as for `perplexity`.
            device: where blocks are worked on and models are evaluated.
            progress: show bars over calibration on stderr.

        Raises:
            CerwuError: a subclass that says what is wrong.
        """
        if base.sequential or base.correct_drift:
            raise ConfigError(
                "a sweep keeps Hessians for all points: drop sequential and correct_drift."
            )
        self.name = Path(model).expanduser().resolve().name
        self._device = find_device(device)
        self._loaded = load_model(model, trust_remote_code=trust_remote_code)
        self._tokenizer = require_tokenizer(self._loaded.tokenizer)
        self._text = text
        self._context_length = context_length
        self._max_windows = max_windows
        self._batch_size = batch_size
        self._source = Source.prepare(
            self._loaded,
            self._layouts(base, head=head),
            base,
            text=None,
            device=self._device,
            hessian_cache=hessian_cache,
            progress=progress,
        )
        self._originals = {
            name: self._model.get_parameter(name).detach().clone() for name in self._source.layouts
        }
        self._original_bytes = bytes_of_original(model, self._model)
        self._calibrated = False

    @property
    def _model(self) -> PreTrainedModel:
        return self._loaded.model

    def identity(self) -> Mapping[str, str]:
        """Digests of the weights and texts, and the settings that all points share."""
        base = self._source.config
        return {
            "model": hessian_key(self._model, [], None, {}),
            "calibration text": _digest(self._source.tokens.numpy().tobytes()),
            "evaluation text": _digest(self._text.encode()),
            "evaluation windows": f"{self._max_windows} of {self._context_length} tokens",
            "weights": f"{base.include} {base.exclude}",
        }

    def original(self) -> float:
        """Perplexity of the model as it came."""
        self._restore()
        with placed(self._model, self._device):
            return self._perplexity(self._model)

    def run(self, point: Point, folder: Path) -> Outcome:
        """Compress, load and evaluate (sweep.subject.Subject); NNCodec points leave no files.

        Raises:
            CerwuError: a subclass that says what is wrong.
        """
        self._restore()
        layouts = {
            layout.name: layout
            for layout in self._layouts(self._source.config, head=not point.config.keep_head)
        }
        if point.qp is not None:
            return self._run_nncodec(layouts, point.qp, point.dependent)
        clock = Clock()
        self._prepare(point.config, clock)
        source = replace(self._source, layouts=layouts, config=point.config, progress=False)
        with Attempts(source, folder, overwrite=False, verify=False, clock=clock) as attempts:
            attempt = attempts.run(point.config)
            attempt.writer.publish()
        with clock.stage("decode"):
            decoded = load_compressed(folder, device=self._device)
        with clock.stage("evaluate"):
            quality = self._perplexity(decoded)
        return Outcome(
            bits_per_weight=attempt.bits_per_weight,
            directory_bytes=attempt.directory_bytes,
            original_bytes=self._original_bytes,
            quality=quality,
            seconds=clock.seconds,
            events=(*self._source.events, *attempt.events(layouts)),
        )

    def _prepare(self, config: CompressionConfig, clock: Clock) -> None:
        """Have the Hessians, and where `config` uses them the sensitivities, on the disk.

        They are those of all weights of the sweep, whatever a point leaves alone.
        """
        if not self._calibrated:
            with clock.stage("calibrate"):
                self._source.calibrate()
            self._calibrated = True
        if config.needs_gradients:
            with clock.stage("sensitivity"):
                replace(self._source, config=config).gradients()

    def _run_nncodec(
        self, layouts: Mapping[str, WeightLayout], qp: int, dependent: bool
    ) -> Outcome:
        clock = Clock()
        parameters = {name: self._model.get_parameter(name) for name in layouts}
        with clock.stage("quantize"):
            coded_bytes = pass_through_nncodec(parameters, qp=qp, dependent=dependent)
        with clock.stage("evaluate"), placed(self._model, self._device):
            quality = self._perplexity(self._model)
        with tempfile.TemporaryDirectory() as companions:
            write_companions(self._loaded, Path(companions))
            rest = directory_bytes(Path(companions))
        rest += plain_bytes(self._model, layouts)
        return Outcome(
            bits_per_weight=8 * coded_bytes / sum(p.numel() for p in parameters.values()),
            directory_bytes=coded_bytes + rest,
            original_bytes=self._original_bytes,
            quality=quality,
            seconds=clock.seconds,
        )

    def _layouts(self, base: CompressionConfig, *, head: bool) -> tuple[WeightLayout, ...]:
        return find_weights(self._model, base.include, base.exclude, head=head).chosen

    @torch.no_grad()
    def _restore(self) -> None:
        for name, original in self._originals.items():
            self._model.get_parameter(name).copy_(original)

    def _perplexity(self, model: PreTrainedModel) -> float:
        return perplexity(
            model,
            self._tokenizer,
            self._text,
            context_length=self._context_length,
            max_windows=self._max_windows,
            batch_size=self._batch_size,
        )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
