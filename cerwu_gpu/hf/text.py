"""Text for calibration and evaluation, and its tokens."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cerwu_gpu.errors import CalibrationError, reason
from cerwu_gpu.files import local_path
from cerwu_gpu.hf.models import require_tokenizer
from cerwu_gpu.progress import counted

SHORT_NAMES = {"wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1"}
SELF = "self"
Part = Literal["calibration", "evaluation"]
SPLITS: dict[Part, str] = {"calibration": "train", "evaluation": "test"}
EVALUATION_SHARE = 4
"""Number of Python's help topics of which one goes into the evaluation text."""


class CalibrationTokens(NamedTuple):
    """Tokens that calibrate a model, and held-out ones that judge it.

    Attributes:
        tokens: int64 [samples, sequence].
        held_out: int64 [samples, sequence] of the same text, disjoint from `tokens`; empty where
            no loss is asked for or the text has no more.
        events: what did not go as planned.
    """

    tokens: Tensor
    held_out: Tensor
    events: tuple[str, ...] = ()


def batched_tokens(batches: Iterable[Any]) -> Tensor:
    """Return batches of tokens as one tensor, int64 [samples, sequence].

    Raises:
        CalibrationError: they are no tokens, or of several lengths.
    """
    tensors = list(batches)
    plain = all(isinstance(x, Tensor) and x.dim() == 2 for x in tensors)
    if not tensors or not plain or any(x.is_floating_point() for x in tensors):
        raise CalibrationError(
            "batches of a language model are tokens, integers [samples, sequence]: give such, or a "
            "text."
        )
    if len({x.shape[1] for x in tensors}) > 1:
        raise CalibrationError("batches of tokens differ in length: cut them to one length.")
    return torch.cat([x.cpu().to(torch.int64) for x in tensors])


