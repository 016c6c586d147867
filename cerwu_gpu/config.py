"""Every setting of a compression, validated once."""

import math
import struct
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

from cerwu_gpu.errors import ConfigError

Method = Literal["cerwu", "cerwu-gamma0", "optq", "rtn"]
Quantizer = Literal["scalar", "trellis4", "trellis8"]
Scale = Literal["per-tensor", "per-row"]
DampingBy = Literal["median", "mean"]
Sensitivity = Literal["none", "relative", "layer", "row", "balanced"]
RateModel = Literal["histogram", "gaussian", "uniform"]

GRADUAL: tuple[Sensitivity, ...] = ("layer", "row", "balanced")
"""Sensitivities that come from gradients."""
LEVELS_LIMIT = 4096
LEAST_LMBDA = 1e-14
LEAST_REACH = 1e-20
TRELLIS_STATES: dict[Quantizer, int] = {"scalar": 0, "trellis4": 4, "trellis8": 8}


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """What to minimise, on which grid, for which layers, and from which text the Hessians come.

    Raises:
        ConfigError: a value is outside its range, or two values contradict each other.
    """

    method: Method = "cerwu"
    """cerwu; cerwu-gamma0 (without completing the square); optq (lmbda = 0); rtn (no Hessian)."""
    lmbda: float = 1e-9
    """Error worth paying for one bit: with sensitivity row or layer about two times nats per token,
    with none the mean square of a layer's output error."""
    levels: int | None = None
    """|G|: a uniform grid with this many levels, scaled by abs-max; None: waterfilled steps."""
    grid: tuple[float, ...] | None = None
    """Any sorted list of values, in units of the abs-max given by `scale`; excludes `levels`."""
    scale: Scale = "per-row"
    """Whether abs-max is taken over the matrix or over each row (with `levels` or `grid`)."""
    quantizer: Quantizer = "scalar"
    rate_model: RateModel = "histogram"
    """What the search takes bits to be (quantize/rate_models.py); the coder has the histogram."""
    sensitivity: Sensitivity = "row"
    """What a unit of output error costs in each layer or row (quantize/sensitivity.py)."""
    bits: float | None = None
    """Wanted average of bits per quantized weight; sets lmbda."""
    max_size: int | None = None
    """Most bytes of the whole directory; sets lmbda."""
    max_perplexity_increase: float | None = None
    """Most relative growth of the perplexity on held-out calibration text; sets lmbda."""
    passes: int = 2
    """Passes over each matrix; the rate table of a pass is the histogram of the one before."""
    damping: float = 1e-3
    """Multiple of the typical diagonal entry that is added to H before it is factored."""
    damping_by: DampingBy = "median"
    """What a typical entry is; the paper takes the mean (and 0.01), which outliers dictate."""
    block_size: int = 128
    """Columns per lazy block."""

    include: tuple[str, ...] = ("*",)
    """Glob patterns of weight names to compress."""
    exclude: tuple[str, ...] = ()
    """Glob patterns of weight names to leave alone; wins over `include`."""

    keep_head: bool = False
    """Leave the input embedding and the head as they are."""

    calibration: str = "wikitext2"
    """A hub dataset (wikitext2 for short), a text file, or self (sampled from the model)."""
    samples: int = 128
    sequence_length: int = 512
    batch_size: int = 8
    sequential: bool = False
    """Take each block's inputs from the already quantized blocks instead of the original ones."""
    correct_drift: bool | None = None
    """Quantize for the inputs that the compressed model has, toward the original's outputs; of
    classifiers, have batch norms follow the weights (models/norms.py). None: where steps follow
    from lmbda, except with `sequential` and with Hessians kept for other runs.
    """
    seed: int = 0

    limit_columns: int = 2048
    """Matrices up to so wide get their information-theoretic limit into the report: eigenvalues of
    each Hessian, about a tenth of the search at 1,000 columns, more beyond. 0: none."""
    strict: bool = False
    """Turn every event of the report (more damping, expert without tokens) into an error."""

    def __post_init__(self) -> None:
        for field, allowed in (
            ("method", get_args(Method)),
            ("scale", get_args(Scale)),
            ("quantizer", get_args(Quantizer)),
            ("rate_model", get_args(RateModel)),
            ("sensitivity", get_args(Sensitivity)),
            ("damping_by", get_args(DampingBy)),
        ):
            if getattr(self, field) not in allowed:
                choices = ", ".join(allowed)
                raise ConfigError(f"{field} is {getattr(self, field)!r}: choose one of {choices}.")
        if not (math.isfinite(self.lmbda) and self.lmbda >= 0):
            raise ConfigError(f"lmbda is {self.lmbda}: give a finite number >= 0.")
        if self.levels is not None and not 2 <= self.levels <= LEVELS_LIMIT:
            raise ConfigError(
                f"levels is {self.levels}: a grid needs at least 2 levels, at most {LEVELS_LIMIT}."
            )
        for field in ("passes", "block_size", "samples", "batch_size"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} is {getattr(self, field)}: give at least 1.")
        if self.limit_columns < 0:
            raise ConfigError(f"limit_columns is {self.limit_columns}: give at least 0.")
        if self.sequence_length < 2:
            raise ConfigError(f"sequence_length is {self.sequence_length}: give at least 2.")
        if not 0 <= self.damping <= 1:
            raise ConfigError(f"damping is {self.damping}: give a number from 0 to 1.")
        self._check_target()
        if self.sequential and self.correct_drift:
            raise ConfigError("sequential and correct_drift are both given: keep one of them.")
        if self.grid is not None:
            self._check_grid(self.grid)
        if self.bounded and self.quantizer != "scalar":
            raise ConfigError(
                f"levels and grid work with quantizer scalar only, not {self.quantizer}."
            )
        if not self.bounded and self.rate_model != "histogram":
            raise ConfigError(
                f"rate_model {self.rate_model} needs a given grid: give levels or grid, or take "
                "histogram."
            )
        if not self.bounded and self.method in ("optq", "rtn"):
            raise ConfigError(f"{self.method} rounds to a given grid: give levels or grid.")
        if not self.bounded and self.lmbda < LEAST_LMBDA:
            raise ConfigError(
                f"lmbda is {self.lmbda}: steps follow from it, so give at least {LEAST_LMBDA} "
                "or levels."
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}: give an integer from 0 to 2**63 - 1.")

    @property
    def targeted(self) -> bool:
        """lmbda follows from a wanted rate, size or quality."""
        return any(goal is not None for goal in self._goals().values())

    def _goals(self) -> dict[str, float | None]:
        return {
            "bits": self.bits,
            "max_size": self.max_size,
            "max_perplexity_increase": self.max_perplexity_increase,
        }

    def _check_target(self) -> None:
        given = {name: goal for name, goal in self._goals().items() if goal is not None}
        for name, goal in given.items():
            if not (math.isfinite(goal) and goal > 0):
                raise ConfigError(f"{name} is {goal}: give a positive number.")
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} are both given: keep one of them.")
        if given and (self.bounded or self.method in ("optq", "rtn")):
            raise ConfigError(
                f"{min(given)} is reached through lmbda: use method cerwu, no levels, no grid."
            )

    def with_drift_decided(self, *, hessians_kept: bool) -> "CompressionConfig":
        """The same with `correct_drift` True or False."""
        if self.correct_drift is not None:
            return self
        usual = not (self.bounded or self.sequential or hessians_kept)
        return replace(self, correct_drift=usual)

    @property
    def needs_gradients(self) -> bool:
        """Whether the sensitivities play a part and come from a backward pass."""
        rated = self.method in ("cerwu", "cerwu-gamma0") and (self.lmbda > 0 or self.targeted)
        return rated and self.sensitivity in GRADUAL

    @property
    def bounded(self) -> bool:
        """The grid is given (`levels` or `grid`) instead of following from lmbda."""
        return self.levels is not None or self.grid is not None

    def _check_grid(self, grid: tuple[float, ...]) -> None:
        if self.levels is not None:
            raise ConfigError("levels and grid are both given: keep one of them.")
        if len(grid) > LEVELS_LIMIT:
            raise ConfigError(f"grid has {len(grid)} values: give at most {LEVELS_LIMIT}.")
        try:
            grid = struct.unpack(f"<{len(grid)}f", struct.pack(f"<{len(grid)}f", *grid))
        except OverflowError:
            raise ConfigError("grid has values beyond float32: scale it.") from None
        if len(grid) < 2 or not all(map(math.isfinite, grid)):
            raise ConfigError("grid needs at least 2 finite values.")
        if max(map(abs, grid)) < LEAST_REACH:
            raise ConfigError("grid has no value away from 0: scale it.")
        if any(a >= b for a, b in pairwise(grid)):
            raise ConfigError("grid must be sorted and without repetition: sort its values.")
