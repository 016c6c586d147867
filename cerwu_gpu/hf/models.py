"""Load a causal language model, whatever form it comes in."""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FineGrainedFP8Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils.quantization_config import Mxfp4Config

from cerwu_gpu.checkpoint.gguf import check_gguf, gguf_model, gguf_tokenizer, read_once
from cerwu_gpu.checkpoint.names import SourceNames, dequantized, read_checkpoint, source_names
from cerwu_gpu.compression.run import plain_bytes, tensors_bytes
from cerwu_gpu.errors import ModelError, reason
from cerwu_gpu.files import local_path, read_json, unreadable
from cerwu_gpu.models.selection import holds_matrices
from cerwu_gpu.spec import INDEX_FILE, QUANT_METHOD, SINGLE_FILE

DEQUANTIZED: Mapping[str, Any] = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
"""Quantizations that transformers undoes when it loads a model, and their settings."""
WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
HUB_FILES = (
    *("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"),
    *("README.md", "LICENSE*", "LICENCE*", "NOTICE*"),
)
HUB_FOLDERS = ("additional_chat_templates", "[0-9]*_*")
"""Folders of a repository that belong to its model: templates, modules of sentence-transformers."""


def _names(*mappings: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the classes in mappings of transformers."""
    classes = (names for mapping in mappings for names in mapping.values())
    return frozenset(
        x for names in classes for x in (names if isinstance(names, tuple) else (names,))
    )


ENCODER_DECODERS = _names(
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
)
MASKED = _names(MODEL_FOR_MASKED_LM_MAPPING_NAMES) - ENCODER_DECODERS
"""Names of the classes of masked language models; transformers counts BART among them."""
WITHOUT_TOKENS = (
    ENCODER_DECODERS
    | _names(
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )
) - (
    MASKED
    | _names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    | (_names(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - ENCODER_DECODERS)
)
"""Names of the classes that have no perplexity."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be compressed or measured.

    Attributes:
        model: in eval mode, on the CPU.
        tokenizer: None where the source has none.
        files: local directory of the source's own tokenizer and generation files; None for GGUF.
        names: what the source calls its tensors, and holds besides the model's.
        replaced: whether the tokenizer is another one than that in `files`.
        events: what did not go as planned.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    files: Path | None
    names: SourceNames = field(default_factory=SourceNames)
    replaced: bool = False
    events: tuple[str, ...] = ()


def load_model(
    source: str | Path,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    auto: Any = AutoModelForCausalLM,
    what: str = "a causal language model",
) -> LoadedModel:
    """Load a hub name, a local model directory or a .gguf file.

    Args:
        dtype: of the weights; None: the checkpoint's own (float32 for GGUF, whose weights are
            decoded).
        auto: the Auto class of transformers that loads it.
        what: the kind of model that it loads, with its article.

    Raises:
        ModelError: the source is missing, has no or incomplete weights, is quantized already, has
            no linear layer, needs code that is not trusted, or its tokenizer cannot be read.
    """
    path = local_path(source)
    if is_gguf(source):
        check_gguf(path)
        with read_once():
            loaded = LoadedModel(gguf_model(path, dtype), gguf_tokenizer(path), None)
    else:
        loaded = _load_directory(local_directory(source), trust_remote_code, dtype, auto, what)
    if not holds_matrices(loaded.model, is_conv1d) and auto is AutoModelForCausalLM:
        raise ModelError(f"{source} has no linear layer: there is nothing to compress.")
    loaded.model.train(False)
    return loaded


def is_gguf(source: str | Path) -> bool:
    """Return whether a source names a .gguf file."""
    path = local_path(source)
    return path.suffix == ".gguf" and not os.path.isdir(path)


def local_directory(source: str | Path) -> Path:
    """Return a local model directory, or the local snapshot of a hub name.

    Raises:
        ModelError: there is none.
    """
    path = local_path(source)
    if os.path.isdir(path):  # unlike Path.is_dir it takes text too long for a name
        check_readable(path)
        return path
    if os.path.exists(path):
        raise ModelError(f"{path} is a file: give a model directory, a .gguf file or a hub name.")
    if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise ModelError(f"{path} does not exist: check the path.")
    return _download(source)


def check_readable(folder: Path) -> None:
    """Refuse a directory with a file that transformers would read for ever.

    Raises:
        ModelError: it holds a pipe or a device, or text that is too long.
    """
    problem = unreadable(folder)
    if problem is not None:
        raise ModelError(f"{folder} holds {problem}: take it away.")


def require_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer, which must be there.

    Raises:
        ModelError: it is None.
    """
    if tokenizer is None:
        raise ModelError("the model has no tokenizer: text cannot be used without one.")
    return tokenizer


def require_predictions(model: nn.Module) -> None:
    """Refuse models that predict no next or masked tokens: classifiers, embedding models,
    encoder-decoders.

    Raises:
        ModelError: the model is one.
    """
    if type(model).__name__ in WITHOUT_TOKENS:
        raise ModelError(
            f"{type(model).__name__} predicts no next or masked token: it has no perplexity."
        )


def mask_token(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """Return the id of the mask token of a masked language model; None for any other model.

    Raises:
        ModelError: the model is one, and there is no tokenizer with such a token.
    """
    names = {one.__name__ for one in type(model).__mro__}
    masked = names & MASKED
    if not masked or masked & _names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return None
    mask: int | None = None if tokenizer is None else tokenizer.mask_token_id
    if mask is None:
        raise ModelError(
            f"{type(model).__name__} predicts masked tokens, and its tokenizer has no mask token: "
            "give the tokenizer that belongs to it."
        )
    return mask


def check_tokens(model: PreTrainedModel, tokens: Tensor, length: int) -> None:
    """Refuse token ids and sequence lengths that the model has no embedding for.

    Args:
        tokens: int64, any shape, not empty.
        length: tokens per sequence.

    Raises:
        ModelError: an id is outside the vocabulary, or `length` is beyond the model's positions.
    """
    embedding: Any = model.get_input_embeddings().weight
    largest = int(tokens.max())
    if largest >= embedding.shape[0]:
        raise ModelError(
            f"the tokenizer gives id {largest} but the model has {embedding.shape[0]} embeddings: "
            "they do not belong together."
        )
    positions = _positions(model)
    if positions is not None and length > positions:
        raise ModelError(
            f"sequences of {length} tokens are beyond the model's {positions} positions: "
            f"ask for at most {positions}."
        )


def _positions(model: PreTrainedModel) -> int | None:
    """Return the number of positions of a model; None where it has no limit."""
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            padding = module.padding_idx  # RoBERTa counts positions from behind it
            if padding is not None:
                return module.num_embeddings - padding - 1
    return positions if positions is not None and positions > 0 else None  # XLNet has -1


def _download(name: str) -> Path:
    """Return the local snapshot of a hub model; without a connection, the cached one."""
    try:
        siblings = HfApi().model_info(name, timeout=20).siblings or ()
        files = [PurePosixPath(sibling.rfilename) for sibling in siblings]
        weights = _first_kind(files)
        if weights is None:
            raise ModelError(f"{name} on the hub has no weights (model*.safetensors).")
        wanted: list[str] | None = [str(file) for file in files if _wanted(file, weights)]
        offline = False
    except GatedRepoError as error:
        raise ModelError(f"{name} is gated: accept its terms on the hub and log in.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"{name} is neither a local path nor a model on the hub that you may read: "
            "check the name."
        ) from error
    except ModelError:
        raise
    except Exception:
        wanted, offline = None, True
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=offline))
    except Exception as error:
        raise ModelError(
            f"{name} is no local path and the hub cannot be reached: check the path or the network."
        ) from error


def _first_kind(files: Iterable[PurePosixPath]) -> str | None:
    """Return the first pattern of WEIGHT_FILES that a file in a repository's root matches."""
    names = [file for file in files if len(file.parts) == 1]
    return next((p for p in WEIGHT_FILES if any(name.match(p) for name in names)), None)


def _wanted(file: PurePosixPath, weights: str) -> bool:
    """Return whether a file of a repository belongs to its model, whose files match `weights`."""
    if len(file.parts) > 1:
        return any(fnmatchcase(file.parts[0], folder) for folder in HUB_FOLDERS)
    return any(file.match(pattern) for pattern in (*HUB_FILES, weights))


def _load_directory(
    path: Path, trust_remote_code: bool, dtype: torch.dtype | None, auto: Any, what: str
) -> LoadedModel:
    method = _check_config(path)
    options: dict[str, Any] = {}
    if method is not None:
        options["quantization_config"] = DEQUANTIZED[method](dequantize=True)
    shards = any(path.glob("model-*-of-*.safetensors"))
    if shards and not any((path / name).is_file() for name in (INDEX_FILE, SINGLE_FILE)):
        raise ModelError(f"{path} lacks {INDEX_FILE} of its files: fetch it again.")
    if not any(file for pattern in WEIGHT_FILES for file in path.glob(pattern)):
        raise ModelError(f"{path} has no weights (model*.safetensors): it is no complete model.")
    try:
        with _without_tables():
            loaded: Any = auto.from_pretrained(
                path,
                dtype="auto" if dtype is None else dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, in one sentence
                **options,
            )
    except Exception as error:
        raise ModelError(f"{path} cannot be loaded as {what}: {reason(error)}") from error
    model, report = loaded
    if report["mismatched_keys"]:
        name, *shapes = min(report["mismatched_keys"])
        stored, built = (list(shape) for shape in shapes)
        raise ModelError(
            f"{path}: {name} is {stored} in its files and {built} in the model of its config.json: "
            "they do not belong together."
        )
    if report["missing_keys"]:
        # transformers fills these with random numbers and only warns.
        raise ModelError(
            f"{path} lacks {len(report['missing_keys'])} of the model's weights, "
            f"among them {min(report['missing_keys'])}: fetch it again."
        )
    checkpoint = read_checkpoint(path)
    events: tuple[str, ...] = ()
    if method is not None:
        checkpoint = dequantized(checkpoint)
        events = (f"its weights are in {method}: it is made of what transformers makes of them",)
    names = source_names(model, checkpoint)
    return LoadedModel(model, load_tokenizer(path, trust_remote_code), path, names, events=events)


@contextmanager
def _without_tables() -> Iterator[None]:
    """Keep transformers from logging pages of weights that are missing or of another shape, which
    `_load_directory` refuses in one sentence."""

    def is_other(record: logging.LogRecord) -> bool:
        return not any(word in record.getMessage() for word in ("MISSING", "MISMATCH"))

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def quantization_of(path: Path) -> str | None:
    """Return the quantization method that a directory's config.json names; None: none."""
    try:
        quantization: Any = read_json(path / "config.json")["quantization_config"]
        return str(quantization["quant_method"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _check_config(path: Path) -> str | None:
    """Return the method of a quantization that transformers undoes; None: there is none.

    Raises:
        ModelError: config.json cannot be read, another quantization is named, or an adapter lies
            beside the weights.
    """
    try:
        config: Any = read_json(path / "config.json")
        quantization = config.get("quantization_config")
    except FileNotFoundError as error:
        raise ModelError(f"{path} has no config.json: it is no model directory.") from error
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path / 'config.json'} cannot be read: {reason(error)}") from error
    if (path / "adapter_config.json").exists():
        raise ModelError(
            f"{path} holds an adapter (adapter_config.json) beside its weights: merge it into "
            "them, or move it away."
        )
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method == QUANT_METHOD:
        raise ModelError(f"{path} is compressed already: give the original, or decompress it.")
    if method in DEQUANTIZED:
        return str(method)
    raise ModelError(f"{path} is quantized already ({method}): give the original model.")


def load_tokenizer(path: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in a directory; None where it has none.

    Raises:
        ModelError: it cannot be read.
    """
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise ModelError(f"the tokenizer in {path} cannot be read: {reason(error)}") from error
    return tokenizer


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is GPT-2's linear layer, whose weight is [inputs, outputs]."""
    return isinstance(module, Conv1D)


def bytes_of_original(
    source: str | Path | nn.Module, module: nn.Module, carried: Mapping[str, Tensor] | None = None
) -> int:
    """Return the bytes of a .gguf file, else of the loaded dense weights, tied ones once, and of
    the tensors that are `carried` beside them."""
    if not isinstance(source, nn.Module) and Path(source).suffix == ".gguf":
        return local_path(source).stat().st_size
    return plain_bytes(module, {}) + tensors_bytes((carried or {}).values())
