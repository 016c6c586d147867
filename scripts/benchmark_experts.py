"""Time a block of many experts beside dense layers with as many weights.

    python scripts/benchmark_experts.py              # 128 experts, some 10 minutes on one core
    python scripts/benchmark_experts.py --small      # 64 experts of 24 x 32, seconds
    python scripts/benchmark_experts.py --experts 16 # fewer of them
    python scripts/benchmark_experts.py --check      # tiny sizes: runs, and writes nothing

All weights are random, and so are the Hessians: products of few random inputs, and a diagonal.
Each block is quantized, coded and stored as a run does it, without calibration and sensitivities;
what is compared is measured in turn. On a CPU the seconds are CPU seconds on one thread. Two kinds
of dense layers stand beside the experts: a Llama block of its usual proportions, and two layers
that have all the rows of the experts and one Hessian each, which no mixture can equal: each of its
experts has Hessians of its own to factor.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from cerwu_gpu.compression.blocks import InputStatistics, Matrix
from cerwu_gpu.compression.pipeline import compress_blocks
from cerwu_gpu.config import from_settings
from cerwu_gpu.container.writer import DirectoryWriter
from cerwu_gpu.device import find_device
from cerwu_gpu.layout import Label, WeightLayout
from cerwu_gpu.progress import Clock

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "results" / "experts.json"
FULL, SMALL, TINY, WARM = (128, 384, 1024), (64, 24, 32), (5, 6, 16), (2, 4, 8)
"""Experts, and the shape [m, n] of one matrix of each; the other one is [n, m]. FULL is half of
Qwen3-30B-A3B's in either direction."""
INPUTS = 128
"""Random inputs behind a Hessian."""
LMBDA = 2e-6
"""Gives 3 to 4 bits per weight."""
WIDTH = 12.25
"""Weights of a Llama block in squares of its hidden size."""

Row = dict[str, Any]


class RandomBlock:
    """Matrices with random weights and statistics (compression/blocks.py)."""

    def __init__(
        self, name: str, shapes: Mapping[str, tuple[int, int, int, str]], device: torch.device
    ) -> None:
        """Make parameters of (experts, m, n, input); experts have an input each."""
        self.name = name
        self.layouts = {
            key: WeightLayout(key, (e, m, n) if e > 1 else (m, n), e, False)
            for key, (e, m, n, _) in shapes.items()
        }
        self._matrices: list[Matrix] = []
        self._statistics: dict[str, InputStatistics] = {}
        generator = torch.Generator().manual_seed(0)
        for key, (experts, rows, columns, shared) in shapes.items():
            for part in range(experts):
                inputs = f"{shared} {part}"
                spread = torch.exp(0.3 * torch.randn(rows, 1, generator=generator))
                weight = 0.02 * spread * torch.randn(rows, columns, generator=generator)
                self._matrices.append(Matrix(key, part, weight.to(device), inputs))
                if inputs not in self._statistics:
                    hessian = random_hessian(columns, generator).to(device)
                    self._statistics[inputs] = InputStatistics(hessian, INPUTS)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(matrix.weight.numel() for matrix in self._matrices)

    @property
    def inputs(self) -> dict[Label, str]:
        return {(matrix.name, matrix.part): matrix.input for matrix in self._matrices}

    def matrices(self) -> Sequence[Matrix]:
        return self._matrices

    def statistics(self) -> dict[str, InputStatistics]:
        return self._statistics

    def replace(self, name: str, part: int, weight: Tensor) -> None:
        """Drop the quantized weight: no model is behind the block."""


def random_hessian(columns: int, generator: torch.Generator) -> Tensor:
    """Return a positive definite H [n, n] of correlated inputs of unlike spread."""
    spread = torch.exp(0.5 * torch.randn(columns, generator=generator))
    inputs = spread * torch.randn(INPUTS, columns, generator=generator)
    return 2 / INPUTS * (inputs.T @ inputs) + torch.diag(0.3 * spread.square())


def experts(count: int, rows: int, columns: int, device: torch.device) -> RandomBlock:
    """Return a mixture's block: two matrices an expert."""
    shapes = {"up": (count, rows, columns, "x"), "down": (count, columns, rows, "y")}
    return RandomBlock(
        f"{count} experts of {rows} x {columns} and {columns} x {rows}", shapes, device
    )


