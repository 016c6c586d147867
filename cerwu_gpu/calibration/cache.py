"""Hessians kept on disk, so that the next run with the same model and inputs skips calibration."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cerwu_gpu.calibration.running import placed, state_of, weight_source
from cerwu_gpu.compression.blocks import Block, Blocks, BlockWeights, InputStatistics, KnownBlock
from cerwu_gpu.errors import CalibrationError, OutputError
from cerwu_gpu.files import atomic, local_path, tensor_bytes
from cerwu_gpu.layout import Label, WeightLayout
from cerwu_gpu.progress import note
from cerwu_gpu.quantize.sensitivity import Sensitivities

VERSION = 4
"""Version of the files' contents; part of every key."""
METADATA_KEY, CHECKSUM_KEY = "cerwu_hessians", "sha256"


def hessian_key(
    module: nn.Module,
    description: object,
    layouts: Sequence[WeightLayout],
    inputs: str,
    state: str | None = None,
) -> str:
    """Return the SHA-256 (hexadecimal) of everything the Hessians depend on.

    Args:
        module: every parameter's and buffer's bytes are counted.
        description: further properties of the module (its configuration), ready for JSON.
        layouts: the weights to compress.
        inputs: a digest of the calibration inputs, or of how they are sampled.
        state: digest of the module's state (state_digest), where it is known.
    """
    weights = [[w.name, w.shape, w.parts, w.transposed] for w in layouts]
    header = {"version": VERSION, "module": description, "weights": weights, "inputs": inputs}
    digest = hashlib.sha256(json.dumps(header, sort_keys=True, default=str).encode())
    digest.update((state or state_digest(state_of(module))).encode())
    return digest.hexdigest()


def tensors_digest(tensors: Mapping[str, Any] | Iterable[Tensor]) -> str:
    """Return the SHA-256 (hexadecimal) of tensors, with names if they have some."""
    named = tensors.items() if isinstance(tensors, Mapping) else (("", x) for x in tensors)
    return state_digest(named)


def state_digest(pairs: Iterable[tuple[str, Any]]) -> str:
    """Return the SHA-256 (hexadecimal) of the tensors among names and values."""
    digest = hashlib.sha256()
    for name, tensor in pairs:
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


