"""Compress Hugging Face language models: Hessian-aware rounding that counts bits, entropy coded.

>>> from cerwu_gpu import Bits, CompressionConfig, compress, load_compressed
>>> compress("HuggingFaceTB/SmolLM2-135M", "small", config=CompressionConfig(target=Bits(3.0)))
>>> model = load_compressed("small")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cerwu_gpu.serving import registration

if TYPE_CHECKING:
    from cerwu_gpu.api import compress
    from cerwu_gpu.config import (
        Batches,
        Bits,
        Calibration,
        CompressionConfig,
        Distillation,
        ImageCalibration,
        ImageTextCalibration,
        MaxPerplexityIncrease,
        MaxSize,
        Objective,
        Text,
        Uniform,
        Values,
        Waterfilled,
        from_settings,
    )
    from cerwu_gpu.container.reader import verify
    from cerwu_gpu.errors import (
        CalibrationError,
        CerwuError,
        ConfigError,
        CorruptionError,
        FactorizationError,
        FormatError,
        ModelError,
        OutputError,
        RankError,
        TargetError,
        VersionError,
    )
    from cerwu_gpu.hf.evaluation import Comparison, compare, perplexity
    from cerwu_gpu.models.folding import fold_batch_norm
    from cerwu_gpu.report import LayerReport, Report
    from cerwu_gpu.serving.loading import decompress, load_compressed

__version__ = "0.1.0"

__all__ = [
    "Batches",
    "Bits",
    "Calibration",
    "CalibrationError",
    "CerwuError",
    "Comparison",
    "CompressionConfig",
    "ConfigError",
    "CorruptionError",
    "Distillation",
    "FactorizationError",
    "FormatError",
    "ImageCalibration",
    "ImageTextCalibration",
    "LayerReport",
    "MaxPerplexityIncrease",
    "MaxSize",
    "ModelError",
    "Objective",
    "OutputError",
    "RankError",
    "Report",
    "TargetError",
    "Text",
    "Uniform",
    "Values",
    "VersionError",
    "Waterfilled",
    "__version__",
    "compare",
    "compress",
    "decompress",
    "fold_batch_norm",
    "from_settings",
    "load_compressed",
    "perplexity",
    "verify",
]

_MODULES = {
    **dict.fromkeys(
        (
            "Batches",
            "Bits",
            "Calibration",
            "CompressionConfig",
            "Distillation",
            "ImageCalibration",
            "ImageTextCalibration",
            "MaxPerplexityIncrease",
            "MaxSize",
            "Objective",
            "Text",
            "Uniform",
            "Values",
            "Waterfilled",
            "from_settings",
        ),
        "cerwu_gpu.config",
    ),
    "Comparison": "cerwu_gpu.hf.evaluation",
    "compare": "cerwu_gpu.hf.evaluation",
    "LayerReport": "cerwu_gpu.report",
    "Report": "cerwu_gpu.report",
    "compress": "cerwu_gpu.api",
    "decompress": "cerwu_gpu.serving.loading",
    "fold_batch_norm": "cerwu_gpu.models.folding",
    "load_compressed": "cerwu_gpu.serving.loading",
    "perplexity": "cerwu_gpu.hf.evaluation",
    "verify": "cerwu_gpu.container.reader",
}
"""Public name -> its module, imported on first use: torch and transformers take seconds."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'cerwu_gpu' has no attribute {name!r}")
    value = getattr(import_module(_MODULES.get(name, "cerwu_gpu.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


registration.register()
