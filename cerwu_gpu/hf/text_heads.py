"""Text models that predict no tokens: classifiers of sequences or tokens, and embedding models.

They run block by block like language models, on the same windows of text. Without labels their
loss's curvature is that of labels drawn from the model's own distribution (calibration/
sensitivity.py); an embedding's error is half the squared distance of the unit vectors, one minus
their cosine.
"""

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cerwu_gpu.calibration.sensitivity import drawn_gradient, drawn_signs
from cerwu_gpu.config import Calibration, CompressionConfig, MaxPerplexityIncrease, Source
from cerwu_gpu.errors import CalibrationError, ConfigError
from cerwu_gpu.files import read_json
from cerwu_gpu.hf.causal_lm import CausalLM
from cerwu_gpu.hf.text import SELF

POOLED: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_tokens": "mean",
}
"""Ways to pool that sentence-transformers had a setting for, and their names."""


class TextClassifier(CausalLM):
    """A classifier of sequences or of their tokens, and its calibration text."""

    predicts_tokens = False
    distils = False
    overlap = None
    usual_sources = (Source("wikitext2", 1.0),)

    @property
    def run_options(self) -> Mapping[str, Any]:  # type: ignore[override]
        base: Any = self.module.base_model
        caches = "use_cache" in inspect.signature(base.forward).parameters
        return {"use_cache": False} if caches else {}

    def calibrate(self, config: CompressionConfig, **options: Any) -> None:
        kind, given = type(self.module).__name__, config.calibration
        if isinstance(given, Calibration) and any(text == SELF for text, _ in given.sources):
            raise CalibrationError(f"{kind} generates no text: give a calibration text.")
        if isinstance(config.target, MaxPerplexityIncrease):
            raise ConfigError(f"{kind} has no perplexity: give another target, or lmbda.")
        if config.distillation is not None:
            raise ConfigError(f"{kind} cannot be distilled: drop distillation.")
        super().calibrate(config, **{**options, "judged": False})

    def at_once(self, length: int) -> int:
        # A decoder classifies at the last token that is no padding, and must know padding by then.
        padded = self.module.config.get_text_config().pad_token_id is not None
        return super().at_once(length) if padded else 1

    def total_loss(self, tokens: Tensor, logits: Tensor) -> Tensor:
        scores = logits.flatten(0, -2).float()
        generator = torch.Generator().manual_seed(int(tokens.sum()))
        kind = self.module.config.problem_type
        if kind == "multi_label_classification":
            p = torch.sigmoid(scores.detach())
            gradient = (p * (1 - p)).sqrt() * drawn_signs(p, generator)
        elif kind == "regression" or scores.shape[1] == 1:
            gradient = drawn_signs(scores, generator)
        else:
            gradient = drawn_gradient(scores, generator)
        return math.sqrt(tokens.numel() / len(scores)) * (scores * gradient).sum()


class Embedder(TextClassifier):
    """An encoder or decoder without a head, whose hidden states embed a text or its tokens."""

    def total_loss(self, tokens: Tensor, logits: Tensor) -> Tensor:
        vectors = functional.normalize(pooled(logits.float(), pooling_of(self.loaded.files)), dim=1)
        generator = torch.Generator().manual_seed(int(tokens.sum()))
        scale = math.sqrt(tokens.numel() / len(vectors))
        return scale * (vectors * drawn_signs(vectors, generator)).sum()


def pooled(states: Tensor, pooling: str | None) -> Tensor:
    """Return embeddings [count, width] of hidden states [batch, sequence, width], pooled in the way
    of this name; of None those of all tokens."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "lasttoken":
        return states[:, -1]
    return states.mean(dim=1) if pooling == "mean" else states.flatten(0, 1)


def pooling_of(folder: Path | None) -> str | None:
    """Return the name of the way to pool that a model's directory gives to sentence-transformers;
    None where it is not known."""
    try:
        modules = [] if folder is None else read_json(folder / "modules.json")
        paths = [x["path"] for x in modules if str(x["type"]).endswith(".Pooling")]
        content = read_json(folder / paths[0] / "config.json") if folder and paths else {}
        named = content.get("pooling_mode")
        old = [name for setting, name in POOLED.items() if content.get(setting) is True]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return str(named) if named is not None else (old[0] if len(old) == 1 else None)
