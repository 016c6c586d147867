r"""Factors on the rows of weights, while a module runs, with gradients that need no weight.

A product y = W x becomes diag(f) W x; the gradient of f_i is the sum over tokens of g_i y_i, g the
gradient behind the factor. It costs one pass over the outputs, where that of W costs a product.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cerwu_gpu.layout import WeightLayout

_MATRIX_PRODUCTS = frozenset(
    {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm}
)
_ARGUMENTS = ("input", "weight", "bias")
CHUNK = 2**18
"""Approximate number of products that are summed at a time: they stay in the processor's cache."""


class RowFactors(TorchFunctionMode):
    """A mode that multiplies the rows of chosen weights by factors wherever they are applied.

    It knows linear layers, GPT-2's Conv1D, 2-D convolutions, embeddings, and products with one
    expert's slice. Where a weight is used otherwise its factors have no effect and no gradient.
    """

    def __init__(
        self,
        layouts: Sequence[WeightLayout],
        weights: Mapping[str, Tensor],
        factors: Mapping[str, Tensor],
    ) -> None:
        """Take the weights where they are now.

        Args:
            layouts: of the weights.
            weights: parameter name -> the very parameter that the module uses.
            factors: parameter name -> float32 [parts * m], on the weights' device; row i of part p
                has the factor p * m + i.
        """
        super().__init__()
        self._whole: dict[int, tuple[WeightLayout, Tensor]] = {}
        self._slices: dict[int, tuple[tuple[int, ...], Tensor]] = {}
        for layout in layouts:
            weight, factor = weights[layout.name], factors[layout.name]
            if len(layout.shape) == 3:
                for part, one in enumerate(factor.view(layout.parts, -1)):
                    matrix = layout.matrix(weight.detach(), part)
                    self._slices[matrix.data_ptr()] = matrix.stride(), one
            else:
                self._whole[id(weight)] = layout, factor

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if func is functional.linear or func is functional.conv2d:
            return self._product(func, args, given)
        if func is functional.embedding and id(args[1]) in self._whole:
            factor = self._whole[id(args[1])][1]
            looked: Any = _Looked
            return looked.apply(func(*args, **given), args[0], factor)
        if func is torch.addmm and not given and id(args[2]) in self._whole:
            factor = self._whole[id(args[2])][1]
            return args[0] + _scaled(torch.mm(args[1], args[2]), factor, -1)
        if func in _MATRIX_PRODUCTS:
            expert = self._expert(args[1].mT) if args[1].dim() == 2 else None
            if expert is not None:
                return _scaled(func(*args, **given), expert, -1)
        return func(*args, **given)

    def _product(self, func: Any, args: tuple[Any, ...], given: Mapping[str, Any]) -> Tensor:
        """Return a linear layer's or a convolution's output, its bias added behind the factors."""
        named = {**dict(zip(_ARGUMENTS, args, strict=False)), **given}
        weight, bias = named["weight"], named.pop("bias", None)
        found = self._whole.get(id(weight))
        factor = self._expert(weight) if found is None else found[1]
        if factor is None:
            output: Tensor = func(*args, **given)
            return output
        axis = -1 if func is functional.linear else -3
        scaled = _scaled(func(**named, **_rest(args)), factor, axis)
        if bias is not None:
            scaled = scaled + (bias if axis == -1 else bias[:, None, None])
        return scaled

    def _expert(self, matrix: Tensor) -> Tensor | None:
        """Return the factors of a matrix [m, n] that is one expert's slice."""
        if not self._slices or matrix.dim() != 2:
            return None
        stride, factor = self._slices.get(matrix.data_ptr(), ((), None))
        return factor if matrix.stride() == stride else None


def _rest(args: tuple[Any, ...]) -> dict[str, Any]:
    """Return the positional arguments of conv2d behind the bias, by name."""
    return dict(zip(("stride", "padding", "dilation", "groups"), args[3:], strict=False))


def _scaled(output: Tensor, factor: Tensor, axis: int) -> Tensor:
    function: Any = _Scaled
    scaled: Tensor = function.apply(output, factor, axis)
    return scaled


def _along(factor: Tensor, axis: int) -> Tensor:
    """Return factors [rows] shaped for an axis counted from the end."""
    return factor.reshape(-1, *[1] * (-axis - 1))


class _Scaled(torch.autograd.Function):
    """A product's output times factors along one axis, in place."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, factor: Tensor, axis: int) -> Tensor:
        output.mul_(_along(factor, axis))
        ctx.mark_dirty(output)
        ctx.save_for_backward(output, factor)
        ctx.axis = axis
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,), (output, factor) = gradients, ctx.saved_tensors
        axis = ctx.axis
        of_factor = _summed_products(gradient.movedim(axis, -1), output.movedim(axis, -1)) / factor
        return (gradient * _along(factor, axis)).to(gradient.dtype), of_factor, None


def _summed_products(a: Tensor, b: Tensor) -> Tensor:
    """Return the sums over all but the last axis of a * b, float32, a few rows at a time."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    size = max(1, CHUNK // a.shape[1])
    total = a.new_zeros(a.shape[1], dtype=torch.float32)
    for some, others in zip(*(torch.split(x, size) for x in (a, b)), strict=True):
        total += (some.float() * others).sum(0)
    return total


class _Looked(torch.autograd.Function):
    """Rows [..., d] of an embedding times the factors of their tokens [...]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, tokens: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(rows, tokens, factor)
        return (rows * factor[tokens][..., None]).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (gradient,), (rows, tokens, factor) = gradients, ctx.saved_tensors
        products = (gradient.float() * rows).sum(-1)
        of_factor = torch.zeros_like(factor).index_add_(0, tokens.flatten(), products.flatten())
        return (gradient * factor[tokens][..., None]).to(rows.dtype), None, of_factor
