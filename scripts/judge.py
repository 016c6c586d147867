"""The demo's model in bfloat16, judged on WikiText-2's test text and on Python's documentation.

What other scripts of measurements share: windows of both texts, the original's predictions, and
settings compared at equal bits.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cerwu_gpu.config import Source, Text
from cerwu_gpu.hf.models import LoadedModel, load_model
from cerwu_gpu.hf.sources import Windows, calibration_tokens
from cerwu_gpu.hf.text import demo_text, load_text, tokenized
from scripts.demo import model_file

LENGTH, BATCH = 512, 4
"""Tokens of a window, and windows that run together."""
TOLERANCE = 0.004
"""Largest difference of bits per weight, relative, of settings that are compared."""
SEARCHES = 4
"""Most searches for the lmbda that gives the bits."""


class Quality(NamedTuple):
    """Distance from the original on one text.

    Attributes:
        perplexity: of the compressed model.
        kl: KL(original || compressed) per predicted token, in nats.
    """

    perplexity: float
    kl: float


class Judge:
    """The model, and the original's last hidden states on windows of both texts."""

    def __init__(self, wikitext: Path, windows: int, dtype: torch.dtype = torch.bfloat16) -> None:
        """Load the model; `wikitext` is a folder with valid.txt and wiki.test.raw.

        float32 is several times faster on processors that have no bfloat16.
        """
        self.loaded: LoadedModel = load_model(model_file(), dtype=dtype)
        self.validation = load_text(str(wikitext / "valid.txt"))
        self.texts = {
            "wikitext2": load_text(str(wikitext / "wiki.test.raw")),
            "python": demo_text()[1],
        }
        ids = {name: tokenized(text, self.loaded.tokenizer) for name, text in self.texts.items()}
        self.windows = {
            name: x[: min(windows, len(x) // LENGTH) * LENGTH].view(-1, LENGTH)
            for name, x in ids.items()
        }
        self._original = {name: self._hidden(x) for name, x in self.windows.items()}

    def calibration(self, samples: int) -> Tensor:
        """Return windows of WikiText-2's validation text, int64 [samples, LENGTH]."""
        windows = Windows(
            samples=samples, sequence_length=LENGTH, seed=0, batch_size=samples, held_out=0
        )
        source = Source(Text(self.validation), 1.0)
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        return calibration_tokens([source], model, tokenizer, windows).tokens

    @torch.no_grad()
    def _hidden(self, tokens: Tensor, model: Any = None) -> Tensor:
        base: Any = (model or self.loaded.model).base_model
        parts = [base(input_ids=x, use_cache=False)[0] for x in torch.split(tokens, BATCH)]
        return torch.cat(parts)

    @torch.no_grad()
    def quality(self, windows: int | None = None) -> dict[str, Quality]:
        """Return the quality of the model as it is now, on each text."""
        head: Any = self.loaded.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        result = {}
        for name, tokens in self.windows.items():
            loss = divergence = 0.0
            count = 0
            tokens = tokens[:windows]
            for ids, before, after in zip(
                tokens, self._original[name], self._hidden(tokens), strict=False
            ):
                log_p, log_q = (head(x[:-1]).float().log_softmax(-1) for x in (before, after))
                loss += float(functional.nll_loss(log_q, ids[1:], reduction="sum"))
                divergence += float((log_p.exp() * (log_p - log_q)).sum())
                count += len(ids) - 1
            result[name] = Quality(math.exp(loss / count), divergence / count)
        return result


@dataclass(frozen=True)
class Measured:
    """A setting at the wanted bits."""

    lmbda: float
    bits: float
    quality: Mapping[str, Quality]

    def row(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        quality = {name: x._asdict() for name, x in self.quality.items()}
        return {"lmbda": self.lmbda, "bits": self.bits, **quality}


def at_bits(
    wanted: float,
    lmbda: float,
    quantize: Callable[[float], float],
    judged: Callable[[], Mapping[str, Quality]],
) -> Measured:
    """Search for the lmbda that gives the bits, and judge the result.

    Args:
        lmbda: of the first search.
        quantize: puts the quantized weights into the model, and returns the bits per weight.
    """
    bits = quantize(lmbda)
    slope = -0.5  # of bits by log2 lmbda, as at high rates
    for _ in range(SEARCHES - 1):
        if abs(bits / wanted - 1) <= TOLERANCE:
            break
        tried = lmbda * 2 ** ((wanted - bits) / slope)
        now = quantize(tried)
        if now != bits:
            slope = min(-0.2, (now - bits) / math.log2(tried / lmbda))
        lmbda, bits = tried, now
    return Measured(lmbda, bits, judged())


def noted(row: Mapping[str, Any], path: Path) -> None:
    """Print a result, and append it to a JSON Lines file."""
    line = json.dumps(row)
    print(line, flush=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
