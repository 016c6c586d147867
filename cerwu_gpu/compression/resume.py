"""Fingerprint of everything that the compressed bytes depend on, checked before a run resumes."""

import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

import cerwu_gpu
from cerwu_gpu.config import CompressionConfig, settings

LIBRARIES = ("torch", "transformers", "constriction", "numpy")


def settings_fingerprint(config: CompressionConfig, device: torch.device) -> Mapping[str, str]:
    """Return the part that is known before anything is loaded: settings, code, kind of machine."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        **{name: str(value) for name, value in settings(config).items()},
        "complete_square": str(config.completes_square),
        "correction of drift": str(config.corrects_drift),
        "device": kind,
        "cerwu_gpu": cerwu_gpu.__version__,
        "the version of cerwu_gpu's code": _code_digest(),
        **{name: version(name) for name in LIBRARIES},
    }


@cache
def _code_digest() -> str:
    """Return the SHA-256 of the package's own source files."""
    digest = hashlib.sha256()
    folder = Path(cerwu_gpu.__file__).parent
    for path in sorted((*folder.rglob("*.py"), *(folder / "kernels").glob("*.py"))):
        digest.update(f"{path.relative_to(folder)}".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
