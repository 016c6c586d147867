"""Runs of a whole module on batches of inputs, and the device of modules meanwhile."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cerwu_gpu.calibration.products import Product, Products
from cerwu_gpu.errors import CalibrationError, reason

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""Inputs only: a tensor, positional arguments, or keyword arguments of the module."""
HELD_OUT = 8
"""Number of batches or samples of which one is held out."""


def materialized(batches: Iterable[Batch]) -> list[Batch]:
    """Return all batches as a list, since they are run more than once.

    Raises:
        CalibrationError: there is none, or one holds no tensor.
    """
    inputs: list[Batch] = [batches] if isinstance(batches, Tensor) else list(batches)
    if not inputs or isinstance(batches, Mapping):
        raise CalibrationError("batches must be an iterable of inputs, and hold at least one.")
    for batch in inputs:
        samples(batch)
    return inputs


def is_held_out(count: int) -> list[bool]:
    """Return for each of `count` batches or samples whether it is held out: every HELD_OUT-th one,
    or else the last."""
    chosen = [i % HELD_OUT == HELD_OUT - 1 for i in range(count)]
    return chosen if any(chosen) else [*chosen[:-1], True]


def samples(batch: Batch) -> int:
    """Return the number of samples of a batch: the first axis of its first tensor.

    Raises:
        CalibrationError: it has no tensor with a sample.
    """
    for tensor in batch_tensors(batch):
        if tensor.dim() > 0 and len(tensor) > 0:
            return len(tensor)
    raise CalibrationError("a calibration batch holds no tensor with samples along its first axis.")


def batch_tensors(batch: Batch) -> list[Tensor]:
    """Return the tensors of a batch."""
    if isinstance(batch, Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, Mapping) else batch
    return [value for value in values if isinstance(value, Tensor)]


def _ignore(_: Product) -> None:
    """Do nothing."""


class Runner:
    """A module in eval mode on its device, with the weights to be watched."""

    def __init__(
        self, module: nn.Module, weights: Mapping[str, Tensor], device: torch.device
    ) -> None:
        self._module = module
        self._weights = weights
        self.device = device

    def run(self, batch: Batch, note: Callable[[Product], None] = _ignore) -> Any:
        """Return the module's output; `note` gets every product with the weights.

        Raises:
            CalibrationError: the module does not take the batch.
        """
        # Copies: a module may change its inputs in place.
        inputs = mapped(batch, lambda tensor: tensor.to(self.device, copy=True))
        with Products(self._weights, note):
            try:
                if isinstance(inputs, Mapping):
                    return self._module(**inputs)
                if isinstance(inputs, Tensor):
                    return self._module(inputs)
                return self._module(*inputs)
            except (TypeError, ValueError, RuntimeError, IndexError) as error:
                raise CalibrationError(
                    f"{type(self._module).__name__} cannot be run on a batch ({reason(error)}): "
                    "batches hold the inputs alone, as a tensor, a tuple or a dict."
                ) from error


@contextmanager
def evaluating(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep the module in eval mode on `device` inside the context."""
    training = [child for child in module.modules() if child.training]
    tensors: Sequence[Tensor] = [*module.parameters(), *module.buffers()]
    home = tensors[0].device
    module.eval()
    module.to(device)
    try:
        yield
    finally:
        module.to(home)
        for child in training:
            child.training = True


class WeightSource(Protocol):
    """The place of weights that a module holds only while it is `placed`."""

    def placed(self, module: nn.Module, device: torch.device) -> AbstractContextManager[None]:
        """Keep a part of the model, with its weights, on `device` inside the context."""
        ...

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the whole model's state dict with its original values, a block in memory at a
        time."""
        ...


_SOURCE = "cerwu_gpu_weight_source"
"""Attribute of a module whose weights have a source."""


def attach_source(module: nn.Module, source: WeightSource) -> None:
    """Make `placed` take the module's weights from a source."""
    setattr(module, _SOURCE, source)


def weight_source(module: nn.Module) -> WeightSource | None:
    """Return the source of a module's weights; None where the module holds them itself."""
    source: WeightSource | None = getattr(module, _SOURCE, None)
    return source


def state_of(module: nn.Module) -> Iterable[tuple[str, Any]]:
    """Return names and values of a module's state dict, read from its source where it has one."""
    source = weight_source(module)
    return module.state_dict().items() if source is None else source.state()


@contextmanager
def placed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep the module on `device` inside the context, with weights from its source if it has
    one."""
    source = weight_source(module)
    if source is not None:
        with source.placed(module, device):
            yield
        return
    home = next(module.parameters()).device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


def moved(value: Any, device: torch.device) -> Any:
    """Return a nest of tuples, lists and mappings with its tensors on `device`."""
    return mapped(value, lambda tensor: tensor.to(device))


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a nest of tuples, lists and mappings with `function` of each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(mapped(item, function) for item in value)
    if isinstance(value, Mapping):
        return {key: mapped(item, function) for key, item in value.items()}
    return value
