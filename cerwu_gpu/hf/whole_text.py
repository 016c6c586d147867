"""Text models that run whole: encoder-decoders, and causal ones whose blocks cannot run one by one.

An encoder reads the first half of a window of text, its decoder predicts the second. Models that
hear (Whisper) take batches of audio features and the decoder's tokens. The loss is that of the
predicted tokens, scaled so that lmbda is nats per token.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from cerwu_gpu.calibration.running import Batch, Runner, evaluating
from cerwu_gpu.calibration.sensitivity import Loss
from cerwu_gpu.config import Batches, Calibration, CompressionConfig, Source
from cerwu_gpu.errors import CalibrationError, ConfigError, ModelError
from cerwu_gpu.hf.classifier import WholeModel
from cerwu_gpu.hf.ends import logits_or_states
from cerwu_gpu.hf.models import LoadedModel, check_tokens
from cerwu_gpu.hf.sources import Windows, calibration_tokens, usual_samples
from cerwu_gpu.hf.text import SELF, CalibrationTokens
from cerwu_gpu.layout import Label
from cerwu_gpu.models.selection import select_in_module
from cerwu_gpu.quantize.sensitivity import Sensitivities

IGNORED = -100
"""Label of a position that predicts nothing, as in transformers."""


class WholeText(WholeModel):
    """A model that predicts tokens, with its calibration text or batches of its inputs."""

    takes_text = True
    distils = False
    usual_sources = (Source("wikitext2", 1.0),)

    def __init__(self, loaded: LoadedModel, config: CompressionConfig, **options: Any) -> None:
        """Take the arguments of ModuleAdapter, and a text in place of batches.

        Raises:
            CalibrationError: the text cannot be used, or batches hold no tokens to predict.
            ModelError: the model has no embedding for the text's tokens.
            ConfigError: a distillation is asked for.
        """
        module = loaded.model
        self.module, self.loaded = module, loaded
        if config.distillation is not None:
            raise ConfigError(f"{type(module).__name__} cannot be distilled: drop distillation.")
        events: tuple[str, ...] = ()
        given = config.calibration
        if config.data_free:
            super().__init__(loaded, config, **options)
            return
        if isinstance(given, Calibration):
            tokens = self._tokens(config, given)
            events = tokens.events
            if events and config.strict:
                raise CalibrationError(f"{events[0]} (strict)")
            batches = [self.inputs(rows) for rows in torch.split(tokens.tokens, given.batch_size)]
            data = Batches(inputs=batches, loss=self._own_loss(), seed=given.seed)
        else:
            assert isinstance(given, Batches)
            inputs = [self.batch(batch) for batch in given.inputs]
            if given.loss is None and not all(map(self.predicts, inputs)):
                raise CalibrationError(f"batches of {type(module).__name__} are {self.takes}.")
            data = replace(given, inputs=inputs, loss=given.loss or self._own_loss())
        super().__init__(loaded, replace(config, calibration=data), **options)
        self.events = (*self.events, *events)

    def _tokens(self, config: CompressionConfig, given: Calibration) -> CalibrationTokens:
        """Return windows of the calibration text."""
        kind, takes = type(self.module).__name__, self.module.main_input_name
        if takes != "input_ids":
            raise CalibrationError(
                f"{kind} takes {takes}, no text: give batches of {takes} and decoder_input_ids."
            )
        if any(text == SELF for text, _ in given.sources):
            raise CalibrationError(f"{kind} continues no text of its own: give a calibration text.")
        chosen = select_in_module(self.module, config.include, config.exclude).chosen
        columns, length = max(layout.matrix_shape[1] for layout in chosen), given.sequence_length
        windows = Windows(
            samples=given.samples or usual_samples(columns, given),
            sequence_length=length,
            seed=given.seed,
            batch_size=given.batch_size,
        )
        tokens = calibration_tokens(
            given.sources or self.usual_sources, self.module, self.loaded.tokenizer, windows
        )
        for ids in self.inputs(tokens.tokens).values():
            if isinstance(ids, Tensor):
                check_tokens(self.module, ids, ids.shape[1])
        return tokens

    takes = "dicts of its inputs with decoder_input_ids or labels: give such, or a loss"
    """Batches that it takes, and what to do."""

    def batch(self, given: Batch) -> Batch:
        """Return the inputs that a given batch stands for."""
        return given

    @abstractmethod
    def inputs(self, tokens: Tensor) -> dict[str, Any]:
        """Return the inputs for windows, int64 [samples, sequence]."""

    @property
    def unpredicted(self) -> int | None:
        """Token that nothing predicts; None: there is none."""
        return None

    def _own_loss(self) -> Loss:
        token = self.unpredicted
        return token_losses if token is None else _WithoutToken(token)

    predicted: tuple[str, ...] = ("decoder_input_ids", "labels")
    """Inputs one of which holds the tokens to predict."""

    def predicts(self, batch: Batch) -> bool:
        """Return whether a batch holds tokens to predict."""
        return isinstance(batch, Mapping) and any(name in batch for name in self.predicted)

    def sensitivities(self, config: CompressionConfig) -> Sensitivities:
        """Return those of the loss; rows of a head that is an embedding as well count alike, since
        rare tokens are looked up, too."""
        known = super().sensitivities(config)
        embeddings = {
            id(child.weight) for child in self.module.modules() if isinstance(child, nn.Embedding)
        }
        gradients: dict[Label, Tensor] = dict(known.squared_gradients)
        for (name, part), gradient in known.squared_gradients.items():
            if id(self.module.get_parameter(name)) in embeddings:
                gradients[name, part] = gradient.mean().expand_as(gradient).clone()
        return replace(known, squared_gradients=gradients)

    @torch.no_grad()
    def loss(self) -> float | None:
        if self._loss != self._own_loss() or not self._held_out:
            return super().loss()
        total = count = 0.0
        with evaluating(self.module, self._device):
            runner = Runner(self.module, {}, self._device)
            for batch in self._held_out:
                nats, predicted = _nats(runner.run(batch), batch, self.unpredicted)
                total += float(nats.double().sum())
                count += float(predicted.sum())
        return total / count


class SequenceToSequence(WholeText):
    """An encoder-decoder."""

    def __init__(self, loaded: LoadedModel, config: CompressionConfig, **options: Any) -> None:
        """Take the arguments of WholeText.

        Raises:
            ModelError: the model is no encoder-decoder.
        """
        if not loaded.model.config.is_encoder_decoder:
            raise ModelError(
                f"{type(loaded.model).__name__} has no encoder beside its decoder: it is not "
                "supported."
            )
        super().__init__(loaded, config, **options)

    def inputs(self, tokens: Tensor) -> dict[str, Any]:
        return {**teacher_forced(self.module, tokens), "use_cache": False}


class WholeLM(WholeText):
    """A causal language model whose blocks cannot run one by one."""

    predicted = ("input_ids",)
    takes = "tokens, integers [samples, sequence]: give such, or a text"

    def batch(self, given: Batch) -> Batch:
        if isinstance(given, Tensor) and given.dim() == 2:
            return self.inputs(given)
        if isinstance(given, Mapping) and isinstance(given.get("labels"), Tensor):
            # Labels of a causal model stand at their own tokens, one place behind their logits.
            labels = functional.pad(given["labels"][:, 1:], (0, 1), value=IGNORED)
            return {**given, "labels": labels}
        return given

    def inputs(self, tokens: Tensor) -> dict[str, Any]:
        return {"input_ids": tokens, "use_cache": False}


def teacher_forced(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """Return the inputs of an encoder-decoder for windows, int64 [samples, sequence]: the encoder
    reads the first half, the decoder is given the second one behind its first token."""
    settings: Any = model.config
    fields = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    named = (getattr(settings, field, None) for field in fields)
    start = next((token for token in named if token is not None), 0)
    half = -(-tokens.shape[1] // 2)
    following = functional.pad(tokens[:, half:], (1, 0), value=start)
    return {"input_ids": tokens[:, :half], "decoder_input_ids": following}


def token_losses(output: Any, batch: Any, unpredicted: int | None = None) -> Tensor:
    """Return per sample the negative log likelihood of the predicted tokens over the square root of
    their number: its squared gradients are those per token.

    Args:
        unpredicted: token that nothing predicts.
    """
    nats, predicted = _nats(output, batch, unpredicted)
    return nats / predicted.clamp_min(1).sqrt()


@dataclass(frozen=True)
class _WithoutToken:
    """The loss of all tokens but one; two of the same token are equal."""

    token: int

    def __call__(self, output: Any, batch: Any) -> Tensor:
        return token_losses(output, batch, self.token)


def _nats(output: Any, batch: Any, unpredicted: int | None) -> tuple[Tensor, Tensor]:
    """Return the negative log likelihood of the predicted tokens [samples] and their number."""
    logits, labels = logits_or_states(output), batch.get("labels")
    if labels is None:
        ids = batch["decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"]
        logits, labels = logits[:, :-1], ids[:, 1:]
    labels = labels.to(logits.device)
    if unpredicted is not None:
        labels = labels.masked_fill(labels == unpredicted, IGNORED)
    nats = functional.cross_entropy(
        logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
    )
    return nats.sum(dim=1), (labels != IGNORED).sum(dim=1)