def load_text(name: str, *, part: Part = "calibration") -> str:
    """Return a local text file (UTF-8), or the texts of a hub dataset joined by blank lines.

    A dataset is written owner/name or owner/name:configuration; wikitext2 is short for
    Salesforce/wikitext:wikitext-2-raw-v1. Its train split is for calibration, its test split for
    evaluation; a file is the same for both.

    Raises:
        CalibrationError: there is no such file or dataset, or it holds no text.
    """
    path = text_file(name)
    if path is not None:
        return _file_text(path)
    name = SHORT_NAMES.get(name, name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", name):
        raise CalibrationError(
            f"{name} is no text file, no hub dataset (owner/name) and none of "
            f"{', '.join([*SHORT_NAMES, SELF])}: check the path."
        )
    return _dataset_text(name, SPLITS[part])


def text_file(name: str) -> Path | None:
    """Return the local file of this name; None where there is none."""
    path = local_path(name)
    return path if path.is_file() else None


def _file_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read as UTF-8 text: {reason(error)}") from error


def _dataset_text(name: str, split: str) -> str:
    from datasets import load_dataset

    repository, _, configuration = name.partition(":")
    try:
        rows: Any = load_dataset(repository, configuration or None, split=split)
    except Exception as error:
        raise CalibrationError(
            f"the {split} split of dataset {name} cannot be loaded "
            f"({reason(error)}): "
            "check its name and the network, or give a text file."
        ) from error
    if "text" not in rows.column_names:
        raise CalibrationError(
            f"dataset {name} has no column text but {', '.join(rows.column_names)}: "
            "give another dataset or a text file."
        )
    return "\n\n".join(rows["text"])


def tokenized(
    text: str, tokenizer: PreTrainedTokenizerBase | None, *, special: bool = True
) -> Tensor:
    """Return the ids of a text, int64 [tokens], with the tokenizer's own special tokens if
    `special`.

    Raises:
        CalibrationError: the text is empty.
        ModelError: there is no tokenizer.
    """
    tokenizer = require_tokenizer(tokenizer)
    if not text.strip():
        raise CalibrationError("the text is empty: give one with words in it.")
    # verbose=False: a text longer than the model's context is cut into windows later.
    ids = tokenizer(text, return_attention_mask=False, verbose=False, add_special_tokens=special)[
        "input_ids"
    ]
    return torch.tensor(ids, dtype=torch.int64)


def first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the token that a text begins with: the tokenizer's BOS, or else the special
    token that it puts before a text (CLS); None: it has neither."""
    if tokenizer.bos_token_id is not None:
        return int(tokenizer.bos_token_id)
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    begins_alike = whole[: len(plain)] == plain
    return None if begins_alike else int(whole[0])


def _known_first(tokenizer: PreTrainedTokenizerBase, vocabulary: int | None) -> int | None:
    """Return the token that a text begins with, if the model has an embedding for it."""
    first = first_token(tokenizer)
    known = first is not None and (vocabulary is None or first < vocabulary)
    return first if known else None


def token_windows(
    text: str,
    tokenizer: PreTrainedTokenizerBase | None,
    samples: int,
    sequence_length: int,
    seed: int,
    held_out: int = 0,
    vocabulary: int | None = None,
) -> CalibrationTokens:
    """Return disjoint windows of a text at seeded random places, in the text's order, each behind
    the token that a text begins with, where the tokenizer has one (`first_token`).

    `samples` of them calibrate, `held_out` others are held out; fewer than `samples` is an event.
    A first token beyond the model's `vocabulary` is left out.

    Raises:
        CalibrationError: the text is empty or shorter than one window.
        ModelError: there is no tokenizer.
    """
    tokenizer = require_tokenizer(tokenizer)
    ids, first = tokenized(text, tokenizer, special=False), _known_first(tokenizer, vocabulary)
    length = sequence_length - (first is not None)
    available = len(ids) // length
    if available == 0:
        longest = len(ids) + (first is not None)
        shorter = f" or a sequence length of at most {longest}" if len(ids) > 1 else ""
        raise CalibrationError(
            f"the calibration text has {len(ids)} tokens, fewer than one sequence of "
            f"{sequence_length}: give a longer text{shorter}."
        )
    windows = ids[: available * length].view(available, length)
    if first is not None:
        windows = functional.pad(windows, (1, 0), value=first)
    if available < samples:
        event = (
            f"the calibration text has {len(ids)} tokens: {available} samples of "
            f"{sequence_length} tokens are used instead of {samples}."
        )
        return CalibrationTokens(windows.clone(), windows[:0], (event,))
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    chosen, judging = order[:samples], order[samples : samples + held_out]
    return CalibrationTokens(windows[chosen.sort().values], windows[judging.sort().values])


def text_windows(
    text: str, tokenizer: PreTrainedTokenizerBase | None, sequence_length: int
) -> Tensor:
    """Return all whole windows of a text in its order, int64 [count, sequence_length], each behind
    the token that a text begins with, where the tokenizer has one; one window of a shorter text.

    Raises:
        CalibrationError: the text is empty.
        ModelError: there is no tokenizer.
    """
    tokenizer = require_tokenizer(tokenizer)
    ids, first = tokenized(text, tokenizer, special=False), first_token(tokenizer)
    length = min(sequence_length - (first is not None), len(ids))
    windows = ids[: len(ids) // length * length].view(-1, length)
    return windows if first is None else functional.pad(windows, (1, 0), value=first)


def demo_text() -> tuple[str, str]:
    """Return (calibration, evaluation): disjoint parts of Python's own help topics, about 5 : 1.

    They differ a little between versions of Python and are the same on all machines with one
    version. No paragraph is in both, and none is there twice.
    """
    from pydoc_data.topics import topics

    parts: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    # Longest first: short topics repeat sections of long ones, and those must not be torn apart.
    for index, name in enumerate(sorted(topics, key=lambda name: (-len(topics[name]), name))):
        paragraphs = dict.fromkeys(p.strip("\n") for p in _plain(topics[name]).split("\n\n"))
        fresh = [p for p in paragraphs if p.strip() and p.strip() not in seen]
        seen.update(p.strip() for p in fresh)
        if fresh:
            evaluation = index % EVALUATION_SHARE == EVALUATION_SHARE - 1
            parts[evaluation].append("\n\n".join(fresh))
    return "\n\n".join(parts[0]), "\n\n".join(parts[1])


def _plain(topic: str) -> str:
    """Return a topic without tables, underlined titles, emphasis and breaks in paragraphs."""
    topic = re.sub(r"^ *[+|].*[+|]$", "", topic, flags=re.MULTILINE)
    topic = re.sub(r"^([*=\-~^\"'])\1{3,}\n", "", topic, flags=re.MULTILINE)
    topic = re.sub(r"(\*{1,2})(?=\w)([^*\n]+)\1", r"\2", topic)
    # A line break between two unindented lines is the page's, not the text's.
    topic = re.sub(r"(?<=\S)\n(?=[^\s*\-+])", " ", topic)
    return re.sub(r"\n{3,}", "\n\n", topic)


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
    """Return tokens drawn from the model's own distribution, int64 [samples, sequence_length].

    They are on the CPU. Each sequence begins with `bos`, or else with the model's own beginning or
    end token; the end token is not drawn. The global random state is kept.

    Raises:
        CalibrationError: there is no token to begin with.
    """
    start = _first_token(model, bos)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=1.0,  # generate() takes missing settings from the model
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
