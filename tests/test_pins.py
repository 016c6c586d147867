"""SHA-256 of what every toy family compresses to: a change of the code must not change the files.

The pins hold where torch rounds as it did when they were made, which a canary of matrix products
and factorisations shows. `python -m tests.test_pins` makes them anew, after a change that is meant
to change files.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from cerwu_gpu.container.writer import DirectoryWriter
from tests.configs import compress_flat, configured
from tests.conftest import TEXT, trained_tokenizer
from tests.hf import toys as language
from tests.models import toys as vision

PINS = Path(__file__).with_name("pins.json")
SHARD_BYTES = 2_500

LANGUAGE: dict[str, dict[str, Any]] = {
    "scalar": {"lmbda": 1e-5},
    "trellis4, drift ignored": {"lmbda": 1e-5, "quantizer": "trellis4", "correct_drift": False},
    "sequential, head kept": {"lmbda": 1e-5, "sequential": True, "keep_head": True},
}
VISION: dict[str, dict[str, Any]] = {
    "scalar": {"lmbda": 1e-4},
    "trellis8, norms as they are": {
        "lmbda": 1e-4,
        "quantizer": "trellis8",
        "correct_drift": False,
    },
}
SINGLE: dict[str, dict[str, Any]] = {
    "llama, sharded": {"lmbda": 1e-5},
    "llama, 3 bits": {"bits": 3.0},
    "llama, paper": {"levels": 16, "lmbda": 1e-6, "sensitivity": "none", "scale": "per-tensor"},
    "llama, rtn": {"method": "rtn", "levels": 16},
    "llama, trellis8": {"lmbda": 1e-5, "quantizer": "trellis8"},
    "resnet, 4 bits": {"bits": 4.0},
    "resnet, sequential": {"lmbda": 1e-4, "sequential": True},
}
CASES = (
    *(f"{family}, {name}" for family in language.FAMILIES for name in LANGUAGE),
    *(f"{family}, {name}" for family in vision.FAMILIES for name in VISION),
    *SINGLE,
)


def compress(case: str, output: Path, tokenizer: Any) -> None:
    """Compress the toy of a case with its settings."""
    family, _, name = case.partition(", ")
    if family in language.FAMILIES:
        settings = SINGLE.get(case) or LANGUAGE[name]
        few = {"samples": 4, "sequence_length": 32, "batch_size": 2}
        text: dict[str, Any] = {"tokenizer": tokenizer, "text": TEXT * 8}
        model = language.toy(family)
    else:
        settings, few = SINGLE.get(case) or VISION[name], {}
        text, model = {"batches": vision.images()}, vision.toy(family)
    config = configured(**few, **settings)
    compress_flat(model, output, config=config, progress=False, device="cpu", **text)


def digest(folder: Path) -> str:
    """Return the SHA-256 of a directory's shards and their index."""
    digest = hashlib.sha256()
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.index.json"))):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def canary() -> str:
    """Return a digest of how torch rounds products and factors of a few shapes here."""
    digest = hashlib.sha256(f"{torch.__version__} {version('transformers')}".encode())
    generator = torch.Generator().manual_seed(3)
    for rows, columns in ((48, 32), (32, 48), (320, 32), (96, 32), (64, 576)):
        x = torch.randn(rows, columns, generator=generator)
        square = (x.T @ x).double() + torch.eye(columns, dtype=torch.float64)
        for result in (
            x @ square.float(),
            torch.linalg.cholesky(square),
            torch.linalg.solve_triangular(square, x.T.double(), upper=True),
            torch.softmax(x, dim=1).log(),
            torch.nn.functional.silu(x).sum(dim=0),
            torch.nn.functional.conv2d(x[None, None], x[None, None, :3, :3]),
        ):
            digest.update(result.contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def pins() -> Iterator[dict[str, str]]:
    """The pins, with torch on one thread, as they were made."""
    content: dict[str, Any] = json.loads(PINS.read_text(encoding="utf-8"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if canary() != content["canary"]:
            pytest.skip("torch rounds differently here than where the pins were made")
        yield content["digests"]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES)
def test_files_are_those_of_the_pins(
    case: str,
    pins: dict[str, str],
    tmp_path: Path,
    toy_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "sharded" in case:
        monkeypatch.setitem(DirectoryWriter.__init__.__kwdefaults__, "shard_bytes", SHARD_BYTES)
    compress(case, tmp_path / "out", toy_tokenizer)
    if "sharded" in case:
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert digest(tmp_path / "out") == pins[case]


def make() -> None:
    """Write pins.json."""
    torch.set_num_threads(1)
    defaults, tokenizer = DirectoryWriter.__init__.__kwdefaults__, trained_tokenizer()
    usual, digests = defaults["shard_bytes"], {}
    for case in CASES:
        defaults["shard_bytes"] = SHARD_BYTES if "sharded" in case else usual
        with tempfile.TemporaryDirectory() as folder:
            compress(case, Path(folder) / "out", tokenizer)
            digests[case] = digest(Path(folder) / "out")
        print(case, digests[case][:8], flush=True)
    content = {"canary": canary(), "digests": digests}
    PINS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make()
