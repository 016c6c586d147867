"""The settings of a compression, validated on construction.

A configuration consists of values that cannot contradict each other: a grid, a target, an
objective, calibration data, and the treatment of drift. `from_settings` builds one from the flat
settings of a command line, and `settings` is its inverse; both are derived from the fields.
"""

import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from cerwu_gpu.efforts import Effort, with_effort
from cerwu_gpu.errors import ConfigError

Method = Literal["waterfilled", "cerwu", "cerwu-gamma0", "optq", "rtn"]
GridMethod = Literal["cerwu", "cerwu-gamma0", "optq", "rtn"]
Quantizer = Literal["scalar", "trellis4", "trellis8", "trellis16", "trellis32"]
Scale = Literal["per-tensor", "per-row"]
DampingBy = Literal["median", "mean"]
Sensitivity = Literal["none", "relative", "layer", "row", "balanced"]
RateModel = Literal["histogram", "gaussian", "uniform"]
Drift = Literal["auto", "correct", "ignore", "sequential"]

GRADIENT_BASED: tuple[Sensitivity, ...] = ("layer", "row", "balanced")
"""Sensitivities that come from gradients."""
NO_DATA = "none"
"""Name, in place of a text's, of a calibration without data."""
LEVELS_LIMIT = 4096
SHARE = re.compile(r"0?\.\d+|1(\.0*)?")
"""Pattern of a share behind the name of a calibration text."""
SHARES_TOLERANCE = 0.015
"""Maximum difference from 1 of a sum of shares: thirds are typed with two digits."""
LEAST_LMBDA = 1e-14
LEAST_REACH = 1e-20
TRELLIS_STATES: dict[Quantizer, int] = {
    "scalar": 0,
    "trellis4": 4,
    "trellis8": 8,
    "trellis16": 16,
    "trellis32": 32,
}


def _check_choice(name: str, value: object, kind: Any) -> None:
    allowed = get_args(kind)
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}: choose one of {', '.join(allowed)}.")


def _check_given_grid(grid: "Uniform | Values") -> None:
    _check_choice("method", grid.method, GridMethod)
    _check_choice("scale", grid.scale, Scale)
    _check_choice("rate_model", grid.rate_model, RateModel)


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} is {value}: give a positive number.")


def _check_counts(part: object, *names: str) -> None:
    for name in names:
        if getattr(part, name) < 1:
            raise ConfigError(f"{name} is {getattr(part, name)}: give at least 1.")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed is {seed}: give an integer from 0 to 2**63 - 1.")


def setting(default: Any, help: str, *, name: str | None = None, asked: bool = False) -> Any:
    """Return a dataclass field that is a setting of the command line.

    Args:
        help: one sentence for the command line.
        name: of the flat setting; default: the field's.
        asked: the flat setting asks for the whole part, so that it has no default.
    """
    return field(default=default, metadata={"help": help, "name": name, "asked": asked})


@dataclass(frozen=True, kw_only=True)
class Waterfilled:
    """Steps by column that follow from lmbda, as in reverse waterfilling (docs/method.md).

    The alphabet fits the layer, with an escape for the tail.
    """

    quantizer: Quantizer = setting(
        "scalar", "Quantizer: scalar, or trellis-coded with 4, 8, 16 or 32 states."
    )
    complete_square: bool = True
    """Flag whose False is the ablation that leaves the quadratic part of the rate to the search."""

    def __post_init__(self) -> None:
        _check_choice("quantizer", self.quantizer, Quantizer)


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """A uniform grid of `levels` values, scaled by the largest absolute weight, as in the paper."""

    levels: int = setting(
        MISSING,
        "Number of levels of a uniform grid scaled by abs-max; default: no uniform grid, but a "
        "step size per column, derived from lmbda.",
    )
    method: GridMethod = "cerwu"
    """Rounding: cerwu (the paper's); cerwu-gamma0 (without completing the square); optq (lmbda =
    0); rtn (no Hessian)."""
    scale: Scale = setting("per-row", "Scope of abs-max with --levels or --grid.")
    rate_model: RateModel = setting(
        "histogram", "Rate model of the search; others than histogram need --levels or --grid."
    )

    def __post_init__(self) -> None:
        _check_given_grid(self)
        if not 2 <= self.levels <= LEVELS_LIMIT:
            raise ConfigError(
                f"levels is {self.levels}: a grid needs at least 2 levels, at most {LEVELS_LIMIT}."
            )