class HessianCache:
    """The files of one key: `directory`/`key`/block-00000.safetensors and so on, matrices outside
    of the blocks counted like blocks after the last one, and sensitivities.safetensors."""

    def __init__(self, directory: Path | str, key: str) -> None:
        self.path = local_path(directory) / key
        self._sensitivities = self.path / "sensitivities.safetensors"
        self._noted = False

    def file(self, index: int) -> Path:
        """Return the path of block number `index`."""
        return self.path / f"block-{index:05d}.safetensors"

    def holds(self, index: int) -> bool:
        """Return whether block number `index` is there."""
        return self.file(index).is_file()

    def complete(self, blocks: int) -> bool:
        """Return whether all blocks are there."""
        return all(map(self.holds, range(blocks)))

    def blocks(
        self,
        module: nn.Module,
        layouts: Sequence[WeightLayout],
        count: int,
        calibrated: Callable[[], Blocks],
        device: torch.device,
        *,
        progress: bool,
    ) -> Blocks:
        """Return `count` blocks from the files if all are there, else `calibrated` ones that are
        written to them; with `progress` a line reports the former, once."""
        if not self.complete(count):
            self.check_writable()
            return CachingBlocks(calibrated(), self, device)
        if progress and not self._noted:
            note(f"Hessians found in {self.path}: calibration is skipped.")
            self._noted = True
        return CachedBlocks(module, layouts, self, count, device)

    def check_writable(self) -> None:
        """Make the directory, and refuse one that takes no file, before the work.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written ({error.strerror}): choose another directory."
            ) from error

    def write(
        self,
        index: int,
        name: str,
        inputs: Mapping[Label, str],
        statistics: Mapping[str, InputStatistics],
    ) -> None:
        """Write one block, under a temporary name until it is complete.

        Raises:
            OutputError: the directory cannot be written.
        """
        contents = {
            "name": name,
            "inputs": [[name, part, key] for (name, part), key in inputs.items()],
            "tokens": {key: [value.tokens, value.rows_seen] for key, value in statistics.items()},
        }
        hessians = {key: value.hessian.cpu() for key, value in statistics.items()}
        self._write(self.file(index), hessians, contents)

    def _write(self, target: Path, tensors: dict[str, Tensor], contents: object) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with atomic(target) as temporary:
                text = json.dumps(contents)
                metadata = {METADATA_KEY: text, CHECKSUM_KEY: _checksum(text, tensors)}
                save_file(tensors, temporary, metadata)
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"{self.path} cannot be written ({error}): "
                "free some space or choose another directory."
            ) from error

    def read(
        self, index: int, device: torch.device
    ) -> tuple[str, dict[Label, str], dict[str, InputStatistics]]:
        """Return name, inputs and statistics of a block, the Hessians on `device`.

        Raises:
            CalibrationError: the file is damaged.
        """
        with self._opened(self.file(index), device) as (tensors, contents):
            statistics = {
                key: InputStatistics(tensors[key], tokens, None, rows_seen)
                for key, (tokens, rows_seen) in contents["tokens"].items()
            }
            inputs = {(name, part): key for name, part, key in contents["inputs"]}
            block = str(contents["name"])
        return block, inputs, statistics

    def write_sensitivities(self, sensitivities: Sensitivities) -> None:
        """Write sensitivities, whole or not at all.

        Raises:
            OutputError: the directory cannot be written.
        """
        gradients, additions = sensitivities.squared_gradients, sensitivities.hessian_additions
        tensors = {f"gradient {i}": x.cpu() for i, x in enumerate(gradients.values())}
        tensors |= {f"addition {i}": x.cpu() for i, x in enumerate(additions.values())}
        contents = {"gradients": list(gradients), "additions": list(additions)}
        self._write(self._sensitivities, tensors, contents)

    def read_sensitivities(self) -> Sensitivities | None:
        """Return the sensitivities on the CPU; None where none were written.

        Raises:
            CalibrationError: the file is damaged.
        """
        if not self._sensitivities.is_file():
            return None
        with self._opened(self._sensitivities, torch.device("cpu")) as (tensors, contents):
            return Sensitivities(
                {
                    (name, part): tensors[f"gradient {i}"]
                    for i, (name, part) in enumerate(contents["gradients"])
                },
                {name: tensors[f"addition {i}"] for i, name in enumerate(contents["additions"])},
            )

    @contextmanager
    def _opened(self, path: Path, device: torch.device) -> Iterator[tuple[dict[str, Tensor], Any]]:
        """Yield a file's tensors, which are those that were written, and their description."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
                if metadata[CHECKSUM_KEY] != _checksum(metadata[METADATA_KEY], tensors):
                    raise ValueError("its bytes have changed")
                placed = {name: tensor.to(device) for name, tensor in tensors.items()}
                yield placed, json.loads(metadata[METADATA_KEY])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"{path} is damaged: delete {self.path} and calibrate again."
            ) from error


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hexadecimal) of a description and the tensors that it is of."""
    by_name = tensors_digest(dict(sorted(tensors.items())))
    return hashlib.sha256(f"{by_name} {text}".encode()).hexdigest()


def cached_sensitivities(
    cache: HessianCache | None, compute: Callable[[], Sensitivities]
) -> Sensitivities:
    """Return the sensitivities in a cache; where there are none, compute and write them."""
    sensitivities = None if cache is None else cache.read_sensitivities()
    if sensitivities is None:
        if cache is not None:
            cache.check_writable()
        sensitivities = compute()
        if cache is not None:
            cache.write_sensitivities(sensitivities)
    return sensitivities


@runtime_checkable
class Calibrating(Protocol):
    """A block that runs the model for its statistics."""

    def propagate(self) -> None:
        """Send the calibration inputs through the block without accumulating statistics."""
        ...

    def known(
        self, inputs: Mapping[Label, str], statistics: dict[str, InputStatistics]
    ) -> KnownBlock:
        """Return this block with statistics of an earlier run."""
        ...


class CachingBlocks:
    """Calibrated blocks whose statistics are written to the cache, or read from it where an earlier
    run has written them."""

    def __init__(self, blocks: Blocks, cache: HessianCache, device: torch.device) -> None:
        self._blocks = blocks
        self._cache = cache
        self._device = device

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Block]:
        for index, block in enumerate(self._blocks):
            if isinstance(block, Calibrating) and self._cache.holds(index):
                block.propagate()
                yield block.known(*self._cache.read(index, self._device)[1:])
                continue
            statistics = block.statistics()
            self._cache.write(index, block.name, block.inputs, statistics)
            yield block


class CachedBlocks:
    """Blocks with statistics from the cache; nothing of the model is run."""

    def __init__(
        self,
        module: nn.Module,
        layouts: Sequence[WeightLayout],
        cache: HessianCache,
        count: int,
        device: torch.device,
    ) -> None:
        """Take the first `count` blocks of the cache, with their weights in `layouts` only."""
        self._module = module
        self._layouts = tuple(layouts)
        self._cache = cache
        self._count = count
        self._device = device

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Block]:
        for index in range(self._count):
            block, inputs, statistics = self._cache.read(index, self._device)
            names = {name for name, _ in inputs}
            layouts = [layout for layout in self._layouts if layout.name in names]
            weights = BlockWeights(self._module, layouts, self._device)
            with self._weights_at_hand(block):
                yield KnownBlock(block, weights, inputs, statistics)

    @contextmanager
    def _weights_at_hand(self, block: str) -> Iterator[None]:
        """Read the weights of a block that has a source of them."""
        if weight_source(self._module) is None:  # other blocks need not be modules
            yield
            return
        with placed(self._module.get_submodule(block), self._device):
            yield
