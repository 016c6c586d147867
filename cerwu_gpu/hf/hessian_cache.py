"""Hessians kept on disk, so that the next run with the same model and text skips calibration."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from cerwu_gpu.blocks import Block, InputStatistics
from cerwu_gpu.errors import CalibrationError, OutputError
from cerwu_gpu.files import atomic, tensor_bytes
from cerwu_gpu.hf.calibration import (
    BlockWeights,
    CalibratedBlock,
    CalibratedBlocks,
    KnownBlock,
    placed,
)
from cerwu_gpu.hf.head import head_modules
from cerwu_gpu.hf.inputs import Label
from cerwu_gpu.hf.structure import find_blocks
from cerwu_gpu.layout import WeightLayout

VERSION = 1
"""Part of every key: raised when the contents of the files change their meaning."""
METADATA_KEY = "cerwu_hessians"


def hessian_key(
    model: PreTrainedModel,
    layouts: Sequence[WeightLayout],
    tokens: Tensor | None,
    settings: Mapping[str, object],
) -> str:
    """SHA-256 (hexadecimal) of all that the Hessians depend on.

    Args:
        model: its configuration and every parameter's and buffer's bytes are counted.
        layouts: the weights to compress.
        tokens: int64 [samples, sequence]; None where `settings` say how to sample them.
        settings: further values, ready for JSON, e.g. sequential and what it then depends on.
    """
    config = model.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version"):
        config.pop(volatile, None)
    weights = [[w.name, w.shape, w.parts, w.transposed] for w in layouts]
    header = {"version": VERSION, "config": config, "weights": weights, "settings": settings}
    digest = hashlib.sha256(json.dumps(header, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    if tokens is not None:
        digest.update(f"tokens {tuple(tokens.shape)}".encode())
        digest.update(tensor_bytes(tokens))
    return digest.hexdigest()


class HessianCache:
    """The files of one key: `directory`/`key`/block-00000.safetensors and so on, a head and an
    embedding counted like blocks after the last one, and sensitivities.safetensors."""

    def __init__(self, directory: Path | str, key: str) -> None:
        self.path = Path(directory).expanduser() / key

    def file(self, index: int) -> Path:
        return self.path / f"block-{index:05d}.safetensors"

    def holds(self, index: int) -> bool:
        """Whether block number `index` is there."""
        return self.file(index).is_file()

    def complete(self, blocks: int) -> bool:
        """Whether all blocks are there."""
        return all(map(self.holds, range(blocks)))

    def write(
        self,
        index: int,
        inputs: Mapping[Label, str],
        statistics: Mapping[str, InputStatistics],
    ) -> None:
        """Keep one block, under a temporary name until it is whole on disk.

        Raises:
            OutputError: the directory cannot be written.
        """
        contents = {
            "inputs": [[name, part, key] for (name, part), key in inputs.items()],
            "tokens": {key: value.tokens for key, value in statistics.items()},
        }
        hessians = {key: value.hessian.cpu() for key, value in statistics.items()}
        self._write(self.file(index), hessians, contents)

    def _write(self, target: Path, tensors: dict[str, Tensor], contents: object) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with atomic(target) as temporary:
                save_file(tensors, temporary, {METADATA_KEY: json.dumps(contents)})
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"{self.path} cannot be written ({error}): "
                "free some space or choose another directory."
            ) from error

    def read(
        self, index: int, device: torch.device
    ) -> tuple[dict[Label, str], dict[str, InputStatistics]]:
        """What `write` was given, the Hessians on `device`.

        Raises:
            CalibrationError: the file is damaged.
        """
        with self._opened(self.file(index), device) as (file, contents):
            statistics = {
                key: InputStatistics(file.get_tensor(key), tokens)
                for key, tokens in contents["tokens"].items()
            }
            inputs = {(name, part): key for name, part, key in contents["inputs"]}
        return inputs, statistics

    def write_sensitivities(self, sensitivities: Mapping[Label, Tensor]) -> None:
        """Keep what sensitivity.output_sensitivities gave, whole or not at all.

        Raises:
            OutputError: the directory cannot be written.
        """
        labels = list(sensitivities)
        tensors = {str(number): sensitivities[label].cpu() for number, label in enumerate(labels)}
        self._write(self._sensitivities, tensors, labels)

    def read_sensitivities(self) -> dict[Label, Tensor] | None:
        """What `write_sensitivities` was given, on the CPU; None where it was not called.

        Raises:
            CalibrationError: the file is damaged.
        """
        if not self._sensitivities.is_file():
            return None
        with self._opened(self._sensitivities, torch.device("cpu")) as (file, labels):
            return {
                (name, part): file.get_tensor(str(number))
                for number, (name, part) in enumerate(labels)
            }

    @property
    def _sensitivities(self) -> Path:
        return self.path / "sensitivities.safetensors"

    @contextmanager
    def _opened(self, path: Path, device: torch.device) -> Iterator[tuple[Any, Any]]:
        """The open file and its contents' description."""
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                yield file, json.loads(file.metadata()[METADATA_KEY])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"{path} is damaged: delete {self.path} and calibrate again."
            ) from error


class StatedBlocks(Protocol):
    """pipeline.Blocks that say whether their Hessians came from the cache."""

    @property
    def from_cache(self) -> bool: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Block]: ...


def cached_blocks(
    model: PreTrainedModel,
    layouts: Sequence[WeightLayout],
    cache: HessianCache,
    calibrate: Callable[[], CalibratedBlocks],
    *,
    device: torch.device | str | None = None,
) -> StatedBlocks:
    """The model's blocks with the Hessians of `cache`, or else those of `calibrate()`, which are
    then written into it. `calibrate` is called only where the cache is not complete.

    Raises:
        ModelError: the model has no blocks.
    """
    if cache.complete(len(find_blocks(model)) + len(head_modules(model, layouts))):
        return CachedBlocks(model, layouts, cache, device)
    return RecordedBlocks(calibrate(), cache, model.device if device is None else device)


class RecordedBlocks:
    """Calibrated blocks whose statistics are kept in the cache as they pass; those that a run
    before kept there are taken from it."""

    from_cache = False

    def __init__(
        self, blocks: CalibratedBlocks, cache: HessianCache, device: torch.device | str
    ) -> None:
        self._blocks = blocks
        self._cache = cache
        self._device = torch.device(device)

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[CalibratedBlock | KnownBlock]:
        for index, block in enumerate(self._blocks):
            if isinstance(block, CalibratedBlock) and self._cache.holds(index):
                block.pass_by()
                yield block.known(*self._cache.read(index, self._device))
                continue
            self._cache.write(index, block.inputs, block.statistics())
            yield block


class CachedBlocks:
    """The model's blocks with Hessians from the cache; nothing of the model is run."""

    from_cache = True

    def __init__(
        self,
        model: PreTrainedModel,
        layouts: Sequence[WeightLayout],
        cache: HessianCache,
        device: torch.device | str | None,
    ) -> None:
        self._blocks = [*find_blocks(model), *head_modules(model, layouts)]
        self._layouts = tuple(layouts)
        self._cache = cache
        self._device = model.device if device is None else torch.device(device)

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[KnownBlock]:
        for index, (name, module) in enumerate(self._blocks):
            with placed(module, self._device):
                inputs, statistics = self._cache.read(index, self._device)
                weights = BlockWeights(name, module, self._layouts)
                yield KnownBlock(name, weights, inputs, statistics, self._device)