@dataclass(frozen=True, kw_only=True)
class Values:
    """A sorted list of values, in units of the largest absolute weight; else as Uniform."""

    values: tuple[float, ...] = setting(
        MISSING, "Sorted grid values: a file of numbers, or numbers with commas.", name="grid"
    )
    method: GridMethod = "cerwu"
    scale: Scale = setting("per-row", "As of Uniform.")
    rate_model: RateModel = setting("histogram", "As of Uniform.")

    def __post_init__(self) -> None:
        _check_given_grid(self)
        grid = self.values
        if len(grid) > LEVELS_LIMIT:
            raise ConfigError(f"grid has {len(grid)} values: give at most {LEVELS_LIMIT}.")
        try:
            grid = struct.unpack(f"<{len(grid)}f", struct.pack(f"<{len(grid)}f", *grid))
        except OverflowError as error:
            raise ConfigError("grid has values beyond float32: scale it.") from error
        if len(grid) < 2 or not all(map(math.isfinite, grid)):
            raise ConfigError("grid needs at least 2 finite values.")
        if max(map(abs, grid)) < LEAST_REACH:
            raise ConfigError("grid has no value away from 0: scale it.")
        if any(a >= b for a, b in pairwise(grid)):
            raise ConfigError("grid must be sorted and without repetition: sort its values.")


Grid = Waterfilled | Uniform | Values


@dataclass(frozen=True)
class Bits:
    """Requested average of bits per quantized weight."""

    bits: float = setting(MISSING, "Wanted bits per quantized weight; sets lmbda.")

    def __post_init__(self) -> None:
        _check_positive("bits", self.bits)


@dataclass(frozen=True)
class MaxSize:
    """Maximum bytes of the whole directory."""

    size: int = setting(
        MISSING, "Maximum size of the directory, e.g. 60MB; sets lmbda.", name="max_size"
    )

    def __post_init__(self) -> None:
        _check_positive("max_size", self.size)


@dataclass(frozen=True)
class MaxPerplexityIncrease:
    """Maximum relative growth of the perplexity on held-out calibration data."""

    share: float = setting(
        MISSING,
        "Maximum growth of the perplexity, e.g. 2%; sets lmbda.",
        name="max_perplexity_increase",
    )

    def __post_init__(self) -> None:
        _check_positive("max_perplexity_increase", self.share)


Target = Bits | MaxSize | MaxPerplexityIncrease


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The objective that is minimised, and its search."""

    lmbda: float = setting(
        1e-9,
        "Rate-distortion trade-off: output error accepted to save one bit; larger values give "
        "smaller files.",
    )
    """Error accepted to save one bit: with sensitivity row or layer about twice the nats per token,
    with none the mean square of a layer's output error."""
    sensitivity: Sensitivity = setting(
        "row", "Weighting of output errors: uniform, or by layer, by row or both from gradients."
    )
    """Cost of a unit of output error in each layer or row (quantize/sensitivity.py)."""
    damping: float | None = setting(
        None,
        "Damping added to the Hessian's diagonal, relative to the statistic of --damping-by; "
        "default: by the number of calibration tokens for each column.",
    )
    """Multiple of the diagonal's statistic that is added to H before it is factored; None: by the
    numbers of tokens and columns of each input (quantize/objective.py, `usual_damping`)."""
    damping_by: DampingBy = setting(
        "median", "Statistic of the diagonal that damping is relative to; the paper uses the mean."
    )
    """Statistic of the diagonal; the paper uses the mean (and 0.01), which outliers dictate."""
    passes: int = setting(2, "Number of quantization passes over each matrix.")
    """Number of passes over each matrix; the rates of a pass are the histogram of the last one."""
    block_size: int = setting(128, "Number of columns per block of lazy updates.")

    def __post_init__(self) -> None:
        _check_choice("sensitivity", self.sensitivity, Sensitivity)
        _check_choice("damping_by", self.damping_by, DampingBy)
        if not (math.isfinite(self.lmbda) and self.lmbda >= 0):
            raise ConfigError(f"lmbda is {self.lmbda}: give a finite number >= 0.")
        if self.damping is not None and not 0 <= self.damping <= 1:
            raise ConfigError(f"damping is {self.damping}: give a number from 0 to 1.")
        _check_counts(self, "passes", "block_size")