def llama(weights: int, device: torch.device) -> RandomBlock:
    """Return a Llama block of about so many weights."""
    unit = 64 if weights > 1 << 20 else 16
    width = max(unit, round(math.sqrt(weights / WIDTH) / unit) * unit)
    inner = max(16, round((weights - 4 * width**2) / (3 * width) / 16) * 16)
    shapes = {key: (1, width, width, "x") for key in ("q", "k", "v")}
    shapes |= {"o": (1, width, width, "a"), "down": (1, width, inner, "z")}
    shapes |= {key: (1, inner, width, "y") for key in ("gate", "up")}
    return RandomBlock(f"a Llama block, {width} and {inner} wide", shapes, device)


def one_hessian(count: int, rows: int, columns: int, device: torch.device) -> RandomBlock:
    """Return two dense layers of the experts' widths, with all of their rows."""
    shapes = {"up": (1, count * rows, columns, "x"), "down": (1, count * columns, rows, "y")}
    name = f"{count * rows} x {columns} and {count * columns} x {rows}"
    return RandomBlock(name, shapes, device)


def seconds(block: RandomBlock, quantizer: str, device: torch.device) -> float:
    """Return the seconds that it takes to quantize, code and store a block."""
    settings: dict[str, Any] = {"quantizer": quantizer, "sensitivity": "none"}
    config = from_settings(lmbda=LMBDA, **settings)
    dtypes = dict.fromkeys(block.layouts, torch.bfloat16)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "out"
        with DirectoryWriter(path, generator="benchmark_experts") as writer:
            begin = clock(device)
            compress_blocks([block], block.layouts, dtypes, writer, config, Clock())
            return clock(device) - begin


def clock(device: torch.device) -> float:
    """Return the CPU seconds so far; on a GPU those on the wall, when it has finished."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def measured(
    sizes: tuple[int, int, int], quantizers: Sequence[str], device: torch.device, turns: int
) -> Iterator[Row]:
    """Yield the time of each block, the fastest turn, and how it compares with the experts'."""
    first = experts(*sizes, device)
    blocks = {
        "experts": first,
        "dense block": llama(first.weights, device),
        "one Hessian for all rows": one_hessian(*sizes, device),
    }
    for quantizer in quantizers:
        seconds(experts(*WARM, device), quantizer, device)  # compiles
        best = dict.fromkeys(blocks, math.inf)
        for _ in range(turns):
            for what, block in blocks.items():
                best[what] = min(best[what], seconds(block, quantizer, device))
        for what, block in blocks.items():
            per_weight = {each: best[each] / blocks[each].weights for each in (what, "experts")}
            yield {
                "section": "experts",
                "quantizer": quantizer,
                "case": block.name,
                "what": what,
                "weights": block.weights,
                "seconds": best[what],
                "ns_per_weight": 1e9 * per_weight[what],
                "experts_over_this": per_weight["experts"] / per_weight[what],
            }


def environment(device: torch.device) -> Row:
    """Return a description of the machine and the versions."""
    names = ("cerwu_gpu", "torch", "numpy", "constriction")
    gpu = device.type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if gpu else "CPU, one thread",
        "versions": {name: version(name) for name in names},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(prog="benchmark_experts", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--small", action="store_true", help="64 experts of 24 x 32")
    add("--experts", type=int, metavar="N", help="so many instead")
    add("--check", action="store_true", help="tiny sizes; write nothing")
    add("--quantizer", nargs="+", default=["scalar", "trellis8"], metavar="NAME")
    add("--turns", type=int, default=2, help="measurements of each; the fastest counts")
    add("--json", type=Path, default=RESULTS, metavar="FILE", help="where the results go")
    arguments = parser.parse_args(argv)
    device = find_device(None)
    if device.type == "cpu":
        torch.set_num_threads(1)
    sizes = TINY if arguments.check else SMALL if arguments.small else FULL
    sizes = (arguments.experts or sizes[0], *sizes[1:])
    rows = []
    for row in measured(sizes, arguments.quantizer, device, arguments.turns):
        print(json.dumps(row), flush=True)
        rows.append(row)
    if not arguments.check:
        before = json.loads(arguments.json.read_text()) if arguments.json.is_file() else {}
        name = "{} experts of {} x {}".format(*sizes)
        results = before | {name: environment(device) | {"rows": rows}}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
