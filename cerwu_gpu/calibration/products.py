"""Products with chosen weights, watched while a module runs.

`Products` watches the products themselves (torch.nn.functional.linear, conv2d): a module that is
called twice, a parameter that two modules share, padding of any mode and a weight that is used
without its module's forward (nn.MultiheadAttention) are all noticed as they are computed.

`module_products` watches the modules that hold the weights, by hooks: a linear layer of a language
model may call addmm, or be replaced by a fused one that calls no function of torch. Experts of a
mixture are no modules of their own, so their slices are recognised by their addresses.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cerwu_gpu.compression.blocks import BlockWeights
from cerwu_gpu.errors import CalibrationError
from cerwu_gpu.layout import WeightLayout

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
        output: [..., m], or [(samples,) out, height, width]; None where the product is watched
            before it is computed.
        geometry: of a convolution; None for a matrix product.
        part: number of the expert.
    """

    name: str
    x: Tensor
    output: Tensor | None
    geometry: Geometry | None = None
    part: int = 0

    @property
    def identity(self) -> tuple[int, int, Geometry | None]:
        """Equal for two uses of one tensor with the same patches, while that tensor is alive."""
        return id(self.x), self.x._version, self.geometry


Note = Callable[[Product], None]
"""Called with every product of a watched weight."""


class Products(TorchFunctionMode):
    """While this is open, `note` is called with every product of the weights."""

    def __init__(self, weights: Mapping[str, Tensor], note: Note) -> None:
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
            use = self._use(func, args, keywords)
            if use is not None:
                name, x, geometry = use
                self._note(Product(name, x, output, geometry))
        return output

    def _use(
        self, func: Any, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[str, Tensor, Geometry | None] | None:
        """Return (parameter name, input, geometry) where the weight is a watched one."""
        given = dict(zip(_ARGUMENTS, args, strict=False)) | keywords
        name = self._names.get(id(given["weight"]))
        if name is None:
            return None
        geometry = _geometry(given) if func is functional.conv2d else None
        return name, given["input"], geometry


_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def _geometry(given: Mapping[str, Any]) -> Geometry:
    """Return the geometry that the arguments of conv2d describe."""
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
    """Return how often the weight is applied to each sample: rows of an input, pixels of an
    output."""
    if product.geometry is not None:
        assert product.output is not None, "convolutions are watched with their output"
        return product.output.shape[-1] * product.output.shape[-2]
    return product.x[0].numel() // product.x.shape[-1] if product.x.dim() > 1 else 1


def input_rows(product: Product, kept: Tensor | None) -> Iterator[Tensor]:
    """Yield the product's input as [groups, rows, n] float32, a few samples at a time.

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
    """Return a gradient at the product's output as [rows, m] float32."""
    if product.geometry is not None:
        gradient = gradient.movedim(-3, -1)
    return gradient.reshape(-1, gradient.shape[-1]).float()


@contextmanager
def module_products(weights: BlockWeights, note: Note, *, before: bool = False) -> Iterator[None]:
    """While this is open, `note` is called with the products of the modules that hold the weights.

    Args:
        before: with those of linear layers before they are computed, without their output.
    """
    experts = [layout for layout in weights.layouts if len(layout.shape) == 3]
    with ExitStack() as stack:
        for layout in weights.layouts:
            if layout not in experts:
                module = weights.owner(layout.name)
                if before:
                    handle = module.register_forward_pre_hook(
                        _before(layout.name, note), with_kwargs=True
                    )
                else:
                    handle = module.register_forward_hook(
                        _after(layout.name, note), with_kwargs=True
                    )
                stack.callback(handle.remove)
        if experts:
            stack.enter_context(_ExpertProducts(weights, experts, note))
        yield


def _before(name: str, note: Note) -> Any:
    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        note(Product(name, _input(arguments, keywords), None))

    return hook


def _after(name: str, note: Note) -> Any:
    def hook(
        module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor
    ) -> None:
        note(Product(name, _input(arguments, keywords), output))

    return hook


def _input(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """Return what a linear layer was called with."""
    x: Tensor = arguments[0] if arguments else next(iter(keywords.values()))
    return x


_MATRIX_PRODUCTS = frozenset(
    {
        *(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__),
        *(torch.mm, torch.Tensor.mm),
    }
)


class _ExpertProducts(TorchFunctionMode):
    """Notes each product with one expert's slice of a parameter [experts, ., .]."""

    def __init__(self, weights: BlockWeights, experts: Sequence[WeightLayout], note: Note) -> None:
        super().__init__()
        self._note = note
        self._slices: dict[int, tuple[WeightLayout, int, tuple[int, ...]]] = {}
        for layout in experts:
            parameter = weights.parameter(layout.name)
            for part in range(layout.parts):
                matrix = layout.matrix(parameter, part)
                self._slices[matrix.data_ptr()] = layout, part, matrix.stride()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is functional.linear:
            self._recognise(args[0], args[1], output)
        elif func in _MATRIX_PRODUCTS:
            self._recognise(args[0], args[1].mT, output)
        return output

    def _recognise(self, x: Tensor, matrix: Tensor, output: Tensor) -> None:
        """Note that `matrix` [m, n] was applied to x [..., n], if it is an expert's."""
        expert = self._slices.get(matrix.data_ptr())
        if expert is None or matrix.dim() != 2 or matrix.numel() == 0:
            return
        layout, part, stride = expert
        if tuple(matrix.shape) != layout.matrix_shape or matrix.stride() != stride:
            raise CalibrationError(
                f"{layout.key(part)} is applied to its inputs in an unknown way: exclude it."
            )
        self._note(Product(layout.name, x, output, part=part))
