"""How a parameter holds its matrices; pure tensor code, which the container needs too."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class WeightLayout:
    """One parameter that is compressed, and where its matrices [m, n] lie in it.

    Rows of a matrix are outputs, columns are inputs.

    Attributes:
        name: parameter name in the model.
        shape: the parameter's own shape: two axes, or three with the matrices along the first.
        parts: how many matrices the parameter holds (the experts of a mixture); 1 otherwise.
        transposed: the last two axes are [inputs, outputs] (GPT-2's Conv1D, gpt_oss's experts).
    """

    name: str
    shape: tuple[int, ...]
    parts: int
    transposed: bool

    def __post_init__(self) -> None:
        leading = self.shape[:-2]
        if leading != () and leading != (self.parts,):
            raise ValueError(f"{self.name}: shape {self.shape} does not hold {self.parts} matrices")
        if len(self.shape) < 2 or (leading == () and self.parts != 1):
            raise ValueError(f"{self.name}: shape {self.shape} does not hold {self.parts} matrices")

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(m, n) of each matrix."""
        rows, columns = self.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    def key(self, part: int) -> str:
        """A name for one matrix: the parameter's, with "[part]" where there are several."""
        return f"{self.name}[{part}]" if len(self.shape) == 3 else self.name

    def matrix(self, parameter: Tensor, part: int) -> Tensor:
        """Matrix number `part` as a view [m, n] of `parameter`, in its dtype, on its device.

        Raises:
            IndexError: `part` is not in 0 ... parts - 1.
        """
        if not 0 <= part < self.parts:
            raise IndexError(f"{self.name} has {self.parts} matrices, there is no number {part}")
        stored = parameter[part] if len(self.shape) == 3 else parameter
        return stored.T if self.transposed else stored

    def store(self, parameter: Tensor, part: int, matrix: Tensor) -> None:
        """Write `matrix` [m, n] into `parameter` in place, rounded once to its dtype.

        Raises:
            IndexError: `part` is not in 0 ... parts - 1.
            ValueError: `matrix` is not [m, n].
        """
        if tuple(matrix.shape) != self.matrix_shape:
            raise ValueError(
                f"{self.name}: a matrix {tuple(matrix.shape)} does not fit {self.matrix_shape}"
            )
        self.matrix(parameter.detach(), part).copy_(matrix)
