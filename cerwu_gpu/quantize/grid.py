r"""Grids: the step of every column, the scale of every row, and the integers that are allowed.

- waterfilled: step_j = C_jj sqrt(lmbda / kappa), no bound on the integers. Columns that matter
  less get coarser steps, and one lmbda sets all of them (docs/method.md).
- uniform: |G| levels scaled by the abs-max of the matrix or of each row.
- list: given values, in units of the abs-max.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cerwu_gpu.config import Uniform, Values
from cerwu_gpu.steps import covering_code, step_codes, step_values

COARSE_STEPS = 904.0
"""Resolution of a step code of one weight; of k weights it is finer by sqrt(k) (`step_unit`)."""
KAPPA = {0: 0.065, 4: 0.16, 8: 0.17, 16: 0.17, 32: 0.17}
"""lmbda C_jj^2 / step_j^2 by number of trellis states; ln2/12 in the limit of high rate."""

FINEST = 2.0**-22
"""Minimum step in units of its column's largest weight: float32 is exact for its integers."""


@dataclass(frozen=True)
class Grid:
    """The levels that the symbols of B stacks stand for; bounded ones are of one stack.

    Attributes:
        column_step: [B, n] or [1, 1] int16 step codes.
        row_scale: [B, m] or [1, 1] int16 step codes.
        lowest, highest: bounds of the integers; None: unbounded.
        levels: [K] float32 values of a list, positions from 0; None: the integers themselves.
    """

    column_step: Tensor
    row_scale: Tensor
    lowest: int | None = None
    highest: int | None = None
    levels: Tensor | None = None

    def steps(self, columns: int) -> Tensor:
        """Return step_j [B, n] float32."""
        return step_values(self.column_step).expand(-1, columns)

    def scales(self, rows: int) -> Tensor:
        """Return t_i [B, m] float32."""
        return step_values(self.row_scale).expand(-1, rows)

    def values(self) -> Tensor:
        """Return all levels [K] float32 of a given grid."""
        if self.levels is not None:
            return self.levels
        assert self.lowest is not None and self.highest is not None
        device = self.row_scale.device
        return torch.arange(self.lowest, self.highest + 1, dtype=torch.float32, device=device)


def waterfilled(
    weight: Tensor,
    factor_diagonal: Tensor,
    sensitivity: Tensor,
    lmbda: float,
    states: int,
    matrices: int = 1,
) -> Grid:
    """Return steps from the diagonals of C [B, n] and row scales from alpha [B, m]; lmbda > 0.

    No step is finer than FINEST of the largest weight of its column of W [B, m, n], stacks of so
    many `matrices`.
    """
    _, rows, columns = weight.shape
    scale = step_codes(sensitivity.rsqrt(), step_unit(columns))
    relative = weight / step_values(scale)[..., None]
    largest = relative.amax(dim=1).maximum(-relative.amin(dim=1)).to(factor_diagonal.dtype)
    steps = factor_diagonal * (lmbda / KAPPA[states]) ** 0.5
    return Grid(step_codes(steps.maximum(FINEST * largest), step_unit(rows // matrices)), scale)


def step_unit(weights: int) -> int:
    r"""Return the resolution of a step code that serves `weights` weights, a power of two.

    A step off by eps nats costs eps^2 / ln 2 bits for each weight; codes that are multiples of u
    are off by up to u / 512 octaves, ln2 (u / 256)^2 / 12 bits on average. They save log2 u bits
    each. The sum is least at u = 904 / sqrt(weights).
    """
    exact = math.log2(COARSE_STEPS / math.sqrt(weights))
    return 1 << max(0, min(8, round(exact)))


def scaled(weight: Tensor, given: Uniform | Values) -> Grid:
    """Return a given grid, scaled to cover W [m, n]."""
    size = weight.abs().amax(dim=1) if given.scale == "per-row" else weight.abs().max()[None]
    unit = torch.zeros(1, 1, dtype=torch.int16, device=weight.device)
    if isinstance(given, Values):
        levels = torch.tensor(given.values, dtype=torch.float32, device=weight.device)
        reach = float(levels.abs().max())
        return Grid(unit, _codes(size / reach), 0, len(given.values) - 1, levels)
    half = given.levels // 2
    if given.levels % 2:
        return Grid(unit, _codes(size / half), -half, half)
    # An even number of levels has no mirror image: its longer side faces the largest weight.
    flat = weight.flatten()
    upward = bool(flat[flat.abs().argmax()] > 0)
    lowest = -half + 1 if upward else -half
    return Grid(unit, _codes(size / half), lowest, lowest + given.levels - 1)


def _codes(sizes: Tensor) -> Tensor:
    """Return int16 codes [1, k] of steps >= `sizes` [k], so that the abs-max stays inside the
    grid."""
    codes = [covering_code(size) for size in sizes.tolist()]
    return torch.tensor([codes], dtype=torch.int16, device=sizes.device)


def nearest(x: Tensor, grid: Grid) -> Tensor:
    """Return the level of the grid nearest to each x [B, m, n] (index space), int32."""
    if grid.levels is not None:
        middle = (grid.levels[1:] + grid.levels[:-1]) / 2
        return torch.bucketize(x, middle, out_int32=True)
    rounded = x.round()
    if grid.lowest is not None:
        rounded = rounded.clamp(grid.lowest, grid.highest)
    return rounded.to(torch.int32)
