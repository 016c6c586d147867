"""One full pass over a model: every weight quantized, coded and stored, not yet published."""

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cerwu_gpu import __version__
from cerwu_gpu.attempt import Attempt, check_stored, directory_bytes, plain_tensors
from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.container.journal import Journal
from cerwu_gpu.container.writer import DirectoryWriter
from cerwu_gpu.errors import OutputError
from cerwu_gpu.files import dtype_name, written
from cerwu_gpu.hf.card import Card, Quality
from cerwu_gpu.hf.evaluation import mean_loss, perplexity_of
from cerwu_gpu.hf.models import TOKENIZER_FILES, LoadedModel
from cerwu_gpu.hf.reason import reason
from cerwu_gpu.hf.source import Source
from cerwu_gpu.pipeline import compress_blocks
from cerwu_gpu.progress import Clock
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
        self._original_loss: float | None = None
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
        if self._original_loss is None:
            self._original_loss = self._loss()
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
        quality = self._quality()
        with self._clock.stage("write"):
            for name, tensor in plain_tensors(model, layouts).items():
                writer.add_plain(name, tensor)
            write_companions(self.source.loaded, writer.folder)
            writer.complete()
            if self._card is not None:
                with written(writer.folder):
                    self._card.write(writer.folder, quality)
        if self._verify:
            with self._clock.stage("verify"):
                check_stored(writer.folder, parameters, progress=self.source.progress)
        return Attempt(config.lmbda, tuple(layers), directory_bytes(writer.folder), writer)

    def _loss(self) -> float | None:
        """Of the model as it is, where a card will tell of it and the text has more to judge by."""
        if self._card is None or not len(self.source.held_out):
            return None
        with self._clock.stage("evaluate"):
            return mean_loss(self.source.loaded.model, self.source.held_out)

    def _quality(self) -> Quality | None:
        compressed = self._loss()
        if self._original_loss is None or compressed is None:
            return None
        samples, length = self.source.held_out.shape
        return Quality(
            perplexity_of(self._original_loss), perplexity_of(compressed), samples * (length - 1)
        )

    def _restore(self, parameters: Mapping[str, Tensor]) -> None:
        """Keep the original weights the first time, put them back every other time."""
        for name, parameter in parameters.items():
            if name in self._originals:
                parameter.detach().copy_(self._originals[name])
            else:
                self._originals[name] = parameter.detach().clone()


def write_companions(loaded: LoadedModel, folder: Path) -> None:
    """config.json with the quantization method, tokenizer, generation and licence files.

    Nothing in them says from which directory the model came.

    Raises:
        OutputError: the disk refuses one.
    """
    content: dict[str, Any] = _without_paths(loaded.model.config.to_dict())
    content["quantization_config"] = {"quant_method": QUANT_METHOD, "format": FORMAT_VERSION}
    content["architectures"] = [type(loaded.model).__name__]
    content["dtype"] = dtype_name(loaded.model.dtype)  # it may have been cast
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