@dataclass(frozen=True)
class Text:
    """A calibration text itself, instead of its name.

    Attributes:
        share: of the samples that come from it, where there are several texts.
    """

    content: str = field(repr=False)
    share: float | None = None


class Source(NamedTuple):
    """One of the texts that calibrate.

    Attributes:
        text: its name, or a `Text`.
        share: of the samples, above 0; shares sum to 1.
    """

    text: str | Text
    share: float


def _sources(given: tuple[str | Text, ...]) -> tuple[Source, ...]:
    """Return the texts with their shares: equal ones where none is given.

    Raises:
        ConfigError: there is no text, or one twice; shares are given for some texts only, are not
            above 0, or do not sum to 1.
    """
    if not given:
        raise ConfigError("calibration is empty: give a name, or a Text.")
    texts, shares = [], []
    for source in given:
        if not isinstance(source, str | Text):
            raise ConfigError(f"calibration is {source!r}: give a name, or a Text.")
        text, share = (source, source.share) if isinstance(source, Text) else _named(source)
        if text in texts:
            raise ConfigError(f"calibration names {text!r} twice: add up its shares.")
        texts.append(text)
        shares.append(share)
    known = [share for share in shares if share is not None]
    if not known:
        return tuple(Source(text, 1 / len(texts)) for text in texts)
    if len(known) < len(shares):
        raise ConfigError("calibration has a share for some texts only: give each one, or none.")
    if min(known) <= 0 or abs(sum(known) - 1) > SHARES_TOLERANCE:
        raise ConfigError(
            f"calibration has shares that sum to {sum(known):g}: give shares above 0 that sum to 1."
        )
    return tuple(Source(*pair) for pair in zip(texts, (x / sum(known) for x in known), strict=True))


