"""Time the kernels on this machine's GPU, beside their torch forms and plain baselines.

    python scripts/benchmark_kernels.py              # everything; writes the JSON and the page
    python scripts/benchmark_kernels.py --only decoder hessian     # these; no file without --json
    python scripts/benchmark_kernels.py --check      # the comparisons alone, on tiny sizes

Every section first compares the kernels with their definitions and stops where they differ; only
then is anything timed. Times are medians of triton.testing.do_bench. Without a CUDA device there is
nothing to measure (exit code 2); --check then runs the kernels in Triton's interpreter.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

import cerwu_gpu
from scripts.benchmark_coding import decoder, moments
from scripts.benchmark_page import PAGE, write_page
from scripts.benchmark_passes import models, passes, trellises
from scripts.benchmark_timing import FULL, TINY, Mismatch, Row

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "results" / "benchmark_kernels.json"
SECTIONS = {
    "pass": passes,
    "trellis": trellises,
    "decoder": decoder,
    "hessian": moments,
    "model": models,
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark_kernels", description="How fast the kernels are on this machine's GPU."
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    add("--check", action="store_true", help="compare with the definitions only, on tiny sizes")
    add("--json", type=Path, metavar="FILE", help="write the results there")
    add("--page", type=Path, metavar="FILE", help="write the page there")
    arguments = parser.parse_args(argv)
    if set(arguments.only) == set(SECTIONS):
        # Less than everything never replaces the repository's results.
        arguments.json = arguments.json or RESULTS
        arguments.page = arguments.page or PAGE
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code: 0; 1 if a kernel is wrong; 2 without a GPU."""
    arguments = parse(argv)
    if arguments.check and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is first imported
    elif not torch.cuda.is_available():
        print("benchmark_kernels: no CUDA device here: use --check, or a GPU.", file=sys.stderr)
        return 2
    try:
        rows = run(arguments.only, check=arguments.check)
    except Mismatch as error:
        print(f"benchmark_kernels: {error}", file=sys.stderr)
        return 1
    if not arguments.check:
        results = {**environment(), "rows": rows}
        write(arguments.json, json.dumps(results, indent=1) + "\n")
        if arguments.page:
            write_page(arguments.page, gpu=results)
    return 0


def write(path: Path | None, text: str) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def run(sections: Sequence[str], *, check: bool) -> list[Row]:
    """Return the rows of these sections, printed as they come; none with `check`.

    Raises:
        Mismatch: a kernel does not compute what its definition says.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name in sections:
        for row in SECTIONS[name](TINY if check else FULL, device, not check):
            print(f"{row['section']:8} {row['case']:32} {row['what']:28} {row['median']:.3e} s")
            rows.append(row)
        if check:
            print(f"{name}: as defined")
    return rows


def environment() -> dict[str, Any]:
    """Return device, versions and date of the figures."""
    names = ("torch", "triton", "numpy", "constriction")
    versions = {name: version(name) for name in names}
    return {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "versions": {"cerwu_gpu": cerwu_gpu.__version__, **versions},
    }


if __name__ == "__main__":
    sys.exit(main())
