"""Quality of a model on a text: its perplexity, and its distance from the model it was made of, by
sliding windows as in the transformers documentation.

A causal language model predicts a token from those before it; a masked one from those on both
sides, with the token and others, one in MASKED_SHARE, masked. Its perplexity is then the
pseudo-perplexity of Salazar et al. (arXiv 1910.14659), who mask one token at a time.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cerwu_gpu.errors import CalibrationError, ConfigError, ModelError, reason
from cerwu_gpu.hf.models import check_tokens, mask_token, require_predictions
from cerwu_gpu.hf.text import tokenized
from cerwu_gpu.progress import tracked

POSITIONS = 128
"""Number of tokens whose logits are compared at a time, which bounds float64 copies."""
MASKED_SHARE = 8
"""Number of forward passes that predict all tokens: in each, one token in this many is masked."""


class Window(NamedTuple):
    """A range of tokens, begin ... end - 1, of which the last `counted` are predicted."""

    begin: int
    end: int
    counted: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Distance of a compressed model from its original, over the same predicted tokens."""

    perplexity: float
    """Exponential of the compressed model's mean negative log likelihood; inf on overflow."""
    original_perplexity: float
    kl_divergence: float
    """Mean of KL(original || compressed) per predicted token, in nats; 0 for equal models."""
    top1_agreement: float
    """Share of the tokens at which both models have the same most likely next token."""
    tokens: int
    """Number of predicted tokens."""


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str,
    *,
    context_length: int = 512,
    stride: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 4,
    progress: bool = False,
) -> float:
    """Return exp(total negative log likelihood / counted tokens); infinite on overflow.

    Arguments and errors are those of `negative_log_likelihood`.
    """
    total, tokens = negative_log_likelihood(
        model,
        tokenizer,
        text,
        context_length=context_length,
        stride=stride,
        max_windows=max_windows,
        batch_size=batch_size,
        progress=progress,
    )
    return perplexity_of(total / tokens)


@torch.no_grad()
def compare(
    model: PreTrainedModel,
    original: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str,
    *,
    context_length: int = 512,
    stride: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 4,
    progress: bool = False,
) -> Comparison:
    """Compare a compressed model with its original, in one pass over the text with both.

    KL(p || q) = sum over the vocabulary of p (log p - log q), p the original's distribution of the
    next token and q the compressed model's. Log probabilities are float32, sums float64; the logits
    of one batch are in memory at a time.

    Arguments and errors are those of `negative_log_likelihood`, for both models.

    Raises:
        ModelError: the models have vocabularies of different size.
    """
    batches = _batches(
        (model, original), tokenizer, text, context_length, stride, max_windows, batch_size
    )
    mask = mask_token(model, tokenizer)
    sums = torch.zeros(4, dtype=torch.float64)
    total = 0
    for tokens, counted in tracked(batches, what="comparison", unit="batch", shown=progress):
        pair = (_logits(one, tokens, mask) for one in (original, model))
        for before, after, row, count in zip(*pair, tokens, counted, strict=True):
            sums.add_(_compared(before, after, row, count))
            total += count
    after_loss, before_loss, divergence, agreed = (sums / total).tolist()
    return Comparison(
        perplexity=perplexity_of(after_loss),
        original_perplexity=perplexity_of(before_loss),
        kl_divergence=divergence,
        top1_agreement=agreed,
        tokens=total,
    )


def check_same_tokens(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase | None, text: str
) -> None:
    """Refuse to compare models whose tokenizers differ.

    Raises:
        ModelError: the tokenizers cut the text into different tokens.
    """
    if other is not None and not torch.equal(tokenized(text, tokenizer), tokenized(text, other)):
        raise ModelError(
            "the two models cut the text into different tokens: compare a model with the one "
            "that it was made of."
        )


