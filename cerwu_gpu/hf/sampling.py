"""Calibration text that the model writes itself."""

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from cerwu_gpu.errors import CalibrationError
from cerwu_gpu.progress import counted


@torch.no_grad()
def sampled_tokens(
    model: PreTrainedModel,
    bos: int | None,
    *,
    samples: int,
    sequence_length: int,
    batch_size: int,
    seed: int,
    progress: bool = False,
) -> Tensor:
    """Tokens drawn from the model's own distribution, int64 [samples, sequence_length], on the CPU.

    Each sequence begins with `bos`, or else with the model's own beginning or end token; the end
    token is not drawn. The same seed gives the same tokens; the global random state is kept.

    Raises:
        CalibrationError: nothing says with which token to begin.
    """
    start = _first_token(model, bos)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=1.0,  # generate() takes what is not said here from the model's own settings
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=sequence_length - 1,
        min_new_tokens=sequence_length - 1,
        pad_token_id=start,
        bos_token_id=start,
    )
    cuda = [model.device] if model.device.type == "cuda" else []
    batches = []
    with (
        torch.random.fork_rng(cuda),
        counted(samples, what="sample text", unit="sample", shown=progress) as bar,
    ):
        torch.manual_seed(seed)
        for first in range(0, samples, batch_size):
            count = min(batch_size, samples - first)
            prompt = torch.full((count, 1), start, device=model.device)
            drawn: Tensor = model.generate(  # type: ignore[operator]
                prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
            )
            batches.append(drawn.cpu())
            bar.update(count)
    return torch.cat(batches)


def _first_token(model: PreTrainedModel, bos: int | None) -> int:
    config = model.config.get_text_config()
    named = (getattr(config, field, None) for field in ("bos_token_id", "eos_token_id"))
    for token in (bos, *named):
        if isinstance(token, int):
            return token
        if isinstance(token, list) and token:
            return int(token[0])
    raise CalibrationError(
        "the model names no token to begin a text with, so none can be sampled from it: "
        "give a calibration text."
    )
