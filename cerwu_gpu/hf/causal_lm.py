"""Causal language models: blocks calibrated one by one, a loss per token, a head, a tokenizer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from cerwu_gpu.calibration.blockwise import Backbone, CalibratedBlocks, Drift
from cerwu_gpu.calibration.cache import (
    HessianCache,
    cached_sensitivities,
    hessian_key,
    state_digest,
    tensors_digest,
)
from cerwu_gpu.calibration.capture import Capture
from cerwu_gpu.calibration.data_free import DataFreeBlocks
from cerwu_gpu.calibration.running import is_held_out, placed, weight_source
from cerwu_gpu.calibration.sensitivity import blockwise_sensitivities
from cerwu_gpu.calibration.students import BlockwiseStudent
from cerwu_gpu.compression.adapter import HELD_OUT_TEXT, Adapter
from cerwu_gpu.compression.blocks import Blocks
from cerwu_gpu.compression.distill import Student
from cerwu_gpu.config import (
    Batches,
    Calibration,
    CompressionConfig,
    ImageCalibration,
    ImageTextCalibration,
    MaxPerplexityIncrease,
    Source,
)
from cerwu_gpu.container.journal import Journal
from cerwu_gpu.errors import CalibrationError, CerwuError, ModelError
from cerwu_gpu.files import checksum
from cerwu_gpu.hf.companions import described, not_carried, write_companions
from cerwu_gpu.hf.ends import Ends, ends_placed, logits_or_states
from cerwu_gpu.hf.evaluation import mean_loss
from cerwu_gpu.hf.head import HeadBlocks, HeadGradients, head_layouts, head_modules
from cerwu_gpu.hf.models import LoadedModel, check_tokens, is_conv1d, mask_token
from cerwu_gpu.hf.sources import Windows, calibration_tokens, usual_samples
from cerwu_gpu.hf.streaming import WeightsOnDisk
from cerwu_gpu.hf.text import SELF, CalibrationTokens, batched_tokens
from cerwu_gpu.hf.trial import raised_here, refusing, trial_tokens
from cerwu_gpu.layout import Label
from cerwu_gpu.models.selection import (
    Selection,
    find_blocks,
    finite,
    require_coded,
    require_finite,
    require_separate,
    require_values,
    select_in_blocks,
    tower_blocks,
)
from cerwu_gpu.quantize.sensitivity import Sensitivities
from cerwu_gpu.ranks import Ranks

SENSITIVITY_TOKENS = 4096
"""Number of tokens used to estimate sensitivities. They span orders of magnitude across outputs, so
a small sample suffices."""
JUDGING_TOKENS = 8192
"""Number of held-out tokens whose perplexity goes into a model card."""
JUDGING_SAMPLES = 8
"""Number of held-out samples that a distillation is judged by."""
EXPERTS = {
    "Llama4TextExperts": True,
    "JetMoeParallelExperts": False,
    "LongcatFlashExperts": False,
}
"""Classes of experts whose layout transformers does not give -> whether it is [inputs, outputs]."""
LOGITS = 2**25
"""Approximate number of logits in memory at a time; at least those of one sequence."""


class CausalLM(Adapter):
    """A causal language model with its calibration text.

    Attributes:
        loaded: the model and its tokenizer.
        data: the calibration tokens and held-out ones.
    """

    drifts = True
    takes_text = True
    module: PreTrainedModel
    usual_sources: tuple[Source, ...] = (Source("wikitext2", 0.5), Source(SELF, 0.5))
    """Texts that calibrate where none is given: of those tried, with these the model came nearest
    to the original on a text of another kind (docs/method.md)."""

    def __init__(
        self,
        loaded: LoadedModel,
        config: CompressionConfig,
        *,
        device: torch.device,
        ranks: Ranks | None = None,
        progress: bool = False,
    ) -> None:
        """Choose the weights.

        Raises:
            ConfigError: a pattern matches nothing, no weight is left, or a weight has no values.
            ModelError: the model has no blocks, weights of a type that is not compressed, or with
                `config.strict` a source that holds more than the result would.
        """
        super().__init__(ranks)
        self.loaded = loaded
        self.module = loaded.model.train(False)
        source = weight_source(self.module)
        self._work: Path | None = None
        self._state: str | None = None
        self._disk = source if isinstance(source, WeightsOnDisk) else None
        empty = torch.empty(0, 0, dtype=torch.int64)
        self.data = CalibrationTokens(empty, empty)
        self.cache: HessianCache | None = None
        self._sensitivity_cache: HessianCache | None = None
        self._batch_size = Calibration().batch_size
        self._device = device
        self._progress = progress
        self.carried = loaded.names.carried
        if self._disk is None:
            require_values(self.module)
        require_separate(self.module)
        self._blocks = find_blocks(self.module, is_conv1d)
        self._tower_blocks = tower_blocks(self.module, is_conv1d)
        self._towers: list[tuple[str, nn.Module]] = []
        for child in self.module.modules():
            if type(child).__name__ in EXPERTS:
                experts: Any = child
                experts.is_transposed = EXPERTS[type(child).__name__]
        self.select(config)
        require_coded(self.module, self.layouts)

    def select(self, config: CompressionConfig) -> None:
        selection = select(
            self.module,
            config.include,
            config.exclude,
            head=not config.keep_head,
            predicts=self.predicts_tokens,
            blocks=[*self._blocks, *self._tower_blocks],
        )
        self.layouts = {layout.name: layout for layout in selection.chosen}
        left, events = not_carried(self.loaded, strict=config.strict)
        self.left = {**selection.left, **left}
        chosen = selection.events(strict=config.strict)
        self.events = (*self.loaded.events, *chosen, *events, *self.data.events)
        self._towers = self._chosen_towers(strict=config.strict)

    def _chosen_towers(self, *, strict: bool) -> list[tuple[str, nn.Module]]:
        """Return the blocks for images and sound that have chosen weights, and note them.

        Raises:
            ModelError: there is one, and `strict`.
        """
        blocks = self._tower_blocks
        names = [n for n in self.layouts if any(n.startswith(f"{block}.") for block, _ in blocks)]
        if not names:
            return []
        event = (
            f"no text reaches {names[0]} and {len(names) - 1} others for images or sound: "
            "quantized against H = I, and counted like the mean of all others"
        )
        if strict:
            raise ModelError(f"{event} (strict): exclude them.")
        self.events = (*self.events, event)
        return [pair for pair in blocks if any(n.startswith(f"{pair[0]}.") for n in names)]

    def calibrate(
        self,
        config: CompressionConfig,
        *,
        hessian_cache: Path | None = None,
        work: Path | None = None,
        judged: bool = False,
    ) -> None:
        """Tokenize the calibration text and open the cache of its Hessians.

        Args:
            hessian_cache: directory for Hessians and sensitivities, for later runs too.
            work: this run's directory (container/work.py), which keeps sensitivities for a resumed
                run.
            judged: hold some text out for `loss`.

        Raises:
            CalibrationError: the text cannot be used, or the settings contradict each other.
            ModelError: a weight to compress is NaN or infinite.
        """
        self._work = work
        if self._disk is None:
            require_finite(self.module, self.layouts)
        else:  # reading the model may take long: once is enough
            self._state = self.ranks.from_first(self._digest)
        # For a perplexity increase, some of the calibration samples are held out anyway.
        holding_out = isinstance(config.target, MaxPerplexityIncrease)
        if isinstance(config.calibration, Batches):
            tokens = batched_tokens(config.calibration.inputs)
            data = CalibrationTokens(tokens, tokens[:0])
        elif config.data_free:
            data = self.data
        else:
            apart = not holding_out and (judged or config.distillation is not None)
            self._batch_size = config.text.batch_size
            text = partial(self._text_tokens, config.text, apart)
            data = self.ranks.from_first(text)
        events = data.events
        if judged and not holding_out and not len(data.held_out):
            missing = "no calibration text is left to judge by: the card has no perplexity."
            events = (*events, missing)
        if config.strict and events:
            raise CalibrationError(f"{events[0]} (strict)")
        self.events = (*self.events, *events)
        tokens, held_out = data.tokens, data.held_out
        if holding_out:
            tokens, held_out = _split(tokens, "max_perplexity_increase")
        self.take(CalibrationTokens(tokens, held_out, events))
        if hessian_cache is not None:
            self._check_cache(config)
            key = hessian_key(
                self.module,
                described(self.module),
                list(self.layouts.values()),
                tensors_digest([self.data.tokens]),
                self._state,
            )
            self.cache = HessianCache(hessian_cache, key)
        self._work = work
        run_cache = HessianCache(work, "calibration") if work and self.ranks.first else None
        self._sensitivity_cache = self.cache or run_cache

    def _digest(self) -> str:
        assert self._disk is not None
        return state_digest(finite(self._disk.state(), self.layouts))

    def _text_tokens(self, calibration: Calibration, judged: bool) -> CalibrationTokens:
        """Return tokens of the calibration texts, with held-out ones if `judged`."""
        length = calibration.sequence_length
        columns = max(layout.matrix_shape[1] for layout in self.layouts.values())
        windows = Windows(
            samples=calibration.samples or usual_samples(columns, calibration),
            sequence_length=length,
            seed=calibration.seed,
            batch_size=calibration.batch_size,
            held_out=-(-JUDGING_TOKENS // length) if judged else 0,
        )
        return calibration_tokens(
            calibration.sources or self.usual_sources,
            self.module,
            self.loaded.tokenizer,
            windows,
            progress=self._progress,
        )

    def take(self, data: CalibrationTokens) -> None:
        """Replace the calibration tokens.

        Raises:
            ModelError: the model has no embedding for them.
        """
        if data.tokens.numel():
            check_tokens(self.module, data.tokens, data.tokens.shape[1])
        self.data = data

    @staticmethod
    def _check_cache(config: CompressionConfig) -> None:
        if config.corrects_drift and config.target is None:
            raise CalibrationError(
                "Hessians behind compressed blocks belong to one setting only and are not kept: "
                "take drift ignore, or drop the Hessian cache."
            )
        if config.sequential:
            raise CalibrationError(
                "sequential Hessians belong to one setting only and are not kept: take another "
                "drift, or drop the Hessian cache and any target."
            )

    def obstacle(self) -> Exception | None:
        """Return what says that the blocks cannot run one by one, as far as a few tokens tell;
        None: they can.

        The first block alone is run and differentiated.

        Raises:
            ModelError: the tokenizer does not belong to the model.
        """
        tokens = trial_tokens(self.vocabulary)
        try:
            backbone, _ = self.backbone()
            first = self._blocks[0][1]
            with placed(first, self.module.device):
                captured = backbone.capture(list(tokens[:, None]), self.module.device)
                hidden = captured.hidden[0].detach().requires_grad_()
                with torch.enable_grad():
                    output = captured.calls[0][1].run(first, hidden)
                torch.autograd.grad(output.sum(), hidden)
            passage = self.ends(captured).passage(tokens[:1], captured.hidden[0])
            torch.autograd.grad(passage.logits.sum(), passage.last)
            if passage.scores is not None and passage.scores.shape != passage.logits.shape:
                raise CalibrationError("its head is applied to more states than its logits are of")
        except (ModelError, OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the model's code makes of it
            if raised_here(error) and not isinstance(error, CerwuError):
                raise
            return error
        return None

    # Inputs and predictions: masked language models and models without a head differ here.

    predicts_tokens = True
    """Truth of the statement that the model has logits of tokens, and so a perplexity."""

    def inputs(self, tokens: Tensor) -> Tensor:
        """Return the model's input ids for tokens, int64 [batch, sequence]."""
        return tokens

    def predicted(self, tokens: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [count, vocabulary] that predict a token, and those tokens [count]."""
        return logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()

    def loss_scale(self, tokens: Tensor) -> float:
        """Return the factor of the loss that makes squared gradients those of all tokens."""
        return 1.0

    def total_loss(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Return L [nats] of sequences, whose squared gradients are the sensitivities."""
        predicting, targets = self.predicted(tokens, logits)
        return self.loss_scale(tokens) * functional.cross_entropy(
            predicting.float(), targets.to(predicting.device), reduction="sum"
        )

    def at_once(self, length: int) -> int:
        """Return the number of sequences of `length` tokens whose logits fit into memory."""
        return max(1, LOGITS // (length * self.vocabulary))

    def _run(self, tokens: Tensor) -> object:
        ids = self.inputs(tokens).to(self.module.device)
        return self.module.base_model(input_ids=ids, **self.run_options)

    run_options: Mapping[str, Any] = {"use_cache": False}
    """Arguments of the model besides the tokens."""
    overlap: int | None = 1
    """Number of last positions that predict nothing; None: predictions depend on where a sequence
    begins."""

    def ends(self, captured: Capture) -> Ends:
        """Return the model without its blocks."""
        return Ends(self.module, self._blocks, captured.wrap, self.inputs, self.run_options)

    def backbone(self) -> tuple[Backbone, HeadBlocks]:
        """Return the model for block-by-block calibration, and its matrices outside the blocks."""
        layouts = tuple(self.layouts.values())
        outer = HeadBlocks(self.module, self._blocks, layouts, self.ends, self._towers)
        single = partial(eager_experts, self.module)
        return Backbone(self.module, self._blocks, layouts, self._run, outer, single), outer

    def sensitivities(self, config: CompressionConfig) -> Sensitivities:
        def compute() -> Sensitivities:
            tokens = self.data.tokens
            count = -(-SENSITIVITY_TOKENS // tokens.shape[1])
            return self.backward(tokens[:count], self._batch_size)

        cache = self._sensitivity_cache
        known = self.ranks.from_first(lambda: cache and cache.read_sensitivities())
        known = _filled(known or cached_sensitivities(cache, compute))
        inside = tuple(f"{name}." for name, _ in self._towers)
        return known.with_usual([x for x in known.squared_gradients if x[0].startswith(inside)])

    def backward(self, tokens: Tensor, batch_size: int) -> Sensitivities:
        """Return the sensitivities of all chosen weights on tokens, int64 [samples, sequence].

        Raises:
            CalibrationError: sequences of one token, or a gradient that is not finite.
            ModelError: the model has no embedding for the tokens.
        """
        if tokens.numel():
            check_tokens(self.module, tokens, tokens.shape[1])
        backbone, outer = self.backbone()
        head = None if outer.head is None else HeadGradients(outer.head, self.ranks)
        with refusing(self.module):
            alphas = blockwise_sensitivities(
                backbone,
                tokens,
                lambda captured, shard: _Tail(self, self.ends(captured), head, shard),
                ends_placed(self.module, self._blocks, self._device),
                to_inputs=head is not None,
                device=self._device,
                batch_size=batch_size,
                spool=None if self._disk is None else self._work,
                ranks=self.ranks,
                progress=self._progress,
            )
        additions: dict[str, Tensor] = {}
        if head is not None:
            rows, columns = self.module.get_parameter(head.head.names[0]).shape
            head.finish(rows, columns, self._device)
            for name in head.head.names:
                if name in self.layouts:
                    outer_part = head.sensitivities(self.layouts[name], self.inputs(tokens))
                    alphas.update(outer_part.squared_gradients)
                    additions.update(outer_part.hessian_additions)
        return Sensitivities(alphas, additions)

    def blocks(self, config: CompressionConfig, *, sampling: bool = False) -> Blocks:
        if config.data_free:
            ends = head_modules(self.module, list(self.layouts.values()))
            parts = [*self._blocks, *self._towers, *ends]
            return DataFreeBlocks(self.module, self.layouts, parts, self._device)
        if self.cache is None or (config.corrects_drift and not sampling):
            return self._calibrated(config)
        backbone, outer = self.backbone()
        return self.cache.blocks(
            self.module,
            list(self.layouts.values()),
            len(backbone.blocks) + len(outer),
            lambda: self._calibrated(config, sampling=True),
            self._device,
            progress=self._progress,
        )

    def _calibrated(self, config: CompressionConfig, sampling: bool = False) -> CalibratedBlocks:
        return CalibratedBlocks(
            self.backbone()[0],
            self.data.tokens,
            device=self._device,
            batch_size=self._batch_size,
            drift=Drift(config.sequential, config.corrects_drift and not sampling),
            ranks=self.ranks,
            progress=self._progress,
        )

    @torch.no_grad()
    def finish(self, config: CompressionConfig) -> None:
        """Notice compressed weights that overflow float16 on the calibration text.

        Raises:
            ModelError: they do, with `config.strict`.
        """
        if self.module.dtype != torch.float16 or not self.data.tokens.numel():
            return
        on_device = placed(self.module, self._device)
        with on_device if self._disk is None else self._disk.running():
            ids = self.inputs(self.data.tokens[:1]).to(self.module.device)
            logits = logits_or_states(self.module(input_ids=ids, **self.run_options))
        event = "the compressed model overflows float16 on its calibration text: use bfloat16"
        if not bool(torch.isfinite(logits).all()) and event not in self.events:
            if config.strict:
                raise ModelError(f"{event} (strict).")
            self.events = (*self.events, event)

    def student(self, config: CompressionConfig) -> Student:
        """Return the model with what is tuned on the calibration tokens; held-out ones, or else a
        share of them, judge."""
        assert config.distillation is not None
        tokens, held_out = self.data.tokens, self.data.held_out
        if not len(held_out):
            tokens, held_out = _split(tokens, "distillation")
        backbone, _ = self.backbone()

        def ends(captured: Capture) -> Callable[[Tensor, Tensor], Tensor]:
            ends = self.ends(captured)
            return lambda batch, hidden: self.predicted(batch, ends.logits(batch, hidden))[0]

        return BlockwiseStudent(
            backbone,
            tokens,
            held_out[:JUDGING_SAMPLES],
            ends,
            lambda: ends_placed(self.module, self._blocks, self._device),
            device=self._device,
            batch_size=config.distillation.batch_size,
            vocabulary=self.vocabulary,
            overlap=self.overlap,
            folder=self._work,
        )

    def loss(self) -> float | None:
        if not len(self.data.held_out):
            return None
        mask = mask_token(self.module, self.loaded.tokenizer)
        with nullcontext() if self._disk is None else self._disk.running():
            return mean_loss(self.module, self.data.held_out, mask=mask)

    # A model whose blocks are on disk has neither their original nor their quantized weights.

    def keep_originals(self) -> None:
        if self._disk is None:
            super().keep_originals()

    def restore(self) -> None:
        super().restore()
        if self._disk is not None:
            self._disk.restore()

    def quantized(self, journal: Journal | None) -> None:
        if self._disk is not None:
            assert journal is not None, "a run of a model on disk has a work directory"
            self._disk.quantized(journal)

    def value(self, name: str, tensor: Tensor) -> Tensor:
        value = None if self._disk is None else self._disk.value(name)
        return tensor if value is None else value

    def holds(self, name: str, weight: Tensor) -> bool:
        digest = None if self._disk is None else self._disk.replaced(name)
        return super().holds(name, weight) if digest is None else checksum(weight) == digest

    def identity(self) -> dict[str, str]:
        return {
            "the model": hessian_key(self.module, described(self.module), [], "", self._state),
            "the calibration text": tensors_digest([self.data.tokens, self.data.held_out[:0]]),
            HELD_OUT_TEXT: tensors_digest([self.data.held_out]),
        }

    def write_files(self, folder: Path) -> None:
        self.note(write_companions(self.loaded, folder))

    @property
    def vocabulary(self) -> int:
        """Number of rows of the input embedding."""
        embedding: Any = self.module.get_input_embeddings()
        return int(embedding.weight.shape[0])

    @property
    def predictions(self) -> int:
        samples, length = self.data.held_out.shape
        return samples * (length - 1)


class _Tail:
    """A model without its blocks in the backward pass of one batch (sensitivity.Tail)."""

    def __init__(
        self, adapter: CausalLM, ends: Ends, head: HeadGradients | None, shard: int
    ) -> None:
        self._adapter = adapter
        self._ends = ends
        self._head = head
        if head is not None:
            head.begin(shard)
        self._entries: list[tuple[Tensor, Tensor]] = []

    def gradient(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return the loss's gradient at the blocks' output, a few sequences at a time."""
        count = self._adapter.at_once(tokens.shape[1])
        gradients = []
        pieces = zip(torch.split(tokens, count), torch.split(hidden, count), strict=True)
        for piece, outputs in pieces:
            passage = self._ends.passage(piece, outputs)
            if self._head is not None:
                weight = self._adapter.loss_scale(piece) ** 2
                self._head.note(passage, self._predicting(piece), weight)
            loss = self._adapter.total_loss(piece, passage.logits)
            gradients.append(torch.autograd.grad(loss, passage.last)[0])
            self._entries.append((passage.rows, passage.first))
        return torch.cat(gradients)

    def _predicting(self, tokens: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a function from logits [batch, sequence, ...] to those that predict a token."""
        return lambda logits: self._adapter.predicted(tokens, logits)[0]

    def note_inputs(self, gradient: Tensor) -> None:
        assert self._head is not None
        pieces = torch.split(gradient, [len(rows) for rows, _ in self._entries])
        for (rows, first), piece in zip(self._entries, pieces, strict=True):
            self._head.note_rows(torch.autograd.grad(first, rows, piece)[0])


def select(
    model: PreTrainedModel,
    include: tuple[str, ...] | list[str] = ("*",),
    exclude: tuple[str, ...] | list[str] = (),
    *,
    head: bool = False,
    predicts: bool = True,
    blocks: Sequence[tuple[str, nn.Module]] | None = None,
) -> Selection:
    """Choose weights of a language model's blocks, and with `head` its head and input embedding;
    a model that `predicts` tokens must have a head then.

    Args:
        blocks: those of the text and of towers, where they are known already.

    Raises:
        ConfigError: a pattern matches nothing, or no weight is left.
        ModelError: the model has no blocks, or with `head` none that can be compressed.
    """
    return select_in_blocks(
        model,
        blocks or [*find_blocks(model, is_conv1d), *tower_blocks(model, is_conv1d)],
        head_layouts(model, predicts=predicts) if head else (),
        include,
        exclude,
        is_transposed=is_conv1d,
    )


def runs_whole(config: CompressionConfig) -> bool:
    """Return whether the model must be whole in memory: to write its calibration text token by
    token, which would read it once for each, to tune the scales of rows of all blocks, or to see
    images."""
    calibration = config.calibration
    if config.distillation is not None:
        return True
    if isinstance(calibration, ImageCalibration | ImageTextCalibration):
        return True
    if not isinstance(calibration, Calibration):
        return False
    texts = calibration.sources or CausalLM.usual_sources
    return any(text == SELF for text, _ in texts)


@contextmanager
def eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """Run the experts of a mixture one by one; fused ones never show one expert's input."""
    before = getattr(model.config, "_experts_implementation", None)
    if before in (None, "eager"):
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _filled(sensitivities: Sensitivities) -> Sensitivities:
    """Return the sensitivities, with experts that no token reached at the mean of the reached."""
    gradients = sensitivities.squared_gradients
    filled: dict[Label, Tensor] = dict(gradients)
    for (name, part), gradient in gradients.items():
        if not bool(gradient.any()):
            means = [x.mean() for (n, _), x in gradients.items() if n == name and bool(x.any())]
            if means:
                filled[name, part] = torch.stack(means).mean().expand_as(gradient)
    return Sensitivities(filled, sensitivities.hessian_additions)


def _split(tokens: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Return calibration and held-out samples (running.is_held_out).

    Raises:
        CalibrationError: there is only one sample.
    """
    if len(tokens) < 2:
        raise CalibrationError(f"{what} needs at least 2 calibration samples: give more text.")
    out = torch.tensor(is_held_out(len(tokens)))
    return tokens[~out], tokens[out]
