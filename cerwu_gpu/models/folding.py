"""Fold batch norms into the layers in front of them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.overrides import TorchFunctionMode

from cerwu_gpu.calibration.running import Batch, Runner, evaluating, materialized


def fold_batch_norm(module: nn.Module, batch: Batch) -> list[str]:
    """Fold batch norms into the convolutions and linear layers in front of them, in place.

    The module's outputs in eval mode stay the same up to rounding, and there is less to store. A
    batch norm is folded if one run shows that it is used once, on the output of one layer that is
    used once, has its parameters for itself and feeds nothing else. It becomes nn.Identity, and
    the layer gets a bias.

    Fold before `compress`, and fold the module that `load_compressed(into=...)` fills as well: the
    names in the file are those of the folded module. A transformers model cannot be built in its
    folded form, so do not fold one that is to be loaded by its configuration.

    Args:
        module: any module that can be trained no further.
        batch: inputs of any content that the module accepts.

    Returns:
        Names of the batch norms that were folded, in the order of use.

    Raises:
        CalibrationError: the module does not take the batch.
    """
    (batch,) = materialized([batch])
    device = next(iter([*module.parameters(), *module.buffers()])).device
    names = {child: name for name, child in module.named_modules()}
    with evaluating(module, device):
        flow = _Flow(module)
        with torch.no_grad(), flow:
            output = Runner(module, {}, device).run(batch)
        pairs = list(flow.pairs(output))
        for layer, norm in pairs:
            fuse: Any = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
            _replace(module, layer, fuse(layer, norm))
            _replace(module, norm, nn.Identity())
    for layer, _ in pairs:
        module.get_submodule(names[layer]).train(module.training)
    return [names[norm] for _, norm in pairs]


def _replace(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a submodule under all its names."""
    names = [n for n, child in module.named_modules(remove_duplicate=False) if child is old]
    for name in names:
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, new)


class _Flow(TorchFunctionMode):
    """A mode that follows the outputs of layers to the functions that take them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        children = list(module.modules())
        self._layers = {
            id(child.weight): child
            for child in children
            if isinstance(child, nn.Conv2d | nn.Linear) and _owned(child, children)
        }
        self._norms = {
            id(child.running_mean): child
            for child in children
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d) and child.running_mean is not None
        }
        self._made: dict[int, tuple[nn.Module, Tensor]] = {}
        self._users: dict[int, list[nn.Module | None]] = {}
        self._uses: dict[nn.Module, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        keywords = kwargs or {}
        output = func(*args, **keywords)
        if not any(True for _ in _tensors(output)):
            return output  # shapes and the like
        norm = None
        if func is functional.batch_norm:
            mean = args[1] if len(args) > 1 else keywords["running_mean"]
            norm = self._norms.get(id(mean))
            if norm is not None:
                self._uses[norm] = self._uses.get(norm, 0) + 1
        for tensor in _tensors((args, keywords)):
            if id(tensor) in self._made:
                self._users.setdefault(id(tensor), []).append(norm)
        if func is functional.linear or func is functional.conv2d:
            layer = self._layers.get(id(args[1] if len(args) > 1 else keywords["weight"]))
            if layer is not None:
                self._made[id(output)] = layer, output
                self._uses[layer] = self._uses.get(layer, 0) + 1
        return output

    def pairs(self, output: Any) -> Iterator[tuple[Any, Any]]:
        """Yield layers and batch norms that can be folded, in the order of use."""
        results = {id(tensor) for tensor in _tensors(output)}
        for key, (layer, made) in self._made.items():
            users = self._users.get(key, [])
            norm = users[0] if len(users) == 1 else None
            if norm is None or key in results or self._uses[layer] != 1 or self._uses[norm] != 1:
                continue
            # Batch norm is over the second axis, a linear layer's outputs are along the last.
            if isinstance(layer, nn.Conv2d) or made.dim() == 2:
                yield layer, norm


def _owned(layer: nn.Module, children: list[nn.Module]) -> bool:
    """Return whether no other module has a parameter of `layer`."""
    ids = {id(parameter) for parameter in layer.parameters(recurse=False)}
    return not any(
        ids & {id(parameter) for parameter in child.parameters(recurse=False)}
        for child in children
        if child is not layer
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