def _named(source: str) -> tuple[str, float | None]:
    """Return the name and the share in "name:share"; a name alone has none."""
    name, _, tail = source.rpartition(":")
    if name and SHARE.fullmatch(tail):
        return name, float(tail)
    return source, None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Text that calibrates a language model."""

    source: str | Text | tuple[str | Text, ...] | None = setting(
        None,
        "Calibration data: wikitext2, a Hub dataset id, a text file, or self (text sampled from "
        "the model); repeatable, with shares of the samples: --calibration my.txt:0.7 "
        "--calibration self:0.3; none: no data (H = I); default: wikitext2:0.5 and self:0.5, for "
        "encoders wikitext2.",
        name="calibration",
    )
    """Name of a hub dataset (wikitext2 for short), a text file, or self (sampled from the model);
    or a `Text`; or several of them, each "name:share" or a `Text` with its share. "none": no data,
    of any kind of model. None: the adapter's usual ones (hf/causal_lm.py)."""
    samples: int | None = setting(
        None, "Number of calibration sequences; default: by the columns of the widest matrix."
    )
    """Number of sequences; None: by the columns of the widest matrix (hf/sources.py)."""
    tokens_per_column: int = setting(
        8,
        "Calibration tokens for each column of the widest matrix, or for 8,192 columns where it "
        "has fewer, unless --samples is given.",
    )
    sequence_length: int = setting(512, "Tokens per calibration sequence.")
    batch_size: int = setting(8, "Calibration sequences per forward pass.")
    seed: int = setting(0, "Random seed.")
    tokenizer: Any = field(default=None, compare=False, repr=False)
    """Tokenizer of a model in memory, or instead of the source's own."""

    def __post_init__(self) -> None:
        count = max(1, len(self.sources))
        _check_counts(self, "batch_size", "tokens_per_column")
        if len(self.sources) > 1 and any(text == NO_DATA for text, _ in self.sources):
            raise ConfigError("calibration none is beside a text: drop none, or the text.")
        if self.samples is not None and self.samples < count:
            texts = "" if count == 1 else f", one for each of {count} texts"
            raise ConfigError(f"samples is {self.samples}: give at least {count}{texts}.")
        if self.sequence_length < 2:
            raise ConfigError(f"sequence_length is {self.sequence_length}: give at least 2.")
        _check_seed(self.seed)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Texts and their shares; none where the usual ones are asked for."""
        if self.source is None:
            return ()
        return _sources(self.source if isinstance(self.source, tuple) else (self.source,))

    @property
    def data_free(self) -> bool:
        """Whether no data is used at all."""
        return [text for text, _ in self.sources] == [NO_DATA]

    @property
    def names(self) -> tuple[str, ...] | None:
        """Names of the texts; None where one of them is a `Text`."""
        names = [text for text, _ in self.sources if isinstance(text, str)]
        return tuple(names) if len(names) == len(self.sources) else None


@dataclass(frozen=True, kw_only=True)
class ImageCalibration:
    """Images that calibrate an image classifier, prepared by its own image processor; of a
    vision-language model, beside its usual text (ImageTextCalibration)."""

    source: str = setting(
        MISSING,
        "Directory of images, in folders by class, or a Hub dataset id; for image classifiers, and "
        "beside --calibration for vision-language models.",
        name="images",
    )
    samples: int = setting(128, "Number of images, drawn at random.")
    batch_size: int = setting(8, "Images per forward pass.")
    seed: int = setting(0, "Random seed.")
    tokenizer: None = field(default=None, init=False, repr=False, compare=False)
    """None, as of other calibrations without a text."""

    def __post_init__(self) -> None:
        _check_counts(self, "samples", "batch_size")
        _check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Batches of a model's inputs that calibrate it.

    A batch is a tensor, a tuple or a dict of arguments, without labels; the first axis counts
    samples, and lmbda is per sample. Batches are run several times, so all are stored. Those of a
    language model are tokens, int64 [samples, sequence].
    """

    inputs: Iterable[Any] = field(repr=False, compare=False)
    loss: Callable[[Any, Any], Any] | None = field(default=None, compare=False)
    """Loss of (the module's output, the batch), one per sample in nats, for the sensitivities;
    default: the output is taken for logits [samples, classes] (calibration/sensitivity.py)."""
    seed: int = 0
    tokenizer: Any = field(default=None, compare=False, repr=False)
    """Tokenizer of a language model in memory, saved with it."""

    def __post_init__(self) -> None:
        _check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class ImageTextCalibration:
    """Images and a text that calibrate a vision-language model: a sample is an image before a part
    of the text, as the model's own processor makes it."""

    images: str
    """Directory of images, or a hub dataset; used again where there are fewer than samples."""
    text: Calibration = Calibration()
    """Text, and the numbers and lengths of the samples; `sequence_length` counts the tokens that
    stand for the image as well."""
    tokenizer: None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.text.data_free:
            raise ConfigError("calibration none is beside images: drop one of them.")
        if self.text.tokenizer is not None:
            raise ConfigError(
                "text beside images is tokenized by the model's own processor: drop the tokenizer."
            )

    @property
    def seed(self) -> int:
        """Seed of random choices."""
        return self.text.seed


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Tuning of norms, biases and scales of rows toward the original model, after the integers are
    found."""

    steps: int = setting(
        80,
        "Number of distillation steps, which tune norms, biases and scales of rows after "
        "quantization; 0: none; default: none, or those of --effort.",
        name="distill",
        asked=True,
    )
    learning_rate: float = setting(
        2e-3, "Learning rate of the distillation.", name="distill_learning_rate"
    )
    batch_size: int = setting(
        2, "Calibration sequences per distillation step.", name="distill_batch_size"
    )
    required: bool = field(default=True, compare=False)
    """Flag whose False, of an effort, lets models that cannot be distilled do without."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"distill is {self.steps}: give at least 1 step.")
        if self.batch_size < 1:
            raise ConfigError(f"distill_batch_size is {self.batch_size}: give at least 1.")
        _check_positive("distill_learning_rate", self.learning_rate)


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """The configuration of a compression: objective, grid, layers, calibration data.

    Raises:
        ConfigError: a value is outside its range, or two values contradict each other.
    """

    grid: Grid = Waterfilled()
    target: Target | None = None
    """Rate, size or quality that sets lmbda."""
    objective: Objective = Objective()
    calibration: Calibration | ImageCalibration | ImageTextCalibration | Batches = Calibration()
    drift: Drift = setting(
        "auto",
        "Inputs of a block: correct for those that the compressed model has, ignore that they "
        "move, or take them sequentially from the quantized blocks; auto: correct, unless "
        "--levels, --grid or --hessian-cache is given.",
    )
    """Treatment of inputs that move behind compressed layers. correct: quantize for the inputs that
    the compressed model has, toward the original's outputs; of plain modules and
    classifiers, have batch norms follow the weights (models/norms.py). sequential: take inputs from
    the already quantized blocks. auto: correct where steps follow from lmbda, except with Hessians
    that are kept for other runs."""
    distillation: Distillation | None = None

    include: tuple[str, ...] = setting(
        ("*",), "Compress only weights whose name matches; repeatable."
    )
    exclude: tuple[str, ...] = setting(
        (), "Do not compress weights whose name matches; overrides --include; repeatable."
    )
    """Patterns that override `include`."""
    keep_head: bool = setting(False, "Keep the input embedding and the output head uncompressed.")
    limit_columns: int = setting(
        2048, "Report the theoretical limit of matrices with at most this many columns; 0: of none."
    )
    """Maximum columns of matrices whose information-theoretic limit is reported. It takes the
    Hessian's eigenvalues: about a tenth of the search at 1,000 columns, more beyond. 0: none."""
    strict: bool = setting(False, "Treat events of the report (warnings) as errors.")
    """Flag that turns events of the report (more damping, expert without tokens) into errors."""
    hessian_cache: Path | None = None
    """Directory of Hessians and sensitivities for later runs."""
    verify: bool = True
    """Flag to decode the written files and compare them with the weights in memory."""

    def __post_init__(self) -> None:
        _check_choice("drift", self.drift, Drift)
        if self.limit_columns < 0:
            raise ConfigError(f"limit_columns is {self.limit_columns}: give at least 0.")
        if self.target is not None and self.bounded:
            name = next(iter(_values_of(self.target)))
            raise ConfigError(
                f"{name} is reached through lmbda: use method waterfilled, no levels, no grid."
            )
        if not self.bounded and self.objective.lmbda < LEAST_LMBDA:
            raise ConfigError(
                f"lmbda is {self.objective.lmbda}: steps follow from it, so give at least "
                f"{LEAST_LMBDA} or levels."
            )
        if self.data_free:
            self._check_data_free()

    def _check_data_free(self) -> None:
        """Refuse what needs data.

        Raises:
            ConfigError: the settings ask for it.
        """
        needed = None
        if self.needs_gradients:
            kind = self.objective.sensitivity
            raise ConfigError(
                f"sensitivity {kind} comes from gradients, and calibration is none: take relative "
                "or none, or calibrate."
            )
        if self.drift in ("correct", "sequential"):
            needed = f"drift {self.drift}"
        elif self.distillation is not None:
            needed = "distill"
        elif isinstance(self.target, MaxPerplexityIncrease):
            needed = "max_perplexity_increase"
        elif self.hessian_cache is not None:
            needed = "hessian_cache"
        if needed is not None:
            raise ConfigError(f"{needed} needs data, and calibration is none: drop one of them.")

    @property
    def lmbda(self) -> float:
        """Trade-off of the objective; a search for a target sets it."""
        return self.objective.lmbda

    def at(self, lmbda: float) -> "CompressionConfig":
        """Return these settings at another lmbda."""
        return replace(self, objective=replace(self.objective, lmbda=lmbda))

    @property
    def bounded(self) -> bool:
        """Whether the grid is given instead of following from lmbda."""
        return not isinstance(self.grid, Waterfilled)

    @property
    def method(self) -> Method:
        """Rounding rule: the grid's method, or waterfilled."""
        return "waterfilled" if isinstance(self.grid, Waterfilled) else self.grid.method

    @property
    def completes_square(self) -> bool:
        """Whether the quadratic part of the rate joins the Hessian."""
        if isinstance(self.grid, Waterfilled):
            return self.grid.complete_square
        return self.grid.method == "cerwu"

    @property
    def rate_model(self) -> RateModel:
        """Rate model of the search; the coder uses the histogram."""
        return "histogram" if isinstance(self.grid, Waterfilled) else self.grid.rate_model

    @property
    def states(self) -> int:
        """Number of states of the trellis; 0: none."""
        return TRELLIS_STATES[self.grid.quantizer] if isinstance(self.grid, Waterfilled) else 0

    @property
    def rated(self) -> bool:
        """Whether rounding depends on the rate."""
        return self.method not in ("optq", "rtn") and (self.lmbda > 0 or self.target is not None)

    @property
    def needs_gradients(self) -> bool:
        """Whether sensitivities are used and come from a backward pass."""
        return self.rated and self.objective.sensitivity in GRADIENT_BASED

    @property
    def sequential(self) -> bool:
        """Whether each block takes its inputs from the already quantized blocks."""
        return self.drift == "sequential"

    @property
    def corrects_drift(self) -> bool:
        """Whether drift is corrected; auto is decided by the grid and the Hessian cache."""
        if self.drift == "auto":
            return not (self.bounded or self.hessian_cache is not None or self.data_free)
        return self.drift == "correct"

    @property
    def data_free(self) -> bool:
        """Whether no data calibrates: every Hessian is the identity."""
        return isinstance(self.calibration, Calibration) and self.calibration.data_free

    @property
    def seed(self) -> int:
        """Seed of random choices in the calibration."""
        return self.calibration.seed

    @property
    def text(self) -> Calibration:
        """Settings of the calibration text.

        Raises:
            ConfigError: images or batches are given instead.
        """
        if not isinstance(self.calibration, Calibration):
            kind = type(self.calibration).__name__
            raise ConfigError(f"this model is calibrated by text: give a Calibration, not {kind}.")
        return self.calibration


