"""Trial runs of a language model on a few tokens before the work, and what they may raise."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cerwu_gpu.errors import CerwuError, ModelError, reason

OURS = __name__.partition(".")[0]
"""Name of this package."""
ENGINE = "_engine_run_backward"
"""Function of torch that runs a backward pass."""


def trial_tokens(vocabulary: int) -> Tensor:
    """Return two samples of a few tokens, int64 [2, sequence], that differ."""
    tokens = torch.arange(min(8, vocabulary)).expand(2, -1).clone()
    tokens[1] = tokens[1].flip(0)
    return tokens


def require_runs(model: PreTrainedModel) -> None:
    """Refuse a model that does not run on tokens alone.

    Raises:
        ModelError: it does not, with what its code says as the cause.
    """
    model.train(False)
    try:
        embedding: Any = model.get_input_embeddings().weight
        with torch.no_grad():
            model(input_ids=trial_tokens(len(embedding)).to(model.device), use_cache=False)
    except (CerwuError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the model's code makes of it
        raise ModelError(
            f"{type(model).__name__} cannot be run on tokens alone ({sentence_of(error)}): it is "
            "not supported."
        ) from error


@contextmanager
def refusing(model: PreTrainedModel) -> Iterator[None]:
    """Turn what a model's own code raises into one sentence; errors of this package's code, which
    no model is to blame for, pass.

    Raises:
        ModelError: the model's code raised, which is the cause.
    """
    try:
        yield
    except (CerwuError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if raised_here(error):
            raise
        raise ModelError(
            f"{type(model).__name__} cannot be run block by block with gradients "
            f"({sentence_of(error)}): its architecture is not supported."
        ) from error


def raised_here(error: BaseException) -> bool:
    """Return whether this package's code, or torch called from it, raised an exception. A backward
    pass shows no frame of the code that it differentiates, which is the model's."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if frames and frames[-1].f_code.co_name == ENGINE:
        return False
    names = [frame.f_globals.get("__name__", "").partition(".")[0] for frame in frames]
    return [name for name in names if name != "torch"][-1:] == [OURS]


def sentence_of(error: BaseException) -> str:
    """Return an exception's sentence, behind its kind where it is another library's: a KeyError
    alone says nothing."""
    said = reason(error)
    kind = type(error).__name__
    return said if isinstance(error, CerwuError) or said == kind else f"{kind}: {said}"
