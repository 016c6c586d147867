"""A language model as the subject of a sweep: its adapter, and its perplexity as the measure."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cerwu_gpu.calibration.running import placed
from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.device import find_device
from cerwu_gpu.hf.causal_lm import CausalLM
from cerwu_gpu.hf.evaluation import perplexity
from cerwu_gpu.hf.loading import load_compressed
from cerwu_gpu.hf.models import bytes_of_original, load_model, require_tokenizer
from cerwu_gpu.sweep.model import Measure, ModelSubject, kept_hessians


def language_subject(
    model: str | Path,
    base: CompressionConfig,
    text: str,
    hessian_cache: Path,
    *,
    context_length: int = 512,
    max_windows: int | None = None,
    batch_size: int = 4,
    device: str | torch.device | None = None,
    progress: bool = False,
    trust_remote_code: bool = False,
) -> ModelSubject:
    """Load a causal language model and tokenize its calibration text.

    Args:
        model: hub name, local directory or .gguf file.
        base: which weights, and what calibrates: the points' settings of these are ignored; its
            keep_head says that no point quantizes the head.
        text: evaluation text.
        hessian_cache: directory for Hessians and sensitivities.
        context_length, max_windows, batch_size: of the evaluation, as for `perplexity`.
        device: where blocks are worked on and models are evaluated.
        progress: show bars over calibration on stderr.

    Raises:
        CerwuError: a subclass that says what is wrong.
    """
    base = kept_hessians(base)
    target = find_device(device)
    loaded = load_model(model, trust_remote_code=trust_remote_code)
    tokenizer = require_tokenizer(loaded.tokenizer)
    adapter = CausalLM(loaded, base, device=target, progress=progress)
    adapter.calibrate(base, hessian_cache=hessian_cache)

    def evaluate(module: Any) -> float:
        with placed(module, target):
            return perplexity(
                module,
                tokenizer,
                text,
                context_length=context_length,
                max_windows=max_windows,
                batch_size=batch_size,
            )

    load: Callable[[Path], Any] = lambda folder: load_compressed(folder, device=target)  # noqa: E731
    measure = Measure(
        "perplexity",
        evaluate,
        load,
        {
            "evaluation text": hashlib.sha256(text.encode()).hexdigest(),
            "evaluation windows": f"{max_windows} of {context_length} tokens",
        },
    )
    name = Path(model).expanduser().resolve().name
    return ModelSubject(name, adapter, measure, base, bytes_of_original(model, loaded.model))
