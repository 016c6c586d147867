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
"""Number of elements of patches that are unfolded at a time; at least those of one image."""


@dataclass(frozen=True)
class Geometry:
    """Geometry of a convolution; `padding` is (left, right, top, bottom)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    def patches(self, x: Tensor) -> Tensor:
        """Return patches [samples, groups, in/groups * kh * kw, positions] of x [samples, in,
        height, width]."""
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
        x: input, [..., n] or [(samples,) in, height, width].
        output: [..., m] or [(samples,) out, height, width]; None before it is computed.
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
        """Key of the tensor and its patches, valid while that tensor is alive."""
        return id(self.x), self.x._version, self.geometry


Note = Callable[[Product], None]
"""Callback that receives every product of a watched weight."""


class Products(TorchFunctionMode):
    """A mode that calls `note` with every product of the weights."""

    def __init__(self, weights: Mapping[str, Tensor], note: Note) -> None:
        """Watch `weights`: parameter name -> the very parameter that the module uses."""
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
        """Return (parameter name, input, geometry) if the weight is watched."""
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
    if padding == "same":  # the larger half goes to the right and to the bottom
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
    """Return the number of applications per sample: rows of an input, or pixels of an output."""
    if product.geometry is not None:
        assert product.output is not None, "convolutions are watched with their output"
        return product.output.shape[-1] * product.output.shape[-2]
    return product.x[0].numel() // product.x.shape[-1] if product.x.dim() > 1 else 1


def input_rows(product: Product, sampled: Tensor | None) -> Iterator[Tensor]:
    """Yield the product's input as [groups, rows, n] float32, a few samples at a time.

    Args:
        sampled: int64 [k], the positions of each sample to take; None: all.
    """
    x, geometry = product.x.detach(), product.geometry
    if geometry is None:
        x = x.reshape(-1, positions(product), x.shape[-1])
        width = x[:1].numel()
    else:
        x = x if x.dim() == 4 else x[None]
        width = positions(product) * x.shape[1] * geometry.kernel[0] * geometry.kernel[1]
    for chunk in torch.split(x.float(), max(1, PATCH_ELEMENTS // max(1, width))):
        if geometry is None:
            rows = chunk if sampled is None else chunk.index_select(1, sampled)
            yield rows.flatten(0, 1)[None]
        else:
            patches = geometry.patches(chunk)
            patches = patches if sampled is None else patches.index_select(3, sampled)
            yield patches.permute(1, 0, 3, 2).flatten(1, 2)


def output_rows(product: Product, gradient: Tensor) -> Tensor:
    """Return a gradient at the product's output as [rows, m] float32."""
    if product.geometry is not None:
        gradient = gradient.movedim(-3, -1)
    return gradient.reshape(-1, gradient.shape[-1]).float()


@contextmanager
def module_products(weights: BlockWeights, note: Note, *, before: bool = False) -> Iterator[None]:
    """Call `note` with the products of the modules that hold the weights, inside the context; with
    `before`, those of linear layers before they are computed, without their output."""
    experts = [layout for layout in weights.layouts if len(layout.shape) == 3]
    with ExitStack() as stack:
        for layout in weights.layouts:
            if layout not in experts:
                module, hook = weights.owner(layout.name), _hook(layout.name, note)
                register: Any = module.register_forward_hook
                if before:
                    register = module.register_forward_pre_hook
                stack.callback(register(hook, with_kwargs=True).remove)
        if experts:
            stack.enter_context(_ExpertProducts(weights, experts, note))
        if len(experts) < len(weights.layouts):
            stack.enter_context(_LeftProducts(weights, note, before))
        yield


def _hook(name: str, note: Note) -> Any:
    """Return a hook for before or after a linear layer's forward that notes its product."""

    def hook(
        module: nn.Module,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        output: Tensor | None = None,
    ) -> None:
        x = arguments[0] if arguments else next(iter(keywords.values()))
        note(Product(name, x, output))

    return hook


_MATRIX_PRODUCTS = frozenset(
    {
        *(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__),
        *(torch.mm, torch.Tensor.mm),
    }
)


class _LeftProducts(TorchFunctionMode):
    """A mode that notes each product of a weight with columns, W X: Mamba takes the weight of its
    `dt_proj` without calling it."""

    def __init__(self, weights: BlockWeights, note: Note, before: bool) -> None:
        super().__init__()
        self._note = note
        self._before = before
        self._names = {
            id(weights.parameter(layout.name)): layout.name
            for layout in weights.layouts
            if len(layout.shape) == 2 and not layout.transposed
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        left = args[0] if func in _MATRIX_PRODUCTS and len(args) == 2 else None
        name = self._names.get(id(left))
        if name is None:
            return func(*args, **(kwargs or {}))
        columns = args[1] if args[1].dim() > 1 else args[1][:, None]
        if self._before:
            self._note(Product(name, columns.mT, None))
            return func(*args, **(kwargs or {}))
        rows = func(args[0], columns).mT
        self._note(Product(name, columns.mT, rows))
        return rows.mT if columns is args[1] else rows[..., 0, :]


class _ExpertProducts(TorchFunctionMode):
    """A mode that notes each product with one expert's slice of a parameter [experts, ., .]."""

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
        if func is torch.bmm and len(args) == 2 and args[1].data_ptr() in self._slices:
            return self._stacked(*args)
        output = func(*args, **(kwargs or {}))
        if func is functional.linear:
            self._recognise(args[0], args[1], output)
        elif func in _MATRIX_PRODUCTS:
            self._recognise(args[0], args[1].mT, output)
        return output

    def _stacked(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Return the products of x [experts, tokens, n] with all experts' matrices [experts, n, m];
        those tokens count that the router sends to an expert, all others being zero there
        (Llama 4)."""
        outputs = []
        for rows, matrix, output in zip(x, matrices, torch.bmm(x, matrices), strict=True):
            sent = rows.any(dim=1)
            taken = output[sent]
            self._recognise(rows[sent], matrix.mT, taken)
            outputs.append(torch.zeros_like(output).index_put((sent,), taken))
        return torch.stack(outputs)

    def _recognise(self, x: Tensor, matrix: Tensor, output: Tensor) -> None:
        """Note the application of `matrix` [m, n] to x [..., n] if it is an expert's."""
        expert = self._slices.get(matrix.data_ptr())
        if expert is None or matrix.dim() != 2 or matrix.numel() == 0:
            return
        layout, part, stride = expert
        if tuple(matrix.shape) != layout.matrix_shape or matrix.stride() != stride:
            raise CalibrationError(
                f"{layout.key(part)} is applied to its inputs in an unknown way: exclude it."
            )
        self._note(Product(layout.name, x, output, part=part))
