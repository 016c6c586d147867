"""What the bytes of a compressed directory depend on, so that a run is continued only as it was."""

import hashlib
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

import cerwu_gpu
from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.container.work import Fingerprint
from cerwu_gpu.files import tensor_bytes
from cerwu_gpu.hf.hessian_cache import hessian_key
from cerwu_gpu.hf.source import Source

LIBRARIES = ("torch", "transformers", "constriction", "numpy")


def settings_fingerprint(config: CompressionConfig, device: torch.device) -> Fingerprint:
    """Of the settings, the code and the machine's kind: known before anything is loaded."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        **{name: str(value) for name, value in asdict(config).items()},
        "device": kind,
        "cerwu_gpu": cerwu_gpu.__version__,
        "the version of cerwu_gpu's code": _code_digest(),
        **{name: version(name) for name in LIBRARIES},
    }


def source_fingerprint(source: Source) -> Fingerprint:
    """Of the model, its weights still the original ones, and of the text."""
    text = hashlib.sha256()
    for tokens in (source.tokens, source.held_out):
        text.update(f"{tuple(tokens.shape)}".encode())
        text.update(tensor_bytes(tokens))
    return {
        "the model": hessian_key(source.loaded.model, [], None, {}),
        "the calibration text": text.hexdigest(),
    }


@cache
def _code_digest() -> str:
    """SHA-256 of the package's own source files."""
    digest = hashlib.sha256()
    folder = Path(cerwu_gpu.__file__).parent
    for path in sorted((*folder.rglob("*.py"), *(folder / "kernels").glob("*.py"))):
        digest.update(f"{path.relative_to(folder)}".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