_GRIDS: tuple[type[Any], ...] = (Waterfilled, Uniform, Values)
_TARGETS: tuple[type[Any], ...] = (Bits, MaxSize, MaxPerplexityIncrease)
_PARTS: tuple[type[Any], ...] = (
    *_GRIDS,
    *_TARGETS,
    Objective,
    Calibration,
    ImageCalibration,
    Distillation,
    CompressionConfig,
)
"""Classes whose fields are settings, in the order of the command line."""


@dataclass(frozen=True)
class Setting:
    """One flat setting.

    Attributes:
        name: of the setting.
        kind: annotation of its field.
        default: its default value; None: it has none.
        help: one sentence for the command line.
    """

    name: str
    kind: Any
    default: Any
    help: str


def all_settings() -> dict[str, Setting]:
    """Return every flat setting by its name."""
    method = Setting(
        "method",
        Method | None,
        None,
        "Quantization method: waterfilled (steps follow from lmbda), or on a given grid cerwu (the "
        "paper's), cerwu-gamma0, optq (lmbda 0) or rtn (no Hessian); default: waterfilled, or "
        "cerwu with --levels or --grid.",
    )
    effort = Setting(
        "effort",
        Effort | None,
        None,
        "Preset of settings, over which the options given win: fast (no calibration data), normal, "
        "or best (more calibration text, trellis32, distillation); default: normal.",
    )
    entries = {"effort": effort, "method": method}
    for part in _PARTS:
        for entry in _setting_fields(part):
            name, unset = _name(entry), entry.default is MISSING or entry.metadata["asked"]
            default = None if unset else entry.default
            setting = Setting(name, entry.type, default, entry.metadata["help"])
            entries.setdefault(name, setting)
    return entries


