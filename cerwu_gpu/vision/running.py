"""Runs a whole module on batches of inputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cerwu_gpu.errors import CalibrationError
from cerwu_gpu.vision.products import Product, Products

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""Inputs only: a tensor, positional arguments, or keyword arguments of the module."""


def held(batches: Iterable[Batch]) -> list[Batch]:
    """All batches, since they are run more than once.

    Raises:
        CalibrationError: there is none, or one holds no tensor.
    """
    kept: list[Batch] = [batches] if isinstance(batches, Tensor) else list(batches)
    if not kept or isinstance(batches, Mapping):
        raise CalibrationError("batches must be an iterable of inputs, and hold at least one.")
    for batch in kept:
        samples(batch)
    return kept


def samples(batch: Batch) -> int:
    """How many samples a batch holds: the first axis of its first tensor.

    Raises:
        CalibrationError: it has no tensor with a sample.
    """
    if isinstance(batch, Tensor):
        values: list[Any] = [batch]
    else:
        values = list(batch.values() if isinstance(batch, Mapping) else batch)
    for value in values:
        if isinstance(value, Tensor) and value.dim() > 0 and len(value) > 0:
            return len(value)
    raise CalibrationError("a calibration batch holds no tensor with samples along its first axis.")


def _ignore(_: Product) -> None:
    """No product is watched."""


class Runner:
    """A module in eval mode on its device, with the weights to be watched."""

    def __init__(
        self, module: nn.Module, weights: Mapping[str, Tensor], device: torch.device
    ) -> None:
        self._module = module
        self._weights = weights
        self.device = device

    def run(self, batch: Batch, note: Callable[[Product], None] = _ignore) -> Any:
        """The module's output; `note` sees every product with the weights.

        Raises:
            CalibrationError: the module does not take the batch.
        """
        moved = _moved(batch, self.device)
        with Products(self._weights, note):
            try:
                if isinstance(moved, Mapping):
                    return self._module(**moved)
                if isinstance(moved, Tensor):
                    return self._module(moved)
                return self._module(*moved)
            except (TypeError, ValueError, RuntimeError, IndexError) as error:
                first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
                raise CalibrationError(
                    f"{type(self._module).__name__} cannot be run on a batch ({first}): "
                    "batches hold the inputs alone, as a tensor, a tuple or a dict."
                ) from error


@contextmanager
def evaluating(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Have the module in eval mode on `device` for a while; modes and places come back."""
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


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return tuple(_moved(item, device) for item in value)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    return value
