"""One full pass over a model: every weight quantized, coded and stored, not yet published."""

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cerwu_gpu import __version__
from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.container.journal import Journal
from cerwu_gpu.container.reader import open_directory
from cerwu_gpu.container.writer import DirectoryWriter, written
from cerwu_gpu.errors import CorruptionError, OutputError
from cerwu_gpu.hf.card import Card
from cerwu_gpu.hf.models import TOKENIZER_FILES, LoadedModel
from cerwu_gpu.hf.reason import reason
from cerwu_gpu.hf.source import Source
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.pipeline import Clock, compress_blocks
from cerwu_gpu.report import LayerReport
from cerwu_gpu.spec import FORMAT_VERSION, QUANT_METHOD

COPIED_FILES = (
    *TOKENIZER_FILES,
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
)
"""Files that go into the compressed directory as they came."""
LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*")


@dataclass(frozen=True)
class Attempt:
    """A whole directory under its hidden name.

    Attributes:
        lmbda: what it was made with.
        layers: what was stored of each matrix.
        directory_bytes: of all its files.
    """

    lmbda: float
    layers: tuple[LayerReport, ...]
    directory_bytes: int
    writer: DirectoryWriter

    @property
    def weights(self) -> int:
        """Quantized weights."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def coded_bytes(self) -> int:
        """Everything stored for them."""
        return sum(layer.words_bytes + layer.side_bytes for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.coded_bytes / self.weights


class Attempts:
    """Makes attempts for one output; leaving the context removes those that were not published."""

    def __init__(
        self,
        source: Source,
        output: Path,
        *,
        overwrite: bool,
        verify: bool,
        clock: Clock,
        work: Path | None = None,
        card: Card | None = None,
    ) -> None:
        """`work` is this run's own directory (container/work.py), where finished blocks are kept;
        without it none are. `card` is written into every attempt."""
        self.source = source
        self.output = output
        self._overwrite = overwrite
        self._verify = verify
        self._clock = clock
        self._work = work
        self._card = card
        self._stack = ExitStack()
        self._originals: dict[str, Tensor] = {}
        self._gradients: Mapping[tuple[str, int], Tensor] | None = None

    def __enter__(self) -> "Attempts":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def gradients(self) -> Mapping[tuple[str, int], Tensor]:
        """The sensitivities' gradients, computed once."""
        if self._gradients is None:
            with self._clock.stage("sensitivity"):
                self._gradients = self.source.gradients()
        return self._gradients

    def run(self, config: CompressionConfig) -> Attempt:
        """Quantize the whole model from its original weights, which are restored first.

        Raises:
            CerwuError: a subclass that says what is wrong.
        """
        gradients = self.gradients()
        self._stack.close()  # what an earlier attempt wrote
        model, layouts = self.source.loaded.model, self.source.layouts
        parameters = {name: model.get_parameter(name) for name in layouts}
        if config.targeted:
            self._restore(parameters)
        writer = self._stack.enter_context(
            DirectoryWriter(
                self.output,
                generator=f"cerwu_gpu {__version__}",
                overwrite=self._overwrite,
                inside=self._work,
            )
        )
        dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        layers = compress_blocks(
            self.source.blocks(gradients),
            layouts,
            dtypes,
            writer,
            config,
            self._clock,
            gradients,
            Journal(self._work / f"lmbda-{config.lmbda!r}") if self._work is not None else None,
        )
        with self._clock.stage("write"):
            for name, tensor in plain_tensors(model, layouts).items():
                writer.add_plain(name, tensor)
            write_companions(self.source.loaded, writer.folder)
            writer.complete()
            if self._card is not None:
                with written(writer.folder):
                    self._card.write(writer.folder)
        if self._verify:
            with self._clock.stage("verify"):
                _check(writer.folder, parameters, self.source.progress)
        return Attempt(config.lmbda, tuple(layers), directory_bytes(writer.folder), writer)

    def _restore(self, parameters: Mapping[str, Tensor]) -> None:
        """Keep the original weights the first time, put them back every other time."""
        for name, parameter in parameters.items():
            if name in self._originals:
                parameter.detach().copy_(self._originals[name])
            else:
                self._originals[name] = parameter.detach().clone()


def plain_tensors(model: PreTrainedModel, layouts: Mapping[str, WeightLayout]) -> dict[str, Tensor]:
    """What is stored as it is: every other entry of the state dict, tied weights once."""
    compressed = {id(model.get_parameter(name)) for name in layouts}
    seen: set[int] = set()
    plain = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and id(tensor) not in compressed:
            plain[name] = tensor
        seen.add(id(tensor))
    return plain


def directory_bytes(path: Path) -> int:
    """Bytes of all files below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def write_companions(loaded: LoadedModel, folder: Path) -> None:
    """config.json with the quantization method, tokenizer, generation and licence files.

    Nothing in them says from which directory the model came.

    Raises:
        OutputError: the disk refuses one.
    """
    content: dict[str, Any] = _without_paths(loaded.model.config.to_dict())
    content["quantization_config"] = {"quant_method": QUANT_METHOD, "format": FORMAT_VERSION}
    content["architectures"] = [type(loaded.model).__name__]
    content["dtype"] = str(loaded.model.dtype).removeprefix("torch.")  # it may have been cast
    text = json.dumps(content, indent=2, sort_keys=True, default=str)
    with written(folder):
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        if loaded.files is not None:
            patterns = (*COPIED_FILES, *LICENCE_PATTERNS)
            for file in sorted({found for p in patterns for found in loaded.files.glob(p)}):
                shutil.copyfile(file, folder / file.name)
            return
        if loaded.tokenizer is not None:
            _save_tokenizer(loaded.tokenizer, folder)
        generation = getattr(loaded.model, "generation_config", None)  # image classifiers have none
        if generation is not None:
            generation.save_pretrained(folder)


def _without_paths(content: Any) -> Any:
    """A configuration, as JSON, without the places that it and its parts were loaded from."""
    if isinstance(content, dict):
        kept = {key: value for key, value in content.items() if key != "_name_or_path"}
        return {key: _without_paths(value) for key, value in kept.items()}
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


def _check(folder: Path, parameters: Mapping[str, Tensor], progress: bool) -> None:
    """Every plain tensor has its checksum, and every compressed weight the bits in memory."""
    directory = open_directory(folder)
    for _ in directory.plain():
        pass
    missing = parameters.keys() - directory.compressed().keys()
    if missing:
        raise CorruptionError(f"{min(missing)} was not written: please report it.")
    for name, weight in directory.weights(progress=progress):
        if not torch.equal(weight, parameters[name].detach().cpu()):
            raise CorruptionError(
                f"{name} does not decode to the weight that was quantized: "
                "this is a defect of cerwu_gpu; please report it."
            )