def settings(config: CompressionConfig) -> dict[str, Any]:
    """Return the flat settings of a configuration, those that do not apply with their defaults;
    calibration is None for anything but a text or dataset with a name, and effort always, as the
    settings of an effort are there by themselves."""
    values = {name: entry.default for name, entry in all_settings().items()}
    calibration = config.calibration
    values["method"] = config.method
    parts: list[Any] = [
        config.grid,
        config.objective,
        config,
        config.target,
        config.distillation,
    ]
    for part in parts:
        if part is not None:
            values.update(_values_of(part))
    if isinstance(calibration, ImageTextCalibration):
        values["images"], calibration = calibration.images, calibration.text
    if isinstance(calibration, Calibration):
        source = None if calibration.names is None else calibration.source
        values.update({**_values_of(calibration), "calibration": source})
    elif isinstance(calibration, ImageCalibration):
        values.update({"calibration": None, **_values_of(calibration)})
    else:
        values.update({"calibration": None, "seed": calibration.seed})
    return values


def from_settings(**given: Any) -> CompressionConfig:
    """Build a configuration from flat settings; omitted ones have their defaults.

    Raises:
        ConfigError: a name is unknown, a value is outside its range, or two values contradict each
            other.
    """
    known = all_settings()
    if isinstance(given.get("calibration"), tuple) and len(given["calibration"]) == 1:
        given["calibration"] = given["calibration"][0]
    extra = {"hessian_cache", "verify", "complete_square", "tokenizer"}
    for name in given:
        if name not in known and name not in extra:
            raise ConfigError(f"{name} is no setting: choose one of {', '.join(known)}.")
    effort = given.pop("effort", None)
    if effort is not None:
        _check_choice("effort", effort, Effort)
    distilled = given.get("distill") is not None
    if effort == "best" and given.get("calibration") == NO_DATA:
        raise ConfigError(
            "effort best is more calibration text and a distillation, and calibration is none: "
            "drop one of them."
        )
    given = with_effort(effort, given)
    grid = _grid(given)
    goals = {name: given[name] for name in map(_goal_name, _TARGETS) if given.get(name) is not None}
    if len(goals) > 1:
        raise ConfigError(f"{' and '.join(goals)} are both given: keep one of them.")
    targets = [part(goals[_goal_name(part)]) for part in _TARGETS if _goal_name(part) in goals]
    return CompressionConfig(
        grid=grid,
        target=targets[0] if targets else None,
        objective=Objective(**_given(Objective, given)),
        calibration=_calibration(given),
        distillation=_distillation(given, required=distilled),
        **_given(CompressionConfig, given),
        **{name: given[name] for name in ("hessian_cache", "verify") if name in given},
    )


