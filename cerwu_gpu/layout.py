"""How a parameter holds its matrices; pure tensor code, which the container needs too."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads layouts of manifests, and torch takes seconds
    from torch import Tensor

Label = tuple[str, int]
"""(parameter name, part): one matrix."""


@dataclass(frozen=True)
class WeightLayout:
    """One parameter that is compressed, and where its matrices [m, n] lie in it.

    Rows of a matrix are outputs, columns are inputs. The elements of matrix after matrix are those
    of the parameter in their own order:

    - [m, n], a linear layer: one matrix;
    - [experts, m, n]: one matrix per expert;
    - [out, in/g, kh, kw], a convolution of g groups: g matrices [out/g, in/g * kh * kw] over
      unfolded patches.

    Attributes:
        name: parameter name in the model.
        shape: the parameter's own shape: two axes, three (experts) or four (a convolution).
        parts: how many matrices the parameter holds (experts, groups); 1 otherwise.
        transposed: a matrix's two axes are [inputs, outputs] (GPT-2's Conv1D, gpt_oss's experts).

    Raises:
        ValueError: the shape does not hold so many matrices.
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
        """(m, n) of the matrices."""
        if len(self.shape) == 4:
            return self.shape[0] // self.parts, math.prod(self.shape[1:])
        rows, columns = self.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def several(self) -> bool:
        """Whether a part needs its number in its name."""
        return self.parts > 1 or len(self.shape) == 3

    def key(self, part: int) -> str:
        """Return a name for one matrix: the parameter's, with "[part]" where there are several."""
        return f"{self.name}[{part}]" if self.several else self.name

    def matrix(self, parameter: "Tensor", part: int) -> "Tensor":
        """Return matrix number `part` [m, n] of `parameter`, in its dtype, on its device.

        It is a view, except of convolutions whose memory is in another order than their axes.

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
        """Return the elements of a matrix in the parameter's own axes."""
        if not 0 <= part < self.parts:
            raise IndexError(f"{self.name} has {self.parts} matrices, there is no number {part}")
        if len(self.shape) == 3:
            return parameter[part]
        rows = self.shape[0] // self.parts
        return parameter[part * rows : (part + 1) * rows]
