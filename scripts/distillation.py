"""Distil a directory that `cerwu-gpu compress` wrote, and judge it before and after on texts.

The integers are those of the directory, so that settings of the distillation can be compared at
the price of the distillation alone. A killed run goes on where its state was written.

    python scripts/distillation.py MODEL COMPRESSED -o OUTPUT --steps 80 --text wiki.test.raw
"""

import argparse
import json
import platform
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

# Instead of this folder, whose evaluate.py would shadow Hugging Face's package evaluate.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from cerwu_gpu import Calibration, CompressionConfig, load_compressed
from cerwu_gpu.compression.distill import distil
from cerwu_gpu.compression.row_codes import WrittenRowCodes
from cerwu_gpu.compression.run import directory_bytes
from cerwu_gpu.config import Distillation
from cerwu_gpu.container.reader import CompressedDirectory, open_directory
from cerwu_gpu.container.writer import DirectoryWriter
from cerwu_gpu.hf.causal_lm import CausalLM
from cerwu_gpu.hf.evaluation import compare
from cerwu_gpu.hf.models import load_model
from cerwu_gpu.hf.text import demo_text, load_text

PYTHON = "python"
"""Name of the text that is Python's own documentation (demo_text)."""

CLEAR_PEAK = Path("/proc/self/clear_refs")
"""File of Linux that takes a 5 for a new beginning of the peak of the resident set."""


def peak_bytes() -> int | None:
    """Return the largest resident set, libraries included; None where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(found[0]) if found else None


def parsed() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help="the original")
    parser.add_argument("compressed", type=Path, help="what `cerwu-gpu compress` made of it")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--calibration", required=True, help="text file, or a dataset")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, default=Distillation.learning_rate)
    parser.add_argument("--batch-size", type=int, default=Distillation.batch_size)
    parser.add_argument(
        "--text", action="append", default=[], help=f"to judge by: a file, or {PYTHON}"
    )
    parser.add_argument("--windows", type=int, default=20, help="of 512 tokens")
    parser.add_argument("--json", type=Path, help="append the result to this file")
    return parser.parse_args()


def copied(directory: CompressedDirectory, writer: DirectoryWriter) -> None:
    """Give the writer every compressed weight of a directory."""
    for name, entry in directory.compressed().items():
        words, side = directory.coded(name)
        writer.add_compressed(
            name,
            shape=entry.shape,
            dtype=getattr(torch, entry.dtype),
            transposed=entry.transposed,
            parts=entry.parts,
            words=words,
            side=side,
        )


def judged(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return bytes of a directory, and its quality on each text beside the original's."""
    original, result = load_model(args.model), {"directory_bytes": directory_bytes(path)}
    model = load_compressed(path)
    for name in args.text:
        text = demo_text()[1] if name == PYTHON else load_text(name)
        windows = {"context_length": 512, "max_windows": args.windows}
        comparison = compare(model, original.model, original.tokenizer, text, **windows)
        result[Path(name).name] = asdict(comparison)
        print(path.name, Path(name).name, comparison, flush=True)
    return result


def distilled(args: argparse.Namespace) -> dict[str, Any]:
    """Distil the directory into `args.output`; return what it gained and cost."""
    distillation = Distillation(
        steps=args.steps, learning_rate=args.learning_rate, batch_size=args.batch_size
    )
    config = CompressionConfig(
        calibration=Calibration(
            source=args.calibration, samples=args.samples, sequence_length=args.sequence_length
        ),
        distillation=distillation,
    )
    loaded = load_model(args.model)
    adapter = CausalLM(loaded, config, device=torch.device("cpu"))
    adapter.calibrate(config)
    begin, begin_cpu = perf_counter(), process_time()
    if CLEAR_PEAK.exists():
        CLEAR_PEAK.write_text("5", encoding="ascii")
    student = adapter.student(config)
    directory, module = open_directory(args.compressed), adapter.module
    with torch.no_grad():
        for name, tensor in (*directory.plain(), *directory.weights()):
            module.get_parameter(name).copy_(tensor)
    state = args.output.with_name(f".{args.output.name}.state")
    with DirectoryWriter(args.output, generator="scripts/distillation.py") as writer:
        copied(directory, writer)
        rows = WrittenRowCodes(writer, module)
        result = distil(student, rows, distillation, state=state, progress=True)
        for name, _ in directory.plain():
            writer.add_plain(name, module.get_parameter(name))
        for path in args.compressed.iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, writer.folder)
        writer.complete()
        writer.publish()
    state.unlink(missing_ok=True)
    return {
        **asdict(result),
        "seconds": perf_counter() - begin,
        "cpu_seconds": process_time() - begin_cpu,
        "threads": torch.get_num_threads(),
        "peak_bytes": peak_bytes(),
    }


def main() -> None:
    """Distil, judge, print."""
    args = parsed()
    settings = {k: v for k, v in vars(args).items() if not isinstance(v, Path) and k != "model"}
    settings |= {"model": Path(args.model).name, "compressed": args.compressed.name}
    settings |= {"calibration": Path(args.calibration).name}
    settings |= {"text": [Path(name).name for name in args.text]}
    gained = distilled(args)
    print(gained, flush=True)
    result = {
        "settings": settings,
        "distillation": gained,
        "after": judged(args.output, args),
        "before": judged(args.compressed, args),
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
    }
    print(json.dumps(result, indent=2))
    if args.json is not None:
        with args.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
