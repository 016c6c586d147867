"""Layout of matrices in a parameter."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads layouts of manifests, and torch takes seconds
    from torch import Tensor

Label = tuple[str, int]
"""Label of one matrix: (parameter name, part)."""


@dataclass(frozen=True)
class WeightLayout:
    """One compressed parameter and the places of its matrices [m, n].

    Rows of a matrix are outputs, columns are inputs. The matrices follow each other in the order of
    the parameter's elements:

    - [m, n], a linear layer: one matrix;
    - [experts, m, n]: one matrix per expert;
    - [out, in/g, kh, kw], a convolution of g groups: g matrices [out/g, in/g * kh * kw] over
      unfolded patches.

    Attributes:
        name: parameter name in the model.
        shape: of the parameter: two axes, three (experts) or four (a convolution).
        parts: number of matrices (experts, groups); 1 otherwise.
        transposed: a matrix's two axes are [inputs, outputs] (GPT-2's Conv1D, gpt_oss's experts).

    Raises:
        ValueError: the shape does not hold `parts` matrices.
    """

    name: str
    shape: tuple[int, ...]
    parts: int
    transposed: bool

    def __post_init__(self) -> None:
        axes = len(self.shape)
        holds = (
            (axes == 2 and self.parts == 1)
            or (axes == 3 and self.parts == self.shape[0])
            or (axes == 4 and self.parts >= 1 and self.shape[0] % self.parts == 0)
        )
        if not holds or (axes == 4 and self.transposed):
            raise ValueError(f"{self.name}: shape {self.shape} does not hold {self.parts} matrices")

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape (m, n) of the matrices."""
        if len(self.shape) == 4:
            return self.shape[0] // self.parts, math.prod(self.shape[1:])
        rows, columns = self.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    def key(self, part: int) -> str:
        """Return the name of one matrix: the parameter's, with "[part]" for experts and groups."""
        numbered = self.parts > 1 or len(self.shape) == 3
        return f"{self.name}[{part}]" if numbered else self.name

    def matrix(self, parameter: "Tensor", part: int) -> "Tensor":
        """Return matrix number `part` [m, n] of `parameter`, in its dtype, on its device.

        It is a view, except of convolutions with a memory order other than their axes.

        Raises:
            IndexError: `part` is not in 0 ... parts - 1.
        """
        piece = self._piece(parameter, part)
        stored = piece.flatten(1) if piece.dim() == 4 else piece
        return stored.T if self.transposed else stored

    def store(self, parameter: "Tensor", part: int, matrix: "Tensor") -> None:
        """Write `matrix` [m, n] into `parameter` in place, rounded once to its dtype.

        Raises:
            IndexError: `part` is not in 0 ... parts - 1.
            ValueError: `matrix` is not [m, n].
        """
        if tuple(matrix.shape) != self.matrix_shape:
            raise ValueError(
                f"{self.name}: a matrix {tuple(matrix.shape)} does not fit {self.matrix_shape}"
            )
        piece = self._piece(parameter.detach(), part)
        piece.copy_((matrix.T if self.transposed else matrix).reshape(piece.shape))

    def _piece(self, parameter: "Tensor", part: int) -> "Tensor":
        """Return the elements of a matrix in the parameter's axes."""
        if not 0 <= part < self.parts:
            raise IndexError(f"{self.name} has {self.parts} matrices, there is no number {part}")
        if len(self.shape) == 3:
            return parameter[part]
        rows = self.shape[0] // self.parts
        return parameter[part * rows : (part + 1) * rows]