def _calibration(
    given: Mapping[str, Any],
) -> Calibration | ImageCalibration | ImageTextCalibration:
    """Return the calibration of flat settings.

    Raises:
        ConfigError: no data comes with images, or with a setting of data.
    """
    text = Calibration(**_given(Calibration, given))
    if text.data_free:
        for one in _setting_fields(Calibration):
            name = _name(one)
            if name != "calibration" and given.get(name, one.default) not in (None, one.default):
                raise ConfigError(
                    f"{name} is of calibration data, and calibration is none: drop it."
                )
    if given.get("images") is None:
        return text
    # Only beside a text do images stand in sequences of tokens.
    usual = Calibration()
    of_text = (text.source, text.sequence_length, text.tokens_per_column)
    if of_text != (usual.source, usual.sequence_length, usual.tokens_per_column):
        if given.get("calibration") is None and text.samples is None:
            text = replace(text, samples=ImageCalibration.samples)
        return ImageTextCalibration(images=given["images"], text=text)
    return ImageCalibration(**_given(ImageCalibration, given))


def _distillation(given: Mapping[str, Any], *, required: bool) -> Distillation | None:
    """Return the distillation of flat settings; 0 steps are none.

    Raises:
        ConfigError: only its further settings are given.
    """
    if given.get("distill"):
        return Distillation(**_given(Distillation, given), required=required)
    for one in _setting_fields(Distillation)[1:]:
        if given.get(_name(one), one.default) != one.default:
            raise ConfigError(f"{_name(one)} is of a distillation: give distill, too.")
    return None


