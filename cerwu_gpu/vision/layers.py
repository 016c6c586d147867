"""The weights of a plain torch module as matrices: linear layers and 2-D convolutions.

A convolution [out, in/g, kh, kw] is the matrix [out, in*kh*kw] over its unfolded patches; with
g > 1 groups it is g matrices [out/g, in/g*kh*kw], each with its own inputs. Both are the
parameter's own elements in their own order, seen with other axes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cerwu_gpu.container.header import DTYPES
from cerwu_gpu.errors import ConfigError, ModelError
from cerwu_gpu.files import dtype_name
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.patterns import chosen_names, matches

LEAST_WEIGHTS = 128
"""A group's matrix below this size takes more bytes coded than dense: tables and header count."""


@dataclass(frozen=True)
class Weights:
    """Which parameters of a module are compressed.

    Attributes:
        chosen: in the order of the module; shapes are those of the matrices.
        left: name -> reason, for every other parameter with two axes or more.
        small: names of those in `left` that are too small to gain.
    """

    chosen: tuple[WeightLayout, ...]
    left: dict[str, str]
    small: tuple[str, ...]


def find_weights(
    module: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> Weights:
    """The weights of linear layers and 2-D convolutions whose names match the glob patterns.

    A parameter that several modules share is one weight, under its first name. Patterns are
    compared with names with and without a final ".weight"; exclude wins over include. Convolutions
    of many tiny groups (LEAST_WEIGHTS; depthwise ones) are left alone unless a pattern of `include`
    other than "*" matches them.

    Raises:
        ModelError: the module has no such weight.
        ConfigError: a pattern matches nothing, or no weight is left.
    """
    layouts, left = candidates(module)
    if not layouts:
        raise ModelError(
            f"{type(module).__name__} has no linear layer and no 2-D convolution: "
            "there is nothing to compress."
        )
    every = dict(module.named_parameters())
    others = [name for name in every if name not in layouts]
    names = set(chosen_names(layouts, others, include, exclude))
    named = [pattern for pattern in include if pattern != "*"]
    small = [x for x in layouts if x in names and _small(layouts[x]) and not matches(x, named)]
    for name in small:
        rows, columns = layouts[name].matrix_shape
        left[name] = f"its {layouts[name].parts} matrices of {rows * columns} weights would grow"
    names -= set(small)
    if not names:
        raise ConfigError("all weights are too small to gain: name them in include to code them.")
    for name, parameter in every.items():
        if parameter.dim() >= 2 and name not in names:
            default = "not the weight of a linear layer or 2-D convolution"
            left.setdefault(name, "not chosen" if name in layouts else default)
    chosen = tuple(layout for name, layout in layouts.items() if name in names)
    return Weights(chosen, left, tuple(small))


def candidates(module: nn.Module) -> tuple[dict[str, WeightLayout], dict[str, str]]:
    """Every weight that is a matrix, by name; and name -> reason of those that cannot be used."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found: dict[str, set[WeightLayout]] = {}
    left: dict[str, str] = {}
    for parameter, groups in _matrices(module):
        name = names.get(id(parameter))
        if name is None:
            continue  # computed from other parameters, as by torch.nn.utils.parametrize
        if dtype_name(parameter.dtype) not in DTYPES:
            left[name] = f"its dtype is {parameter.dtype}"
        elif parameter.numel() == 0:
            left[name] = "it has no elements"
        else:
            found.setdefault(name, set()).add(weight_layout(name, parameter, groups))
    left |= {name: "shared between different groups" for name in found if len(found[name]) > 1}
    usable = {name: min(own, key=repr) for name, own in found.items() if name not in left}
    return {name: usable[name] for name in names.values() if name in usable}, left


def weight_layout(name: str, parameter: Tensor, groups: int) -> WeightLayout:
    """How a weight [out, in/groups, ...] holds its matrices."""
    rows, columns = len(parameter), parameter[0].numel()
    shape = (rows, columns) if groups == 1 else (groups, rows // groups, columns)
    return WeightLayout(name, shape, groups, False)


def matrix_of(layout: WeightLayout, parameter: Tensor, part: int) -> Tensor:
    """Matrix number `part` [m, n] of `parameter` in its own axes; a view where memory allows."""
    return layout.matrix(parameter.detach().reshape(layout.shape), part)


@torch.no_grad()
def store_matrix(layout: WeightLayout, parameter: Tensor, part: int, matrix: Tensor) -> None:
    """Write `matrix` [m, n] into `parameter` in place, rounded once to its dtype."""
    if layout.parts == 1:
        parameter.copy_(matrix.reshape(parameter.shape))
        return
    rows = layout.matrix_shape[0]
    own = parameter[part * rows : (part + 1) * rows]
    own.copy_(matrix.reshape(own.shape))


def _small(layout: WeightLayout) -> bool:
    rows, columns = layout.matrix_shape
    return layout.parts > 1 and rows * columns < LEAST_WEIGHTS


def _matrices(module: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """Weight and number of groups of every linear layer and 2-D convolution, shared ones too."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            yield child.weight, 1
        elif isinstance(child, nn.Conv2d):
            yield child.weight, child.groups


def require_plain(module: nn.Module) -> None:
    """Refuse modules whose parameters are not there yet.

    Raises:
        ConfigError: a lazy module was not run, or a parameter is on the meta device.
    """
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.is_meta:
            raise ConfigError(f"{name} has no values yet: run or load the module first.")
