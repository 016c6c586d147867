"""The report of a compression: by layer, and in total."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Stage = Literal[
    "load",
    "calibrate",
    "sensitivity",
    "target",
    "quantize",
    "code",
    "distill",
    "write",
    "verify",
    "decode",
    "evaluate",
]
"""Part of the work whose seconds are counted; decode and evaluate measure the result."""
STAGES: tuple[Stage, ...] = get_args(Stage)
"""All stages, in the order of the work."""


@dataclass(frozen=True)
class Purpose:
    """Purpose of bytes in a compressed directory; `arrays` names those of the side data."""

    name: str
    explanation: str
    arrays: tuple[str, ...] = ()


WORDS, PLAIN, HEADERS = "words", "plain tensors", "headers"
"""Purposes of bytes that are no side data."""
PURPOSES = (
    Purpose(WORDS, "the entropy-coded integers of all quantized weights"),
    Purpose("tables", "frequencies of the integers, by class", ("table_codes",)),
    Purpose("classes", "which table a row and a column use", ("row_class", "column_class")),
    Purpose(
        "steps and scales",
        "what an integer is worth, by column and row",
        ("step_code", "row_scale_code"),
    ),
    Purpose("stream lengths", "where each decoder starts", ("lengths",)),
    Purpose("escaped integers", "those beyond the tables", ("escapes",)),
    Purpose("grid values", "the levels of a given grid", ("grid",)),
    Purpose(PLAIN, "norms, biases and what was left alone"),
    Purpose(HEADERS, "names, shapes and checksums"),
)
"""All purposes of the bytes in files of tensors."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One quantized matrix."""

    name: str
    """Parameter name in the model, e.g. "model.layers.0.self_attn.q_proj.weight"."""
    part: int
    """Index of the matrix in a parameter that holds several (the experts of a mixture); else 0."""
    shape: tuple[int, int]
    """(m, n): rows = outputs, columns = inputs."""
    bits_per_weight: float
    """Number of bits stored for the matrix, over m * n."""
    relative_loss: float
    """Loss tr((W-Q) H (W-Q)^T) / tr(W H W^T), undamped H, before any distillation; with corrected
    drift of the moved target."""
    words_bytes: int
    """Bytes of the entropy-coded symbols."""
    side_bytes: int
    """Bytes of the side data: lengths, tables, classes, steps."""
    limit_bits: float | None = None
    """Minimum bits per weight of any code for this loss, weighted by sensitivity, for Gaussian
    weights (quantize/limit.py); None: not computed, see limit_columns."""
    events: tuple[str, ...] = ()
    """Deviations from the plan, one sentence each."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """One compressed model."""

    layers: tuple[LayerReport, ...]
    lmbda: float
    """Trade-off of the compression, given or determined by a target."""
    bits_per_weight: float
    """Average over all quantized weights, including side information."""
    directory_bytes: int
    """Bytes of all files of the compressed directory."""
    original_bytes: int
    """Bytes of the .gguf file, or of the dense weights in their loaded dtype, tied ones once."""
    seconds: dict[Stage, float]
    events: tuple[str, ...] = ()
    """Deviations from the plan, layers included, one sentence each."""
    left: dict[str, str] = field(default_factory=dict)
    """Parameters with two axes or more that are stored as they are -> the reason."""
    distillation: dict[str, float] | None = None
    """steps behind the result, KL(original || compressed) on held-out data before and after them
    [nats per prediction], and bytes that the scales of rows added; None: there was none."""

    def to_dict(self) -> dict[str, object]:
        """Return the report as dictionaries, lists and numbers, ready for JSON."""
        fields = asdict(self)
        fields["layers"] = [
            {**layer, "shape": list(layer["shape"]), "events": list(layer["events"])}
            for layer in fields["layers"]
        ]
        fields["events"] = list(self.events)
        return fields


def finite(value: Any) -> Any:
    """Return a value that strict JSON can hold: nan and inf become null, tuples lists."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case _:
            return value