def _grid(given: Mapping[str, Any]) -> Grid:
    """Build the grid of flat settings.

    Raises:
        ConfigError: two settings contradict each other.
    """
    levels, values = given.get("levels"), given.get("grid")
    if levels is not None and values is not None:
        raise ConfigError("levels and grid are both given: keep one of them.")
    bounded = levels is not None or values is not None
    method = given.get("method") or ("cerwu" if bounded else "waterfilled")
    _check_choice("method", method, Method)
    if bounded and not given.get("complete_square", True):
        raise ConfigError("complete_square is of waterfilled steps: take method cerwu-gamma0.")
    if bounded and method == "waterfilled":
        raise ConfigError("method waterfilled has no given grid: drop levels or grid.")
    if not bounded:
        if method != "waterfilled":
            raise ConfigError(f"{method} rounds to a given grid: give levels or grid.")
        model = given.get("rate_model", "histogram")
        if model != "histogram":
            _check_choice("rate_model", model, RateModel)
            raise ConfigError(
                f"rate_model {model} needs a given grid: give levels or grid, or take histogram."
            )
        if given.get("scale") not in (None, "per-row"):
            _check_choice("scale", given["scale"], Scale)
            raise ConfigError("scale is of a given grid: give levels or grid, or drop it.")
        return Waterfilled(**_given(Waterfilled, given))
    quantizer = given.get("quantizer", "scalar")
    _check_choice("quantizer", quantizer, Quantizer)
    if quantizer != "scalar":
        raise ConfigError(f"levels and grid work with quantizer scalar only, not {quantizer}.")
    options = {k: given[k] for k in ("scale", "rate_model") if k in given} | {"method": method}
    if values is not None:
        return Values(values=values, **options)
    assert levels is not None
    return Uniform(levels=levels, **options)


def _goal_name(part: type[Any]) -> str:
    return _name(_setting_fields(part)[0])


def _setting_fields(part: type[Any]) -> list[Field[Any]]:
    return [entry for entry in fields(part) if "help" in entry.metadata]


def _name(entry: Field[Any]) -> str:
    return entry.metadata["name"] or entry.name


def _values_of(part: Any) -> dict[str, Any]:
    """Return the flat settings of a part of a configuration."""
    return {_name(entry): getattr(part, entry.name) for entry in _setting_fields(type(part))}


def _given(part: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a class among flat settings."""
    names = {entry.name: _name(entry) for entry in _setting_fields(part)}
    inner = {"complete_square", "tokenizer"} & {entry.name for entry in fields(part)}
    names |= {name: name for name in inner}
    return {argument: given[name] for argument, name in names.items() if name in given}
