"""Compress the demo's model with settings of the command line, and judge it on two texts.

    python scripts/efforts.py WIKITEXT -o FILE.jsonl --effort best --set drift=ignore

The model is in bfloat16 and everything is quantized. Text that calibrates and is not given is
WikiText-2's validation text in place of its training text, and the model's own.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import process_time
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from cerwu_gpu import compress
from cerwu_gpu.config import all_settings, from_settings
from scripts.judge import Judge, noted


def parsed_setting(text: str) -> tuple[str, Any]:
    """Return the name and the value in "name=value"."""
    name, _, value = text.partition("=")
    if name not in all_settings():
        raise argparse.ArgumentTypeError(f"{name} is no setting")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            pass
    return name, None if value == "None" else value


def main(argv: Sequence[str] | None = None) -> None:
    """Compress and judge, and append a line to the JSON Lines file."""
    parser = argparse.ArgumentParser(prog="efforts", description="What an effort costs and gives.")
    add = parser.add_argument
    add("wikitext", type=Path, help="folder with valid.txt and wiki.test.raw")
    add("-o", "--output", type=Path, required=True, metavar="FILE.jsonl")
    add("--effort", default="normal")
    add("--set", type=parsed_setting, action="append", default=[], metavar="NAME=VALUE")
    add("--windows", type=int, default=20, help="of each text that judges")
    arguments = parser.parse_args(argv)
    judge = Judge(arguments.wikitext, arguments.windows)
    original = judge.quality()
    given = {"effort": arguments.effort, **dict(arguments.set)}
    if given.get("calibration") == "wikitext2":
        given["calibration"] = str(arguments.wikitext / "valid.txt")
    elif "calibration" not in given and arguments.effort != "fast":
        given["calibration"] = (f"{arguments.wikitext / 'valid.txt'}:0.5", "self:0.5")
    config = from_settings(**given, tokenizer=judge.loaded.tokenizer)
    begin = process_time()
    with tempfile.TemporaryDirectory() as folder:
        report = compress(judge.loaded.model, Path(folder) / "small", config=config, progress=False)
    seconds = process_time() - begin
    row = {
        "effort": arguments.effort,
        "set": dict(arguments.set),
        "bits": report.bits_per_weight,
        "bytes": report.directory_bytes,
        "cpu_seconds": seconds,
        "stages": report.seconds,
        "threads": torch.get_num_threads(),
        "distillation": report.distillation,
        **{name: x._asdict() for name, x in judge.quality().items()},
        "original": {name: x._asdict() for name, x in original.items()},
    }
    noted(row, arguments.output)


if __name__ == "__main__":
    main()
