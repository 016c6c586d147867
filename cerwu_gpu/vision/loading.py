"""Stored weights back into a module."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from cerwu_gpu.container.reader import CompressedDirectory
from cerwu_gpu.errors import FormatError
from cerwu_gpu.files import dtype_name
from cerwu_gpu.vision.layers import candidates

Module = TypeVar("Module", bound=nn.Module)


def in_own_shapes(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with matrices in the shapes of the module's convolutions; all else as it is.

    Args:
        module: gives the shapes; it may be on the meta device.
    """
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    layouts, _ = candidates(module)
    return {
        name: tensor.reshape(shapes[name])
        if name in layouts and tuple(tensor.shape) == layouts[name].shape
        else tensor
        for name, tensor in state.items()
    }


@torch.no_grad()
def fill(
    module: Module,
    directory: CompressedDirectory,
    *,
    device: torch.device,
    verify: bool = True,
    progress: bool = False,
) -> Module:
    """`module` with every stored tensor in its place; nothing is changed before all fit.

    Args:
        device: where weights are decoded; the module stays where it is.

    Raises:
        FormatError: names, shapes or dtypes of the file and the module differ, or the file is
            damaged.
    """
    state = dict(directory.plain(verify=verify))
    state |= dict(directory.weights(device=device, verify=verify, progress=progress))
    state = in_own_shapes(module, state)
    own: dict[str, Tensor] = dict(module.state_dict(keep_vars=True))
    kind, path = type(module).__name__, directory.path
    for name in state:
        if name not in own:
            raise FormatError(f"{path} has {name}, which {kind} lacks: give the module it is of.")
    stored = {id(own[name]) for name in state}
    for name, tensor in own.items():
        if id(tensor) not in stored:
            raise FormatError(f"{path} lacks {name} of {kind}: give the module it is of.")
        if name in state and (tensor.shape, tensor.dtype) != (state[name].shape, state[name].dtype):
            raise FormatError(
                f"{path} has {name} as {_described(state[name])}, {kind} as {_described(tensor)}: "
                "give the module it is of."
            )
    for name, tensor in state.items():
        own[name].copy_(tensor)
    return module


def _described(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