@torch.no_grad()
def negative_log_likelihood(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str,
    *,
    context_length: int = 512,
    stride: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 4,
    progress: bool = False,
) -> tuple[float, int]:
    """Return (total negative log likelihood in nats, number of predicted tokens) of a text.

    The text is tokenized whole. Each window of `context_length` tokens begins `stride` tokens
    after the one before, and counts the tokens that no earlier window has read; the first token
    of the text, and of each window where windows do not overlap, has no prediction.

    Args:
        model: run on its device and in its dtype; put into eval mode.
        stride: at most `context_length`; None: `context_length`, no overlap.
        max_windows: maximum number of windows; None: the whole text.
        batch_size: windows per forward pass.
        progress: show a bar over the windows on stderr.

    Raises:
        ConfigError: a number is out of its range.
        CalibrationError: the text is empty or has fewer than two tokens.
        ModelError: there is no tokenizer, or it does not belong to the model, or the context is
            longer than the model's.
    """
    batches = _batches((model,), tokenizer, text, context_length, stride, max_windows, batch_size)
    mask = mask_token(model, tokenizer)
    losses = [
        _batch_loss(model, tokens.to(model.device), counted, mask)
        for tokens, counted in tracked(batches, what="perplexity", unit="batch", shown=progress)
    ]
    return sum(losses), sum(sum(counted) for _, counted in batches)


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel, tokens: Tensor, batch_size: int = 4, mask: int | None = None
) -> float:
    """Return the mean negative log likelihood in nats per predicted token of int64 [samples,
    sequence]; `mask` is the mask token of a masked language model."""
    model.train(False)
    count = tokens.shape[1] - 1
    total = 0.0
    for batch in torch.split(tokens, batch_size):
        total += _batch_loss(model, batch.to(model.device), [count] * len(batch), mask)
    return total / (count * len(tokens))


def sliding_windows(tokens: int, context_length: int, stride: int) -> Iterator[Window]:
    """Yield the windows over a text of `tokens` tokens, without those that predict nothing."""
    read = 0
    for begin in range(0, tokens, stride):
        end = min(begin + context_length, tokens)
        # The first token of a window has nothing before it that could predict it.
        counted = min(end - read, end - begin - 1)
        if counted > 0:
            yield Window(begin, end, counted)
        read = end
        if end == tokens:
            return


def _batches(
    models: Sequence[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase | None,
    text: str,
    context_length: int,
    stride: int | None,
    max_windows: int | None,
    batch_size: int,
) -> list[tuple[Tensor, list[int]]]:
    """Return tokens int64 [batch, sequence] of consecutive windows of one length, with the number
    of last tokens to be predicted in each row; put the models into eval mode."""
    stride = context_length if stride is None else stride
    _check(context_length, stride, max_windows, batch_size)
    for model in models:
        require_predictions(model)
    ids = tokenized(text, tokenizer)
    if len(ids) < 2:
        raise CalibrationError(
            f"the evaluation text has {len(ids)} tokens and leaves nothing to predict: "
            "give a longer one."
        )
    for model in models:
        check_tokens(model, ids, min(context_length, len(ids)))
        model.train(False)
    windows = list(sliding_windows(len(ids), context_length, stride))[:max_windows]
    batches = []
    for first in range(0, len(windows), batch_size):
        # Only the last window of a text is shorter than the others.
        for _, group in groupby(windows[first : first + batch_size], lambda w: w.end - w.begin):
            pairs = [(ids[window.begin : window.end], window.counted) for window in group]
            rows, counted = zip(*pairs, strict=True)
            batches.append((torch.stack(rows), list(counted)))
    return batches


def _check(context_length: int, stride: int, max_windows: int | None, batch_size: int) -> None:
    if context_length < 2:
        raise ConfigError(f"context_length is {context_length}: give at least 2.")
    if not 1 <= stride <= context_length:
        raise ConfigError(f"stride is {stride}: give 1 to context_length ({context_length}).")
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"max_windows is {max_windows}: give at least 1.")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: give at least 1.")


def _batch_loss(
    model: PreTrainedModel, tokens: Tensor, counted: list[int], mask: int | None
) -> float:
    """Return the loss summed over the last counted[i] tokens of row i, int64 [batch, sequence]."""
    logits = _logits(model, tokens, mask)
    total = 0.0
    for row, ids, count in zip(logits, tokens, counted, strict=True):
        # One row at a time: in float32 the logits are the largest tensor of all.
        predictions = row[-count - 1 : -1].float()
        total += float(functional.cross_entropy(predictions, ids[-count:], reduction="sum"))
    return total


