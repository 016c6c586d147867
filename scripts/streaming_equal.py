"""Compress a language model from disk and from memory, and compare the files and the CPU time.

    python scripts/streaming_equal.py SmolLM2-135M-Instruct.Q4_1.gguf --text wiki.txt

Returns 1 where the bytes differ.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from cerwu_gpu import CompressionConfig, compress
from cerwu_gpu.config import Calibration, from_settings
from cerwu_gpu.hf.models import load_model


def main(arguments: list[str] | None = None) -> int:
    """Compress twice and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="directory or .gguf file")
    parser.add_argument("--text", required=True, help="calibration text")
    parser.add_argument("--lmbda", type=float, default=1e-7)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    given = parser.parse_args(arguments)
    config = from_settings(
        lmbda=given.lmbda,
        calibration=given.text,
        samples=given.samples,
        sequence_length=given.sequence_length,
    )
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in ("from disk", "from memory"):
            output = Path(folder) / way.replace(" ", "-")
            begin = time.process_time()
            written(given.model, output, config, whole=way == "from memory")
            print(f"{way}: {time.process_time() - begin:.0f} CPU seconds", flush=True)
            files[way] = {path.name: path.read_bytes() for path in output.glob("*.safetensors")}
    equal = files["from disk"] == files["from memory"]
    sizes = {name: len(content) for name, content in files["from disk"].items()}
    print(f"{sizes}: {'equal' if equal else 'different'} bytes")
    return int(not equal)


def written(model: Path, output: Path, config: CompressionConfig, *, whole: bool) -> None:
    """Compress a model into a directory, loaded whole first or not."""
    if not whole:
        compress(model, output, config=config, device="cpu", progress=False)
        return
    loaded = load_model(model)
    assert isinstance(config.calibration, Calibration)
    calibration = replace(config.calibration, tokenizer=loaded.tokenizer)
    config = replace(config, calibration=calibration)
    compress(loaded.model, output, config=config, device="cpu", progress=False)


if __name__ == "__main__":
    sys.exit(main())
