"""What transformers leaves undone when it reads a .gguf file."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cerwu_gpu.errors import ModelError

MAGIC = b"GGUF"


def check_gguf(path: Path) -> None:
    """Refuse what is no GGUF file, and say which packages are missing to read one.

    Raises:
        ModelError: as said.
    """
    if not path.is_file():
        raise ModelError(f"{path} does not exist: check the path.")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ModelError(f"{path} is not a GGUF file: its first four bytes are not GGUF.")
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"reading {path.name} needs {' and '.join(missing)}: "
            f"run `pip install {' '.join(missing)}`."
        )


def gguf_model(path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of a GGUF file with its weights decoded, float32 unless `dtype` says otherwise.

    Raises:
        ModelError: transformers cannot read the file.
    """
    settings: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        # Without it newer versions may keep the weights packed in GGUF's own blocks.
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype or torch.float32, **settings
        )
    except Exception as error:
        raise ModelError(f"{path} cannot be read as a model: {error}") from error
    _forget_quantization(model)
    return model


def _forget_quantization(model: PreTrainedModel) -> None:
    """The weights are plain tensors now; with these leftovers save_pretrained would refuse."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "quantization_config"):
            del config.quantization_config
    model.__dict__["hf_quantizer"] = None


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer inside a GGUF file, mended; None where the file holds none.

    Raises:
        ModelError: transformers cannot build it.
    """
    kind = _text_field(path, "tokenizer.ggml.pre")
    if _text_field(path, "tokenizer.ggml.model") is None:
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name
        )
    except Exception as error:
        raise ModelError(f"the tokenizer in {path} cannot be read: {error}") from error
    if kind == "smollm":
        _split_digits(tokenizer)
    return tokenizer


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Split every digit apart before the bytes are merged, as SmolLM's own tokenizer does."""
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _text_field(path: Path, key: str) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(path).get_field(key)
    return None if field is None else str(field.contents())
