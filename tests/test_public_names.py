"""The public names are pinned: adding, removing or renaming one is a decision, not an accident."""

import subprocess
import sys

import pytest

import cerwu_gpu
from cerwu_gpu import errors

PUBLIC = [
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


def test_the_public_names_are_these() -> None:
    assert sorted(cerwu_gpu.__all__) == PUBLIC
    assert dir(cerwu_gpu) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_can_be_had(name: str) -> None:
    value = getattr(cerwu_gpu, name)
    assert name == "__version__" or value.__name__ == name


def test_every_error_is_public_and_has_the_one_root() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined == {name for name in PUBLIC if name.endswith("Error")}
    assert all(issubclass(getattr(errors, name), errors.CerwuError) for name in defined)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = cerwu_gpu.compres


def python(code: str) -> None:
    """Run `code` in a fresh interpreter."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    python(
        "import sys, cerwu_gpu, cerwu_gpu.cli\n"
        "cerwu_gpu.CompressionConfig, cerwu_gpu.CerwuError, cerwu_gpu.Report\n"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'triton', 'constriction'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )


def test_every_public_name_can_be_had_without_triton() -> None:
    python(
        "import sys\n"
        "sys.modules['triton'] = None  # makes `import triton` an ImportError\n"
        "import cerwu_gpu\n"
        "for name in cerwu_gpu.__all__: getattr(cerwu_gpu, name)"
    )
