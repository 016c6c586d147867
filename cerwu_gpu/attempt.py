"""What a full pass over a model has left under a hidden name, before it is published."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cerwu_gpu.container.reader import open_directory
from cerwu_gpu.container.writer import DirectoryWriter
from cerwu_gpu.errors import ConfigError, CorruptionError
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.report import LayerReport


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

    def events(self, layouts: Mapping[str, WeightLayout]) -> tuple[str, ...]:
        """What did not go as planned, by matrix."""
        return tuple(
            f"{layouts[layer.name].key(layer.part)}: {event}"
            for layer in self.layers
            for event in layer.events
        )


def plain_tensors(module: nn.Module, layouts: Mapping[str, WeightLayout]) -> dict[str, Tensor]:
    """What is stored as it is: every other entry of the state dict, tied and shared ones once.

    Raises:
        ConfigError: an entry of the state dict is no tensor.
    """
    compressed = {id(module.get_parameter(name)) for name in layouts}
    seen: set[int] = set()
    plain = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"{name} in the module's state is no tensor and cannot be stored.")
        if id(tensor) not in seen and id(tensor) not in compressed:
            plain[name] = tensor
        seen.add(id(tensor))
    return plain


def plain_bytes(module: nn.Module, layouts: Mapping[str, WeightLayout]) -> int:
    """Bytes of what is stored as it is; with no layouts, of the whole module."""
    tensors = plain_tensors(module, layouts).values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def directory_bytes(path: Path) -> int:
    """Bytes of all files below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def check_stored(folder: Path, parameters: Mapping[str, Tensor], *, progress: bool = False) -> None:
    """Every plain tensor has its checksum, and every compressed weight the bits in memory.

    Raises:
        CorruptionError: it is not so.
    """
    directory = open_directory(folder)
    for _ in directory.plain():
        pass
    missing = parameters.keys() - directory.compressed().keys()
    if missing:
        raise CorruptionError(f"{min(missing)} was not written: please report it.")
    for name, weight in directory.weights(progress=progress):
        if not torch.equal(weight, parameters[name].detach().cpu().reshape(weight.shape)):
            raise CorruptionError(
                f"{name} does not decode to the weight that was quantized: "
                "this is a defect of cerwu_gpu; please report it."
            )
