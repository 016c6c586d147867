"""The interface between kinds of models and `cerwu_gpu.compression`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cerwu_gpu.compression.blocks import Blocks
from cerwu_gpu.compression.distill import Student
from cerwu_gpu.config import CompressionConfig, Source
from cerwu_gpu.container.journal import Journal
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.quantize.sensitivity import Sensitivities
from cerwu_gpu.ranks import Ranks

HELD_OUT_TEXT = "the held-out text"
"""Entry of `Adapter.identity` for text that calibrates nothing."""


class Adapter(ABC):
    """A model with its calibration data, ready to be compressed any number of times.

    A new kind of model is one subclass. Methods that only some kinds need have a default.

    Attributes:
        module: the model; a run changes its weights in place.
        layouts: of the weights to compress, by name, in the order of the model.
        events: what did not go as planned before the run.
        left: name of every other parameter with two axes or more -> reason to leave it alone; and
            of what the source holds and the result does not.
        carried: tensors of the source that the module does not hold, to be stored as they are.
        drifts: whether a corrected drift changes the quantized targets: a sample of the rows then
            does not show the whole effect of lmbda.
        distils: whether a distillation applies to models of this kind.
        usual_sources: texts that calibrate where none is given.
        full_passes: number of passes that the search for a target may take.
        ranks: share the work.
        card: writes a model card into a complete directory, given `loss` of the original and of the
            compressed model; None: there is none.
    """

    module: nn.Module
    layouts: Mapping[str, WeightLayout]
    events: tuple[str, ...] = ()
    left: Mapping[str, str] = {}
    carried: Mapping[str, Tensor] = {}
    drifts = False
    distils = True
    usual_sources: tuple[Source, ...] = ()
    full_passes = 3
    ranks: Ranks
    card: Callable[[Path, float | None, float | None], None] | None = None

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self._originals: dict[str, Tensor] = {}

    @abstractmethod
    def select(self, config: CompressionConfig) -> None:
        """Choose the weights that these settings compress: `layouts`, `left` and their events."""

    @abstractmethod
    def sensitivities(self, config: CompressionConfig) -> Sensitivities:
        """Return the sensitivities of the original weights."""

    @abstractmethod
    def blocks(self, config: CompressionConfig, *, sampling: bool = False) -> Blocks:
        """Return the blocks with their Hessians, calibrated now or read from a cache.

        Args:
            sampling: the Hessians are those of original inputs whatever the drift, for an estimate.
        """

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """Return digests of the model, with its original weights, and of its data."""

    @property
    def predictions(self) -> int:
        """Number of predictions that `loss` is a mean of."""
        return 0

    @torch.no_grad()
    def keep_originals(self) -> None:
        """Copy the weights, and the vectors that a distillation tunes, for `restore`; each only
        once."""
        vectors = [name for name, p in self.module.named_parameters() if p.dim() == 1]
        for name in (*self.layouts, *vectors):
            if name not in self._originals:
                self._originals[name] = self.module.get_parameter(name).detach().clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Put back the weights that `keep_originals` copied, if any."""
        for name, original in self._originals.items():
            self.module.get_parameter(name).copy_(original)

    def quantized(self, journal: Journal | None) -> None:  # noqa: B027
        """Take the quantized weights of a pass's blocks from its journal from now on, where the
        module does not hold them itself."""

    def value(self, name: str, tensor: Tensor) -> Tensor:
        """Return the values of an entry of the module's state dict that is not compressed."""
        return tensor

    def holds(self, name: str, weight: Tensor) -> bool:
        """Return whether the quantized weight of this name is, bit for bit, `weight`."""
        parameter = self.module.get_parameter(name).detach().cpu()
        return torch.equal(weight, parameter.reshape(weight.shape))

    def finish(self, config: CompressionConfig) -> None:  # noqa: B027
        """Adapt the tensors that are stored as floats to the quantized weights."""

    def student(self, config: CompressionConfig) -> Student:
        """Return what a distillation tunes, made of the original weights.

        Raises:
            ConfigError: this model has no predictions that could be compared.
        """
        raise ConfigError(f"{type(self.module).__name__} cannot be distilled: drop distillation.")

    def loss(self) -> float | None:
        """Return the held-out loss [nats] of the module with its current weights; None without
        held-out data."""
        return None

    def note(self, events: Iterable[str]) -> None:
        """Add events of the writing, each once however often files are written."""
        self.events = tuple(dict.fromkeys((*self.events, *events)))

    def write_files(self, folder: Path) -> None:  # noqa: B027
        """Write the directory's files besides weights, which are there: configuration, tokenizer,
        licences."""
