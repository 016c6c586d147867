"""Sees every product with a chosen weight while a module runs, and what it is applied to.

Not the modules but the products themselves are watched (torch.nn.functional.linear, conv2d): a
module that is called twice, a parameter that two modules share, padding of any mode and a weight
that is used without its module's forward (nn.MultiheadAttention) are all seen as they are computed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

PATCH_ELEMENTS = 1 << 24
"""Patches are unfolded for so many elements at a time, at least one image."""


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks over its input; `padding` is (left, right, top, bottom)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    def patches(self, x: Tensor) -> Tensor:
        """[samples, groups, in/groups * kh * kw, positions] of x [samples, in, height, width]."""
        padded = functional.pad(x, self.padding)
        unfolded = functional.unfold(
            padded, self.kernel, dilation=self.dilation, stride=self.stride
        )
        return unfolded.reshape(len(x), self.groups, -1, unfolded.shape[-1])


@dataclass(frozen=True)
class Product:
    """One use of a chosen weight.

    Attributes:
        name: of the parameter.
        x: what the weight was applied to: [..., n], or [(samples,) in, height, width].
        output: [..., m], or [(samples,) out, height, width].
        geometry: of a convolution; None for a matrix product.
    """

    name: str
    x: Tensor
    output: Tensor
    geometry: Geometry | None

    @property
    def identity(self) -> tuple[int, int, Geometry | None]:
        """Equal for two uses of one tensor with the same patches, while that tensor is alive."""
        return id(self.x), self.x._version, self.geometry


class Products(TorchFunctionMode):
    """While this is open, `note` is called with every product of the weights."""

    def __init__(self, weights: Mapping[str, Tensor], note: Callable[[Product], None]) -> None:
        """`weights`: parameter name -> the very parameter that the module uses."""
        super().__init__()
        self._names = {id(weight): name for name, weight in weights.items()}
        self._note = note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        keywords = kwargs or {}
        output = func(*args, **keywords)
        if func is functional.linear or func is functional.conv2d:
            seen = self._seen(func, args, keywords)
            if seen is not None:
                name, x, geometry = seen
                self._note(Product(name, x, output, geometry))
        return output

    def _seen(
        self, func: Any, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[str, Tensor, Geometry | None] | None:
        """(parameter name, input, geometry) where the weight is one of those watched."""
        given = dict(zip(_ARGUMENTS, args, strict=False)) | keywords
        name = self._names.get(id(given["weight"]))
        if name is None:
            return None
        geometry = _geometry(given) if func is functional.conv2d else None
        return name, given["input"], geometry


_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def _geometry(given: Mapping[str, Any]) -> Geometry:
    """Of the arguments of conv2d."""
    kernel = given["weight"].shape[2], given["weight"].shape[3]
    dilation = _pair(given.get("dilation", 1))
    padding = given.get("padding", 0)
    if padding == "same":  # what is odd goes to the right and to the bottom
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        (top, bottom), (left, right) = [(t // 2, t - t // 2) for t in total]
    else:
        top, left = (0, 0) if padding == "valid" else _pair(padding)
        bottom, right = top, left
    return Geometry(
        kernel,
        _pair(given.get("stride", 1)),
        (left, right, top, bottom),
        dilation,
        given.get("groups", 1),
    )


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, *rest = value
    return first, rest[0] if rest else first


def positions(product: Product) -> int:
    """How often the weight is applied to each sample: rows of an input, or pixels of an output."""
    if product.geometry is not None:
        return product.output.shape[-1] * product.output.shape[-2]
    return product.x[0].numel() // product.x.shape[-1] if product.x.dim() > 1 else 1


def input_rows(product: Product, kept: Tensor | None) -> Iterator[Tensor]:
    """The product's input as [groups, rows, n] float32, a few samples at a time.

    Args:
        kept: int64 [k], the positions of each sample to take; None: all.
    """
    x, geometry = product.x.detach(), product.geometry
    if geometry is None:
        x = x.reshape(-1, positions(product), x.shape[-1])
        width = x[:1].numel()
    else:
        x = x if x.dim() == 4 else x[None]
        width = positions(product) * x.shape[1] * geometry.kernel[0] * geometry.kernel[1]
    for some in torch.split(x.float(), max(1, PATCH_ELEMENTS // max(1, width))):
        if geometry is None:
            rows = some if kept is None else some.index_select(1, kept)
            yield rows.flatten(0, 1)[None]
        else:
            patches = geometry.patches(some)
            patches = patches if kept is None else patches.index_select(3, kept)
            yield patches.permute(1, 0, 3, 2).flatten(1, 2)


def output_rows(product: Product, gradient: Tensor) -> Tensor:
    """A gradient at the product's output as [rows, m] float32."""
    if product.geometry is not None:
        gradient = gradient.movedim(-3, -1)
    return gradient.reshape(-1, gradient.shape[-1]).float()
