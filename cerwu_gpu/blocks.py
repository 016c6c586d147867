"""The unit of work: matrices to quantize, second moments of their inputs, and the way back.

Adapters (`cerwu_gpu.hf`, `cerwu_gpu.vision`) supply the blocks of a model; `cerwu_gpu.pipeline`
works them off one by one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Matrix:
    """One weight as a matrix, rows = outputs, columns = inputs.

    Attributes:
        name: parameter name in the model, e.g. "model.layers.0.self_attn.q_proj.weight".
        part: index along the leading axis for a parameter that holds several matrices
            (the experts of a mixture); 0 otherwise.
        weight: [m, n] float32 on the device of the work.
        input: key of the distinct input; matrices with the same key share one Hessian.
    """

    name: str
    part: int
    weight: Tensor
    input: str


@dataclass(frozen=True)
class InputStatistics:
    """Second moment of one distinct input.

    Attributes:
        hessian: [n, n] float32, H = (2/p) X X^T over the p tokens seen; zeros when p is 0.
        tokens: p.
        cross: [n, n] float32, (2/p) X X_hat^T of the original model's inputs X and those that
            the compressed model has, X_hat; `hessian` is then that of X_hat. None: X is both.
    """

    hessian: Tensor
    tokens: int
    cross: Tensor | None = None


class Block(Protocol):
    """One transformer block in work: its matrices, their inputs' statistics, and the way on."""

    name: str

    def matrices(self) -> Sequence[Matrix]:
        """The matrices to quantize; together they cover each chosen parameter whole."""
        ...

    def statistics(self) -> dict[str, InputStatistics]:
        """Stream the calibration inputs through the block; key -> statistics of that input."""
        ...

    def pass_by(self) -> None:
        """Instead of `statistics`, where `replace` will get what is known from an earlier run."""
        ...

    def replace(self, name: str, part: int, weight: Tensor) -> None:
        """Put the quantized `weight` [m, n] into the model, in the parameter's layout and dtype."""
        ...


class Blocks(Protocol):
    """The blocks in order; the next one is made when the previous one is finished."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Block]: ...
