"""Encoders with a masked-language-model head (BERT, RoBERTa, ModernBERT): masked tokens are
predicted from both sides.

They differ from causal language models in what they are run on and in what predicts a token: a
share of the calibration tokens is replaced by the mask token, and the loss is that of those tokens.
They are judged by their pseudo-perplexity (Salazar et al., arXiv 1910.14659; evaluation.py).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cerwu_gpu.config import Calibration, CompressionConfig, Source
from cerwu_gpu.errors import CalibrationError
from cerwu_gpu.hf.causal_lm import CausalLM
from cerwu_gpu.hf.models import mask_token
from cerwu_gpu.hf.text import SELF

MASKED_PERCENT = 15
"""Share of the calibration tokens that is masked, the usual one in training."""
_STRIDES = (104_729, 7_919)
"""Primes that hash a token's position and id to decide whether it is masked."""


class MaskedLM(CausalLM):
    """An encoder with a masked-language-model head and its calibration text."""

    run_options: Mapping[str, Any] = {}
    overlap = None
    usual_sources = (Source("wikitext2", 1.0),)

    def calibrate(self, config: CompressionConfig, **options: Any) -> None:
        given = config.calibration
        if isinstance(given, Calibration) and any(text == SELF for text, _ in given.sources):
            raise CalibrationError(
                f"{type(self.module).__name__} generates no text: give a calibration text."
            )
        self._mask()
        super().calibrate(config, **options)

    def inputs(self, tokens: Tensor) -> Tensor:
        return tokens.masked_fill(_is_masked(tokens), self._mask())

    def predicted(self, tokens: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        masked = _is_masked(tokens)
        return logits[masked.to(logits.device)], tokens[masked]

    def loss_scale(self, tokens: Tensor) -> float:
        return math.sqrt(tokens.numel() / int(_is_masked(tokens).sum()))

    def _mask(self) -> int:
        """Return the mask token's id.

        Raises:
            ModelError: the tokenizer has none.
        """
        mask = mask_token(self.module, self.loaded.tokenizer)
        assert mask is not None, "this is a masked language model"
        return mask


def _is_masked(tokens: Tensor) -> Tensor:
    """Return which tokens, int64 [batch, sequence], are masked: one or more per sequence."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    masked = (positions * _STRIDES[0] + tokens * _STRIDES[1]) % 100 < MASKED_PERCENT
    masked[:, tokens.shape[1] // 2] |= ~masked.any(dim=1)
    return masked
