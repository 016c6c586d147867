"""Tokens that calibrate a language model, from one text or from several with shares."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cerwu_gpu.config import Calibration, CompressionConfig, ImageTextCalibration, Source, Text
from cerwu_gpu.hf.text import (
    SELF,
    CalibrationTokens,
    load_text,
    sampled_tokens,
    text_file,
    token_windows,
)

LEAST_COLUMNS = 8192
"""Columns of a matrix up to which the number of calibration tokens does not follow from them."""


def calibration_files(config: CompressionConfig) -> dict[str, Path | None]:
    """Return the files that calibrate, as `check_apart` takes what is read."""
    calibration = config.calibration
    if isinstance(calibration, ImageTextCalibration):
        calibration = calibration.text
    names = calibration.names if isinstance(calibration, Calibration) else None
    files = [path for path in map(text_file, names or ()) if path is not None]
    if len(files) < 2:
        return {"the calibration text": files[0] if files else None}
    return {f"calibration text {number}": path for number, path in enumerate(files, start=1)}


def with_sources(config: CompressionConfig, usual: Sequence[Source]) -> CompressionConfig:
    """Return the configuration with the usual texts where it asks for them."""
    calibration = config.calibration
    if isinstance(calibration, ImageTextCalibration):
        text = with_sources(replace(config, calibration=calibration.text), usual).calibration
        assert isinstance(text, Calibration)
        return replace(config, calibration=replace(calibration, text=text))
    if not (usual and isinstance(calibration, Calibration) and calibration.source is None):
        return config
    given = tuple(
        f"{source.text}:{source.share:g}" for source in usual if isinstance(source.text, str)
    )
    only = usual[0].text if len(usual) == 1 else given
    return replace(config, calibration=replace(calibration, source=only))


def usual_samples(columns: int, calibration: Calibration) -> int:
    """Return the number of calibration samples for a widest matrix of so many columns."""
    tokens = calibration.tokens_per_column * max(LEAST_COLUMNS, columns)
    return -(-tokens // calibration.sequence_length)


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Numbers and lengths of the windows to take.

    Attributes:
        samples: number of windows that calibrate; `held_out` is that of held-out ones.
        sequence_length: tokens per window.
        seed: chooses the windows of a text, and draws what the model writes.
        batch_size: windows that the model writes together.
    """

    samples: int
    sequence_length: int
    seed: int
    batch_size: int
    held_out: int = 0


def calibration_tokens(
    sources: Sequence[Source],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    windows: Windows,
    *,
    progress: bool = False,
) -> CalibrationTokens:
    """Return at most `samples` windows to calibrate with, and at most `held_out` held-out ones.

    Each source gives its share: windows of a `Text` or of a named text (`load_text`); for the name
    self they are sampled from the model. Windows of several sources alternate, so that any first
    part of them has about the same shares.

    Raises:
        CalibrationError: a text is missing or too short.
        ModelError: there is no tokenizer for a text.
    """
    counts = apportioned(windows.samples, [share for _, share in sources])
    held_out = apportioned(windows.held_out, [share for _, share in sources])
    parts: list[CalibrationTokens] = []
    events: list[str] = []
    for (text, _), count, apart in zip(sources, counts, held_out, strict=True):
        if not count:
            continue
        part = _tokens(text, model, tokenizer, windows, count, apart, progress)
        named = f"{text}: " if len(sources) > 1 and isinstance(text, str) else ""
        events += [f"{named}{event}" for event in part.events]
        parts.append(part)
    return CalibrationTokens(
        alternating([part.tokens for part in parts]),
        alternating([part.held_out for part in parts]),
        tuple(events),
    )


def _tokens(
    text: str | Text,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    windows: Windows,
    samples: int,
    held_out: int,
    progress: bool,
) -> CalibrationTokens:
    """Return the windows of one source."""
    length, seed = windows.sequence_length, windows.seed
    if text == SELF:
        draw = partial(
            sampled_tokens,
            model,
            None if tokenizer is None else tokenizer.bos_token_id,
            sequence_length=length,
            batch_size=windows.batch_size,
            progress=progress,
        )
        tokens = draw(samples=samples, seed=seed)
        judging = draw(samples=held_out, seed=seed + 1) if held_out else tokens[:0]
        return CalibrationTokens(tokens, judging)
    content = text.content if isinstance(text, Text) else load_text(text)
    embedding: Any = model.get_input_embeddings()
    vocabulary = int(embedding.weight.shape[0])
    return token_windows(content, tokenizer, samples, length, seed, held_out, vocabulary)


def apportioned(count: int, shares: Sequence[float]) -> list[int]:
    """Return how many of `count` fall to each share, by largest remainders; where there are enough
    for all, at least 1."""
    exact = [share * count / sum(shares) for share in shares]
    counts = [int(x) for x in exact]
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for index in order[: count - sum(counts)]:
        counts[index] += 1
    while count >= len(shares) and min(counts) == 0:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] = 1
    return counts


def alternating(parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of several tensors, int64 [count, sequence], spread evenly over all."""
    places = [(k + 0.5) / len(part) for part in parts for k in range(len(part))]
    rows = torch.cat(list(parts))
    return rows[sorted(range(len(rows)), key=lambda i: (places[i], i))]
