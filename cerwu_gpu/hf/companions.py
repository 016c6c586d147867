"""Files of a compressed directory besides weights: configuration, tokenizer, licences."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cerwu_gpu.errors import OutputError, reason
from cerwu_gpu.files import copy_inside, dtype_name, written
from cerwu_gpu.hf.configuration import without_kernels
from cerwu_gpu.hf.models import TOKENIZER_FILES
from cerwu_gpu.spec import FORMAT_VERSION, QUANT_METHOD

COPIED_FILES = (
    *TOKENIZER_FILES,
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
)
"""Files of a language model that are copied into the compressed directory."""
LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*")


def write_config(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json with the quantization method and without local paths.

    Raises:
        OutputError: the disk refuses it.
    """
    content: dict[str, Any] = without_kernels(_without_paths(model.config.to_dict()))
    content["quantization_config"] = {"quant_method": QUANT_METHOD, "format": FORMAT_VERSION}
    content["architectures"] = [type(model).__name__]
    content["dtype"] = dtype_name(model.dtype)  # it may have been cast
    text = json.dumps(content, indent=2, sort_keys=True, default=str)
    with written(folder):
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def copy_files(source: Path, folder: Path, patterns: Iterable[str]) -> tuple[str, ...]:
    """Copy the files of a source directory that match one of the patterns; return an event for
    each that is left out because it leads elsewhere (files.lies_inside) or is too large.

    Raises:
        OutputError: the disk refuses one.
    """
    with written(folder):
        files = sorted({path for pattern in patterns for path in source.glob(pattern)})
        left = copy_inside(files, source, folder)
    why = "it leads out of the model's directory, or is too large"
    return tuple(f"{name} is not copied: {why}" for name in left)


def save_text_files(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    """Save the tokenizer and the generation settings of a model in memory.

    Raises:
        OutputError: the disk refuses one.
    """
    with written(folder):
        if tokenizer is not None:
            _save_tokenizer(tokenizer, folder)
        generation = getattr(model, "generation_config", None)  # image classifiers have none
        if generation is not None:
            generation.save_pretrained(folder)


def _without_paths(content: Any) -> Any:
    """Return a configuration without the places that it and its parts were loaded from."""
    if isinstance(content, dict):
        return {k: _without_paths(x) for k, x in content.items() if k != "_name_or_path"}
    return [_without_paths(x) for x in content] if isinstance(content, list) else content


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # a full disk reaches us from Rust as a plain Exception
        raise OutputError(
            f"the tokenizer cannot be written to {folder} ({reason(error)}): "
            "free some space and start again."
        ) from error


def described(model: PreTrainedModel) -> dict[str, Any]:
    """Return the configuration, without what changes from one machine to the next."""
    config: dict[str, Any] = model.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version"):
        config.pop(volatile, None)
    return config
