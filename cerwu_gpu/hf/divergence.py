"""Distance from its original, on a text, of a model that predicts no next or masked token.

Both models read the same windows. Classifiers of sequences and tokens are compared by their
labels' distributions, embedding models by the cosine of their embeddings, and encoder-decoders by
the distribution of each token of a window's second half, given the ones before it and the first
half (teacher forcing), which also gives them a perplexity.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cerwu_gpu.errors import CalibrationError, ConfigError, ModelError
from cerwu_gpu.hf.ends import logits_or_states
from cerwu_gpu.hf.evaluation import perplexity_of
from cerwu_gpu.hf.kinds import kind_of
from cerwu_gpu.hf.models import LoadedModel, check_tokens
from cerwu_gpu.hf.text import text_windows
from cerwu_gpu.hf.text_heads import Embedder, TextClassifier, pooled, pooling_of
from cerwu_gpu.hf.whole_text import SequenceToSequence, teacher_forced
from cerwu_gpu.progress import tracked


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Distance of a model from its original; None for what its kind does not have."""

    kl_divergence: float | None = None
    """Mean of KL(original || model) per label or predicted token, in nats."""
    top1_agreement: float | None = None
    """Share of the labels or tokens of which both models find the same one likeliest."""
    rms_difference: float | None = None
    """Root of the mean squared difference of the numbers that a regression gives."""
    cosine: float | None = None
    """Mean cosine of both models' embeddings."""
    perplexity: float | None = None
    original_perplexity: float | None = None
    predictions: int
    """Number of labels, numbers, embeddings or predicted tokens."""


Sums = dict[str, float]
"""Sums over predictions, by the field of a Divergence whose mean they make."""
Compared = Callable[[Tensor], tuple[Sums, int]]
"""Comparison of a batch of windows, int64 [count, sequence]: its sums and number of predictions."""


def is_compared_by_divergence(loaded: LoadedModel) -> bool:
    """Return whether a model is of the kinds that predict no next or masked token."""
    kind = kind_of(loaded.model)
    return kind is not None and issubclass(kind.adapter, TextClassifier | SequenceToSequence)


@torch.no_grad()
def divergence(
    model: LoadedModel,
    original: LoadedModel | None,
    text: str,
    *,
    context_length: int = 512,
    max_windows: int | None = None,
    batch_size: int = 4,
    progress: bool = False,
) -> Divergence:
    """Compare a model with its original on windows of a text, one after the other.

    Args:
        model: whose tokenizer cuts the text.
        original: None: an encoder-decoder has a perplexity all the same.
        context_length: tokens of a window.
        max_windows: maximum number of windows; None: the whole text.
        batch_size: windows per forward pass.
        progress: show a bar over the windows on stderr.

    Raises:
        ConfigError: a number is out of its range, or there is nothing to compare with.
        ModelError: the models are of different classes, take no text, or have no tokenizer.
        CalibrationError: the text is empty.
    """
    for name, value in (("max_windows", max_windows), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}: give at least 1.")
    if context_length < 2:
        raise ConfigError(f"context_length is {context_length}: give at least 2.")
    compared, batch_size = _comparison(model, original, batch_size)
    windows = text_windows(text, model.tokenizer, context_length)[:max_windows]
    for one in (model, original):
        if one is not None:
            check_tokens(one.model, windows, windows.shape[1])
            one.model.train(False)
    sums: Sums = {}
    total = 0
    batches = torch.split(windows, batch_size)
    for tokens in tracked(batches, what="comparison", unit="batch", shown=progress):
        parts, count = compared(tokens)
        total += count
        for name, part in parts.items():
            sums[name] = sums.get(name, 0.0) + part
    if total == 0:
        raise CalibrationError("the text is too short to predict anything of it: give more words.")
    means: dict[str, Any] = {name: value / total for name, value in sums.items()}
    for name in means:
        if name.endswith("perplexity"):
            means[name] = perplexity_of(means[name])
    if "rms_difference" in means:
        means["rms_difference"] **= 0.5
    return Divergence(**means, predictions=total)


def _comparison(
    model: LoadedModel, original: LoadedModel | None, batch_size: int
) -> tuple[Compared, int]:
    """Return the comparison that fits a model's kind, and the windows that it takes at a time."""
    name, kind = type(model.model).__name__, kind_of(model.model)
    assert kind is not None, "is_compared_by_divergence tells"
    if original is not None and type(original.model) is not type(model.model):
        raise ModelError(
            f"the original is {type(original.model).__name__} and the model {name}: compare a "
            "model with the one that it was made of."
        )
    if issubclass(kind.adapter, SequenceToSequence):
        if model.model.main_input_name != "input_ids":
            raise ModelError(
                f"{name} takes {model.model.main_input_name}, no text: it is not measured."
            )
        return lambda tokens: _tokens(model, original, tokens), batch_size
    if original is None:
        raise ConfigError(f"{name} has no perplexity: give its original (against) to compare with.")
    if issubclass(kind.adapter, Embedder):
        return lambda tokens: _embeddings(model, original, tokens), batch_size
    # A decoder classifies at the last token that is no padding, and must know padding by then.
    padded = model.model.config.get_text_config().pad_token_id is not None
    return lambda tokens: _labels(model, original, tokens), batch_size if padded else 1


def _run(loaded: LoadedModel, **inputs: Any) -> Tensor:
    """Return logits or states, float64 on the CPU."""
    placed = {name: x.to(loaded.model.device) for name, x in inputs.items()}
    return logits_or_states(loaded.model(**placed)).double().cpu()


def _labels(model: LoadedModel, original: LoadedModel, tokens: Tensor) -> tuple[Sums, int]:
    after, before = (_run(one, input_ids=tokens).flatten(0, -2) for one in (model, original))
    problem = model.model.config.problem_type
    if problem == "multi_label_classification":  # each label is a choice of two
        after, before = (torch.stack([x, -x], dim=-1).flatten(0, 1) / 2 for x in (after, before))
    elif problem == "regression" or after.shape[1] == 1:
        return {"rms_difference": float((after - before).square().sum())}, after.numel()
    return _choices(before, after), len(after)


def _choices(before: Tensor, after: Tensor) -> Sums:
    """Return sums over logits [count, classes] of the original and the model."""
    log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
    return {
        "kl_divergence": float(functional.kl_div(log_q, log_p, reduction="sum", log_target=True)),
        "top1_agreement": float((before.argmax(-1) == after.argmax(-1)).sum()),
    }


def _embeddings(model: LoadedModel, original: LoadedModel, tokens: Tensor) -> tuple[Sums, int]:
    pooling = pooling_of(original.files)
    after, before = (pooled(_run(one, input_ids=tokens), pooling) for one in (model, original))
    return {"cosine": float(functional.cosine_similarity(after, before).sum())}, len(after)


def _tokens(model: LoadedModel, original: LoadedModel | None, tokens: Tensor) -> tuple[Sums, int]:
    inputs = teacher_forced(model.model, tokens)
    targets = inputs["decoder_input_ids"][:, 1:].flatten()

    def predictions(one: LoadedModel) -> Tensor:
        return _run(one, **inputs)[:, :-1].flatten(0, 1)

    after = predictions(model)
    sums = {"perplexity": float(functional.cross_entropy(after, targets, reduction="sum"))}
    if original is not None:
        before = predictions(original)
        loss = float(functional.cross_entropy(before, targets, reduction="sum"))
        sums |= {"original_perplexity": loss, **_choices(before, after)}
    return sums, len(targets)
