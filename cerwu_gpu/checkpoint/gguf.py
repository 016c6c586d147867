"""Reading .gguf files through transformers, with what it leaves undone."""

import importlib.util
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cerwu_gpu.errors import ModelError, reason

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a metadata value by its type number, as the GGUF specification has them."""
LONGEST_STRING = 1 << 26
"""Maximum bytes of a string: a damaged file must not claim all memory."""


def check_gguf(path: Path) -> None:
    """Refuse a file that is not GGUF, and any while packages that read it are missing.

    Raises:
        ModelError: it is not GGUF, or packages are missing.
    """
    if not os.path.isfile(path):  # unlike Path.is_file it takes text too long for a name
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


def _reading() -> Any:
    """Return transformers' module that reads GGUF, imported when there is a file: it loads the
    tokenizers of many models, which no other start needs."""
    return importlib.import_module("transformers.modeling_gguf_pytorch_utils")


@contextmanager
def read_once() -> Iterator[None]:
    """Make transformers parse a file only once inside the context.

    It reads a file anew for the configuration, the weights and the tokenizer, seconds each time,
    and builds the table of tensor names anew for every tensor.
    """
    gguf: Any = importlib.import_module("gguf")
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(reader), cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names


def gguf_model(path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """Return the model of a GGUF file with its weights decoded to `dtype`, float32 by default.

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
        raise ModelError(f"{path} cannot be read as a model: {reason(error)}") from error
    _forget_quantization(model)
    return model


class GgufTensors:
    """The tensors of a .gguf file as transformers decodes and names them, read in parts."""

    def __init__(
        self, load: Callable[..., Any], path: Any, model: PreTrainedModel, dtype: torch.dtype | None
    ) -> None:
        """Open the file.

        Args:
            load: transformers' `load_gguf_checkpoint`.
            model: whose parameters the tensors become.
            dtype: of the decoded tensors.
        """
        self._gguf: Any = importlib.import_module("gguf")
        self._load, self._path, self._model, self._dtype = load, path, model, dtype
        full = self._gguf.GGUFReader(path)
        self._tensors = full.tensors
        # The vocabulary takes most of the time to read, and no tensor depends on it.
        self._fields = {k: v for k, v in full.fields.items() if not k.startswith("tokenizer.")}
        self._names = cache(self._gguf.get_tensor_name_map)

    def outer(self) -> dict[str, Tensor]:
        """Return the tensors outside of the blocks, and the vectors inside."""
        return self._read(lambda x: not x.name.startswith("blk.") or len(x.shape) == 1)

    def block(self, index: int, *, decoded: bool = True) -> dict[str, Tensor]:
        """Return the tensors of block number `index`; zeros of their shapes unless `decoded`."""
        return self._read(lambda x: x.name.startswith(f"blk.{index}."), decoded)

    def all(self) -> dict[str, Tensor]:
        """Return all tensors."""
        return self._read(lambda _: True)

    def _read(self, chosen: Callable[[Any], bool], decoded: bool = True) -> dict[str, Tensor]:
        tensors = list(filter(chosen, self._tensors))
        changes = {
            "GGUFReader": lambda _: SimpleNamespace(fields=self._fields, tensors=tensors),
            "get_tensor_name_map": self._names,
        }
        if not decoded:
            shapes = iter([tuple(map(int, reversed(x.shape))) for x in tensors])
            changes["dequantize"] = lambda *_: np.zeros(next(shapes), np.float32)
        with ExitStack() as stack:
            for name, value in changes.items():
                stack.enter_context(_replaced(self._gguf, name, value))
            stack.enter_context(_replaced(_reading(), "tqdm", lambda x, **_: x))
            content = self._load(
                self._path, return_tensors=True, model_to_load=self._model, torch_dtype=self._dtype
            )
        result: dict[str, Tensor] = content["tensors"]
        return result


@contextmanager
def tensors_in_file() -> Iterator[list[GgufTensors]]:
    """Make transformers leave the tensors of .gguf files where they are inside the context; the
    list receives them instead."""
    load: Any = _reading().load_gguf_checkpoint
    opened: list[GgufTensors] = []

    def parsed(
        path: Any,
        return_tensors: bool = False,
        model_to_load: Any = None,
        torch_dtype: torch.dtype | None = None,
    ) -> dict[str, Any]:
        content: dict[str, Any] = load(path)
        if return_tensors:
            opened.append(GgufTensors(load, path, model_to_load, torch_dtype))
            content["tensors"] = {}
        return content

    with _replaced(_reading(), "load_gguf_checkpoint", parsed):
        yield opened


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Give a module another value of a name inside the context."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _forget_quantization(model: PreTrainedModel) -> None:
    """Remove the quantization settings, with which save_pretrained would refuse plain tensors."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "quantization_config"):
            del config.quantization_config
    model.__dict__["hf_quantizer"] = None


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer inside a GGUF file, mended; None where the file holds none.

    Raises:
        ModelError: transformers cannot build it.
    """
    fields = text_fields(path)
    if "tokenizer.ggml.model" not in fields:
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name
        )
    except Exception as error:
        raise ModelError(f"the tokenizer in {path} cannot be read: {reason(error)}") from error
    if fields.get("tokenizer.ggml.pre") == "smollm":
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


def text_fields(path: Path) -> dict[str, str]:
    """Return the text values of a GGUF file's metadata; gguf's own reader takes seconds for it.

    Raises:
        ModelError: the file ends too early or is of a version without 64-bit lengths.
    """
    try:
        with path.open("rb") as file:
            _, version, _, count = _unpack(file, "4sIQQ")
            if version < 2:
                raise ModelError(f"{path} is of GGUF version {version}: convert it to a newer one.")
            fields = {}
            for _ in range(count):
                key, kind = _string(file), _unpack(file, "I")[0]
                value = _value(file, kind)
                if isinstance(value, bytes):
                    fields[key.decode()] = value.decode()
            return fields
    except (struct.error, KeyError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is damaged: its metadata cannot be read.") from error


def _value(file: BinaryIO, kind: int) -> bytes | None:
    """Return the value at the file's position if it is a string; skip any other."""
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        file.seek(SCALAR_BYTES[kind], os.SEEK_CUR)
        return None
    kind, count = _unpack(file, "IQ")
    if kind in SCALAR_BYTES:
        file.seek(SCALAR_BYTES[kind] * count, os.SEEK_CUR)
    else:
        for _ in range(count):
            _value(file, kind)
    return None


def _string(file: BinaryIO) -> bytes:
    (length,) = _unpack(file, "Q")
    if length > LONGEST_STRING:
        raise struct.error(f"a string of {length} bytes")
    content: bytes = struct.unpack(f"{length}s", file.read(length))[0]
    return content


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    form = f"<{form}"
    return struct.unpack(form, file.read(struct.calcsize(form)))
