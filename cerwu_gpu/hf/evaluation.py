"""Perplexity by sliding windows, as in the transformers documentation."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cerwu_gpu.errors import CalibrationError, ConfigError
from cerwu_gpu.hf.models import check_tokens
from cerwu_gpu.hf.text import tokenized


class Window(NamedTuple):
    """Tokens begin ... end - 1 are read, the last `counted` of them are predicted."""

    begin: int
    end: int
    counted: int


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
    """exp(total negative log likelihood / counted tokens); infinite where that overflows.

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
    try:
        return math.exp(total / tokens)
    except OverflowError:
        return math.inf


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
    """(total negative log likelihood in nats, number of predicted tokens) of a text.

    The text is tokenized whole. Each window of `context_length` tokens begins `stride` tokens
    after the one before, and counts the tokens that no earlier window has read; the first token
    of the text, and of each window where windows do not overlap, has no prediction.

    Args:
        model: where and in which dtype it is; put into eval mode.
        stride: at most `context_length`; None: `context_length`, no overlap.
        max_windows: stop after so many windows; None: the whole text.
        batch_size: windows per forward pass.
        progress: show a bar over the windows on stderr.

    Raises:
        ConfigError: a number is out of its range.
        CalibrationError: the text is empty or has fewer than two tokens.
        ModelError: there is no tokenizer, or it does not belong to the model, or the context is
            longer than the model's.
    """
    stride = context_length if stride is None else stride
    _check(context_length, stride, max_windows, batch_size)
    ids = tokenized(text, tokenizer)
    if len(ids) < 2:
        raise CalibrationError(
            f"the evaluation text has {len(ids)} tokens and leaves nothing to predict: "
            "give a longer one."
        )
    check_tokens(model, ids, min(context_length, len(ids)))
    windows = list(sliding_windows(len(ids), context_length, stride))[:max_windows]
    model.train(False)
    total = 0.0
    with tqdm(total=len(windows), desc="perplexity", unit="window", disable=not progress) as bar:
        for group in _batches(windows, batch_size):
            tokens = torch.stack([ids[window.begin : window.end] for window in group])
            total += _batch_loss(model, tokens.to(model.device), [w.counted for w in group])
            bar.update(len(group))
    return total, sum(window.counted for window in windows)


@torch.no_grad()
def token_loss(model: PreTrainedModel, tokens: Tensor, batch_size: int = 4) -> tuple[float, int]:
    """(total negative log likelihood in nats, predicted tokens) of int64 [samples, sequence]."""
    model.train(False)
    count = tokens.shape[1] - 1
    total = 0.0
    for batch in torch.split(tokens, batch_size):
        total += _batch_loss(model, batch.to(model.device), [count] * len(batch))
    return total, count * len(tokens)


def sliding_windows(tokens: int, context_length: int, stride: int) -> Iterator[Window]:
    """The windows over a text of so many tokens; those that predict nothing are left out."""
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


def _check(context_length: int, stride: int, max_windows: int | None, batch_size: int) -> None:
    if context_length < 2:
        raise ConfigError(f"context_length is {context_length}: give at least 2.")
    if not 1 <= stride <= context_length:
        raise ConfigError(f"stride is {stride}: give 1 to context_length ({context_length}).")
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"max_windows is {max_windows}: give at least 1.")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: give at least 1.")


def _batches(windows: list[Window], batch_size: int) -> Iterator[list[Window]]:
    """Consecutive windows of one length; only the last window of a text is shorter."""
    for first in range(0, len(windows), batch_size):
        group = windows[first : first + batch_size]
        full = [w for w in group if w.end - w.begin == group[0].end - group[0].begin]
        yield full
        if len(full) < len(group):
            yield group[len(full) :]


def _batch_loss(model: PreTrainedModel, tokens: Tensor, counted: list[int]) -> float:
    """Summed loss of the last `counted` tokens of each row of int64 [batch, sequence]."""
    logits = model(input_ids=tokens, use_cache=False).logits
    total = 0.0
    for row, ids, count in zip(logits, tokens, counted, strict=True):
        # One row at a time: in float32 the logits are the largest tensor of all.
        predictions = row[-count - 1 : -1].float()
        total += float(functional.cross_entropy(predictions, ids[-count:], reduction="sum"))
    return total