def _logits(model: PreTrainedModel, tokens: Tensor, mask: int | None) -> Tensor:
    """Return logits [batch, sequence, vocabulary] in the model's dtype, on its device; those at a
    token predict the next one."""
    tokens = tokens.to(model.device)
    if mask is None:
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits
    turns = torch.arange(tokens.shape[1], device=tokens.device) % MASKED_SHARE
    predictions: Tensor | None = None
    for turn in range(min(MASKED_SHARE, tokens.shape[1])):
        masked = turns == turn
        output: Tensor = model(input_ids=tokens.masked_fill(masked, mask)).logits
        predictions = torch.empty_like(output) if predictions is None else predictions
        predictions[:, masked] = output[:, masked]
    assert predictions is not None
    return predictions.roll(-1, dims=1)


def _compared(before: Tensor, after: Tensor, ids: Tensor, count: int) -> Tensor:
    """Return sums over the last `count` tokens of one row, [4] float64 on the CPU: the losses of
    the compressed and the original model, KL(original || compressed), agreements.

    Args:
        before, after: logits [sequence, vocabulary] of the original and the compressed model.
        ids: int64 [sequence], the tokens.
    """
    if before.shape != after.shape:
        raise ModelError(
            f"the original has {before.shape[-1]} logits and the model {after.shape[-1]}: "
            "they do not belong together."
        )
    sums = torch.zeros(4, dtype=torch.float64)
    places = slice(-count - 1, -1)
    chunks = [torch.split(x, POSITIONS) for x in (before[places], after[places], ids[-count:])]
    for old, new, targets in zip(*chunks, strict=True):
        log_p = old.float().log_softmax(-1)
        log_q = new.float().to(log_p.device).log_softmax(-1)
        index = targets.to(log_p.device)[:, None]
        p = log_p.exp()
        # Tokens that the original rules out (log p = -inf) count 0 whatever q is.
        divergence = torch.where(p > 0, p * (log_p - log_q), 0.0)
        agreed = log_p.argmax(-1) == log_q.argmax(-1)
        terms = (-log_q.gather(-1, index), -log_p.gather(-1, index), divergence, agreed)
        sums += torch.stack([term.sum(dtype=torch.float64) for term in terms]).cpu()
    return sums


def perplexity_of(mean: float) -> float:
    """Return exp of a mean negative log likelihood in nats; infinite on overflow."""
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


TASK_SUFFIXES = (".yaml", ".yml")


def task_results(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int = 4,
    examples: int | None = None,
) -> dict[str, dict[str, float]]:
    """Return task -> metric -> value, as `lm_eval.simple_evaluate` names and computes them.

    Args:
        model: run on its device.
        tasks: names that lm-eval knows, or files of tasks (.yaml).
        batch_size: requests per forward pass.
        examples: maximum number per task; None: all.

    Raises:
        ConfigError: lm-eval is not installed, a task is unknown, or it cannot be run (its data
            set cannot be fetched).
    """
    check_tasks_available()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    named = [str(Path(t).absolute()) if t.endswith(TASK_SUFFIXES) else t for t in tasks]
    try:
        output = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=named,
            task_manager=_task_manager(not all(t.endswith(TASK_SUFFIXES) for t in tasks)),
            limit=examples,
            log_samples=False,
        )
    except Exception as error:  # whatever a task's data set or code raises
        raise ConfigError(
            f"lm-eval cannot run {', '.join(tasks)} ({reason(error)}): check the names "
            "(`lm-eval ls tasks`) and the network."
        ) from error
    results: dict[str, dict[str, object]] = output["results"]
    return {task: _metrics(values) for task, values in results.items()}


@cache
def _task_manager(named: bool) -> Any:
    """Return lm-eval's registry; with its own tasks, `named`, it reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=named)


def check_tasks_available() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "tasks need lm-eval, which is not installed: pip install 'cerwu_gpu[eval]'."
        ) from error


def _metrics(values: dict[str, object]) -> dict[str, float]:
    """Return the numbers of a task; "acc,none" becomes "acc", other filters keep their name."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if "," in name and isinstance(value, int | float)
    }
