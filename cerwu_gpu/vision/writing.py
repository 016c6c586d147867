"""One full pass over a plain module: all weights quantized, coded, stored, not yet published."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from cerwu_gpu import __version__
from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.container.reader import open_directory
from cerwu_gpu.container.writer import DirectoryWriter
from cerwu_gpu.errors import ConfigError, CorruptionError
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.pipeline import Blocks, Clock, compress_blocks
from cerwu_gpu.report import LayerReport


def nothing_more(_: Path) -> None:
    """A plain module has no files of its own."""


@dataclass(frozen=True)
class Attempt:
    """A whole directory under its hidden name."""

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


@dataclass(frozen=True)
class Writing:
    """How a module is quantized, coded and stored, as often as it takes.

    Leaving the context removes what was not published.
    """

    module: nn.Module
    layouts: Mapping[str, WeightLayout]
    output: Path
    overwrite: bool
    verify: bool
    companions: Callable[[Path], None]
    clock: Clock
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "Writing":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def attempt(
        self,
        blocks: Blocks,
        gradients: Mapping[tuple[str, int], Tensor],
        config: CompressionConfig,
    ) -> Attempt:
        """One full pass over the weights as they are; an earlier attempt is removed.

        Raises:
            CerwuError: a subclass that says what is wrong.
        """
        generator = f"cerwu_gpu {__version__}"
        self._stack.close()
        writer = self._stack.enter_context(
            DirectoryWriter(self.output, generator=generator, overwrite=self.overwrite)
        )
        parameters = {name: self.module.get_parameter(name) for name in self.layouts}
        dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        layers = compress_blocks(
            blocks, self.layouts, dtypes, writer, config, self.clock, gradients
        )
        with self.clock.stage("write"):
            for name, tensor in plain_tensors(self.module, self.layouts).items():
                writer.add_plain(name, tensor)
            self.companions(writer.folder)
            writer.complete()
        if self.verify:
            with self.clock.stage("verify"):
                _check(writer.folder, parameters)
        size = sum(file.stat().st_size for file in writer.folder.rglob("*") if file.is_file())
        return Attempt(config.lmbda, tuple(layers), size, writer)


def plain_tensors(module: nn.Module, layouts: Mapping[str, WeightLayout]) -> dict[str, Tensor]:
    """What is stored as it is: every other entry of the state dict, shared ones once.

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


def _check(folder: Path, parameters: Mapping[str, Tensor]) -> None:
    """Every compressed weight decodes to the bits in memory."""
    for name, weight in open_directory(folder).weights():
        if not torch.equal(weight, parameters[name].detach().cpu().reshape(weight.shape)):
            raise CorruptionError(
                f"{name} does not decode to the weight that was quantized: "
                "this is a defect of cerwu_gpu; please report it."
            )
