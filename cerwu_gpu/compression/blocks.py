"""The unit of work: matrices to quantize, second moments of their inputs, and write-back.

`cerwu_gpu.calibration` supplies the blocks of a model; `pipeline` works them off one by one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from cerwu_gpu.layout import Label, WeightLayout


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
        hessian: [n, n] float32, H = (2/p) X X^T over the p tokens seen; zeros when p is 0. On the
            meta device where another rank owns the input, and quantizes what sees it.
        tokens: p.
        cross: [n, n] float32, (2/p) X X_hat^T of the original model's inputs X and the compressed
            model's X_hat; `hessian` is then that of X_hat. None: X is both.
        rows_seen: number of inputs x that the Hessian is a mean of, from which its damping follows;
            None: so many that it does not matter (whole modules: samples of many positions).
    """

    hessian: Tensor
    tokens: int
    cross: Tensor | None = None
    rows_seen: int | None = None

    @property
    def here(self) -> bool:
        """Whether this rank owns the input."""
        return not self.hessian.is_meta


def search_cost(rows: int, columns: int) -> float:
    """Return the approximate cost of the search of matrices that share an input, in arbitrary
    units: factors, and `rows` of all of them."""
    return columns**2 * (4 * columns + rows)


class Block(Protocol):
    """Matrices that are quantized together, with the statistics of their inputs.

    Attributes:
        name: of the block, for messages.
    """

    name: str

    @property
    def inputs(self) -> Mapping[Label, str]:
        """Key in `statistics` of each matrix's input."""
        ...

    def matrices(self) -> Sequence[Matrix]:
        """Return the matrices to quantize, all of each chosen parameter."""
        ...

    def statistics(self) -> dict[str, InputStatistics]:
        """Return key -> statistics of that input, from the calibration data."""
        ...

    def replace(self, name: str, part: int, weight: Tensor) -> None:
        """Put the quantized `weight` [m, n] into the model, in the parameter's layout and dtype.

        Called before `statistics`, it propagates the inputs without accumulating any.
        """
        ...


class Blocks(Protocol):
    """The blocks in order; the next one is made when the previous one is finished."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Block]: ...


class BlockWeights:
    """The chosen weights of one block, as matrices.

    Attributes:
        layouts: of the weights.
    """

    def __init__(
        self, module: nn.Module, layouts: Sequence[WeightLayout], device: torch.device
    ) -> None:
        """Take the parameters of `module` that have the layouts' names, for work on `device`."""
        self.layouts = tuple(layouts)
        self._module = module
        self._device = device
        self._layout_of = {layout.name: layout for layout in layouts}

    def parameter(self, name: str) -> nn.Parameter:
        """Return the parameter of this name."""
        return self._module.get_parameter(name)

    def owner(self, name: str) -> nn.Module:
        """Return the module that holds the parameter of this name."""
        return self._module.get_submodule(name.rpartition(".")[0])

    def matrices(self, inputs: Mapping[Label, str]) -> list[Matrix]:
        """Return all matrices, float32 on the device, copies that later changes do not touch."""
        return [
            Matrix(
                name=layout.name,
                part=part,
                weight=layout.matrix(self.parameter(layout.name).detach(), part).to(
                    self._device, torch.float32, copy=True
                ),
                input=inputs[layout.name, part],
            )
            for layout in self.layouts
            for part in range(layout.parts)
        ]

    def store(self, name: str, part: int, weight: Tensor) -> None:
        """Write a matrix [m, n] into its parameter."""
        self._layout_of[name].store(self.parameter(name), part, weight)


class KnownBlock:
    """A block whose statistics need no run of the model (Block)."""

    def __init__(
        self,
        name: str,
        weights: BlockWeights,
        inputs: Mapping[Label, str],
        statistics: dict[str, InputStatistics],
    ) -> None:
        self.name = name
        self.inputs = inputs
        self._weights = weights
        self._statistics = statistics

    def matrices(self) -> list[Matrix]:
        return self._weights.matrices(self.inputs)

    def statistics(self) -> dict[str, InputStatistics]:
        return self._statistics

    def replace(self, name: str, part: int, weight: Tensor) -> None:
        self._weights.store(name, part, weight)
