"""The tensors of a model on disk, by block: safetensors files, or a .gguf file."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from cerwu_gpu.checkpoint.gguf import GgufTensors

Entries = Mapping[str, Any]
"""Tensors of a checkpoint by its own names, or what gives one when it is indexed by `...`."""


class Checkpoint(Protocol):
    """A model's tensors on disk."""

    def outer(self) -> AbstractContextManager[Entries]:
        """Yield the tensors outside of the blocks, and at least the vectors inside."""
        ...

    def block(self, index: int, *, trial: bool = False) -> AbstractContextManager[Entries]:
        """Yield the tensors of a block, which a conversion has to see; on a trial their values do
        not matter."""
        ...

    def direct(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return those of the parameters that need no conversion, each in memory of its own."""
        ...

    def converts(self, index: int) -> bool:
        """Return whether a block needs a conversion."""
        ...


class SafetensorsCheckpoint:
    """The safetensors files of a model (Checkpoint).

    They are opened anew for each block: what is written into one mapping is never seen in another.
    """

    def __init__(
        self,
        files: Sequence[Path],
        model: PreTrainedModel,
        settings: Any,
        blocks: Mapping[str, int],
    ) -> None:
        """Find out which parameter every tensor belongs to.

        Args:
            settings: of the conversion.
            blocks: parameter -> number of its block, for the parameters that stay on disk.
        """
        self._files: dict[str, Path] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)
        self._outer: list[str] = []
        self._blocks: dict[int, list[str]] = {}
        self._direct: dict[str, str] = {}
        expected = model.state_dict()
        for key, target, converted in _targets(self._files, model, settings, expected):
            if target not in blocks:
                self._outer.append(key)
            elif converted or settings.dtype_plan or expected[target].dtype != settings.dtype:
                self._blocks.setdefault(blocks[target], []).append(key)
            else:
                self._direct[target] = key
        self._dtype = settings.dtype

    def outer(self) -> AbstractContextManager[Entries]:
        return self._opened(self._outer)

    def block(self, index: int, *, trial: bool = False) -> AbstractContextManager[Entries]:
        return self._opened(self._blocks.get(index, ()))

    def direct(self, names: Iterable[str]) -> dict[str, Tensor]:
        keys = {name: self._direct[name] for name in names if name in self._direct}
        with self._opened(keys.values()) as entries:
            return {name: entries[key][...].to(self._dtype) for name, key in keys.items()}

    def converts(self, index: int) -> bool:
        return index in self._blocks

    @contextmanager
    def _opened(self, keys: Iterable[str]) -> Iterator[Entries]:
        """Yield tensors that are read when they are indexed."""
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            entries = {}
            for key in keys:
                path = self._files[key]
                if path not in files:
                    files[path] = stack.enter_context(safe_open(path, framework="pt"))
                entries[key] = files[path].get_slice(key)
            yield entries


def _targets(
    keys: Iterable[str], model: PreTrainedModel, settings: Any, expected: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, bool]]:
    """Yield each key with the (first) parameter that it becomes, and whether it is converted."""
    mapping: Any = deepcopy(settings.weight_mapping or [])
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    rename: Any = rename_source_key
    for key in sorted(keys, key=dot_natural_key):
        prefix = model.base_model_prefix
        target, pattern = rename(key, renamings, converters, prefix, expected)
        if target not in expected and key in expected:
            target, pattern = rename(key, [], [], prefix, expected)
        yield key, target, pattern is not None


class GgufCheckpoint:
    """A .gguf file, whose tensors are decoded whenever they are read (Checkpoint)."""

    def __init__(self, tensors: GgufTensors) -> None:
        self._tensors = tensors

    @contextmanager
    def outer(self) -> Iterator[Entries]:
        yield self._tensors.outer()

    @contextmanager
    def block(self, index: int, *, trial: bool = False) -> Iterator[Entries]:
        yield self._tensors.block(index, decoded=not trial)

    def direct(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {}

    def converts(self, index: int) -> bool:
        return True
