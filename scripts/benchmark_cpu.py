"""Measure the search, the decoder and loading on this machine's CPU.

    python scripts/benchmark_cpu.py                  # search and decoder; about three minutes
    python scripts/benchmark_cpu.py --model SMALL    # and loading and running SMALL
    python scripts/benchmark_cpu.py --demo           # and compressing the demo's model
    python scripts/benchmark_cpu.py --check          # the comparisons alone, on tiny sizes

Each compiled form is first compared with its definition in torch. What is compared is measured in
turn within one run, A B A B ..., and the fastest turn of each counts: other work on the machine
only ever adds. SMALL is a directory that `make demo` or `cerwu-gpu compress` wrote. The authors'
C++ figures are those of reference.csv in the folder that CERWU_GPU_DATA names.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from cerwu_gpu import backend
from cerwu_gpu.block_problem import BlockProblem
from cerwu_gpu.coding.tables import codes_from_counts, table_from_codes
from cerwu_gpu.config import CompressionConfig, from_settings
from cerwu_gpu.files import dtype_name
from cerwu_gpu.quantize.layer import quantize_stack
from cerwu_gpu.quantize.passes import LOOKAHEAD
from cerwu_gpu.quantize.problem import Problem
from cerwu_gpu.spec import TRELLIS_NEXT
from scripts.benchmark_coding import coded_of, decode_constriction, random_coded
from scripts.benchmark_page import write_page
from scripts.benchmark_passes import BLOCK, Pass
from scripts.benchmark_timing import Mismatch, form

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "results" / "cpu.json"
TIES = 1e-5
"""Largest share of weights at which a row may leave the definition's path, because two candidates
cost the same but for rounding; what follows in that row answers for other errors."""
TURNS = 5
LAYER = (1536, 576)
CODED = (8192, 4096)
"""Rows and columns: 33.5 million weights."""

Row = dict[str, Any]


def in_turn(runs: Mapping[str, Callable[[], object]], turns: int = TURNS) -> dict[str, float]:
    """Return the seconds of each run's fastest turn, without the first turn, which compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            begin = perf_counter()
            run()
            if turn:
                seconds[name].append(perf_counter() - begin)
    return {name: min(times) for name, times in seconds.items()}


@contextmanager
def single() -> Iterator[None]:
    """Limit torch and the workers to one thread inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def forced(name: str, run: Callable[[], object]) -> Callable[[], object]:
    """Return `run` with the operations in the form `name`."""

    def call() -> object:
        with form(name):
            return run()

    return call


def blocks(rows: int) -> Iterator[Row]:
    """Time one block of 128 columns: torch's form on one thread, and the compiled one."""
    cases: dict[str, tuple[Pass, Callable[[BlockProblem], Any], int]] = {}
    cpu = torch.device("cpu")
    near = partial(backend.quantize_block, exhaustive=False)
    full = partial(backend.quantize_block, exhaustive=True)
    wide = Pass.random(max(rows, BLOCK + LOOKAHEAD), 33, cpu, escapes=True)
    cases["scalar, candidates near the target"] = wide, near, BLOCK
    cases["scalar, all of 33 levels"] = Pass.random(max(rows, BLOCK), 33, cpu), full, BLOCK
    for states in TRELLIS_NEXT:
        problem = Pass.random(max(rows, BLOCK + LOOKAHEAD), 33, cpu, states=states)
        search = partial(_trellis, states=states)
        cases[f"{states} states, 32 columns of lookahead"] = problem, search, BLOCK + LOOKAHEAD
    for case, (problem, search, columns) in cases.items():
        by_column = problem.columns.x[:rows, :columns].t().contiguous().t()  # as a pass has it
        block = problem.columns.of_rows(slice(rows)).block(slice(columns), by_column)
        with single():
            with form("numba"):
                ours = search(block)[0]
            with form("torch"):
                theirs = search(block)[0]
            share = float((ours != theirs).any(dim=1).sum()) / ours.numel()
            if share > TIES:
                raise Mismatch(
                    f"{case}: rows differ from the definition's from {share:.2g} of all on."
                )
            run = partial(search, block)
            seconds = in_turn({"torch": forced("torch", run), "numba": forced("numba", run)})
        for name, value in seconds.items():
            yield {
                "section": "block",
                "case": case,
                "what": {"torch": "torch form", "numba": "compiled"}[name],
                "ns_per_weight": 1e9 * value / (rows * BLOCK),
                "differing": share,
            }


def _trellis(block: BlockProblem, states: int) -> tuple[torch.Tensor, ...]:
    start = torch.zeros(len(block.x), dtype=torch.int64)
    return backend.quantize_block_trellis(block, states=states, start=start, commit=BLOCK)


def layers(shape: tuple[int, int]) -> Iterator[Row]:
    """Time a layer as the default settings quantize it on one thread: the search, and all."""
    rows, columns = shape
    weight, hessian, alpha = random_layer(rows, columns)
    for quantizer in ("scalar", "trellis8", "trellis16", "trellis32"):
        config = from_settings(lmbda=2e-4, quantizer=quantizer)  # type: ignore[arg-type]
        searching: dict[str, list[float]] = {"torch": [], "numba": []}

        def quantize(config: CompressionConfig = config) -> object:
            return quantize_stack([weight], hessian, config, [alpha]).limits

        def searched(
            name: str,
            run: Callable[[], object] = quantize,
            seconds: dict[str, list[float]] = searching,
        ) -> object:
            with form(name), timed_solve(seconds[name]):
                return run()

        with single():
            runs = {name: partial(searched, name) for name in searching}
            whole = in_turn(runs, turns=3)
        for name, label in (("torch", "torch form"), ("numba", "compiled")):
            search = min(searching[name][1:])
            for what, value in (("passes, products and tables", search), ("all", whole[name])):
                yield {
                    "section": "layer",
                    "case": f"{rows} x {columns}, {quantizer}: {what}",
                    "what": label,
                    "ns_per_weight": 1e9 * value / (rows * columns),
                }


class timed_solve:
    """Context that adds the seconds of each `Problem.solve` to a list."""

    def __init__(self, seconds: list[float]) -> None:
        self._seconds, self._solve = seconds, Problem.solve

    def __enter__(self) -> None:
        def solve(problem: Problem) -> torch.Tensor:
            begin = perf_counter()
            symbols = self._solve(problem)
            self._seconds.append(perf_counter() - begin)
            return symbols

        Problem.solve = solve  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        Problem.solve = self._solve  # type: ignore[method-assign]


def random_layer(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make weights whose rows and columns differ in spread, H of correlated inputs, and alpha."""
    torch.manual_seed(rows + columns)
    spread = torch.exp(0.3 * torch.randn(rows, 1)) * torch.exp(0.4 * torch.randn(1, columns))
    inputs = torch.randn(4 * columns, columns) * torch.exp(0.7 * torch.randn(columns))
    inputs += 0.5 * inputs.roll(1, dims=1)
    hessian = inputs.T @ inputs / (2 * columns)
    return 0.02 * spread * torch.randn(rows, columns), hessian, torch.exp(0.3 * torch.randn(rows))


def busy(shape: tuple[int, int]) -> Iterator[Row]:
    """Time the search on all threads, alone and beside a process that keeps one core busy."""
    weight, hessian, alpha = random_layer(*shape)
    for quantizer in ("scalar", "trellis8"):
        config = from_settings(lmbda=2e-4, quantizer=quantizer)  # type: ignore[arg-type]
        run = partial(quantize_stack, [weight], hessian, config, [alpha])
        for name in ("numba", "torch"):
            alone = in_turn({"": forced(name, run)}, turns=3 if name == "numba" else 1)[""]
            other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            try:
                beside = in_turn({"": forced(name, run)}, turns=3 if name == "numba" else 1)[""]
            finally:
                other.kill()
                other.wait()
            yield {
                "section": "busy",
                "case": quantizer,
                "what": {"torch": "torch form", "numba": "compiled"}[name],
                "seconds_alone": alone,
                "seconds_beside": beside,
                "threads": torch.get_num_threads(),
            }


def decoders(shape: tuple[int, int]) -> Iterator[Row]:
    """Time streams to weights on one thread; constriction's own decoder where it can follow."""
    m, n = shape
    trellises = {f"trellis{states}, 8 classes": states for states in (8, 16, 32)}
    for case, states in {"scalar, 8 classes of tables": 0, **trellises}.items():
        matrix, rule = random_coded(m, n, states)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            out = [torch.empty(m, n, dtype=dtype)]
            run = partial(backend.decode_weights, [matrix], [rule], dtype, out)
            check = matrix.shape[0] * matrix.shape[1] < 1 << 20 or dtype == torch.bfloat16
            with single():
                if check:
                    _same_weights(case, [matrix], [rule], dtype)
                seconds = in_turn({"": forced("numba", run)}, turns=3)[""]
            name = dtype_name(dtype)
            yield _rate(case, f"compiled, {name} weights", m * n, seconds)
        if states == 0:
            with single():
                seconds = in_turn({"": forced("torch", partial(backend.decode, [matrix]))}, 1)[""]
            yield _rate(case, "torch form, symbols", m * n, seconds)
    noise = np.random.default_rng(0)
    counts = 1e6 * np.exp(-(np.arange(-12, 13) ** 2) / 4)
    table = table_from_codes(codes_from_counts(counts.astype(np.int64)[None]))
    symbols = noise.choice(25, (m, n), p=table[0] / table[0].sum()).astype(np.int32)
    matrix = coded_of(symbols, table, np.zeros(m, np.int64), np.zeros(n, np.int64), 0)
    words, lengths = (x.numpy().view(np.uint32) for x in (matrix.words, matrix.lengths.int()))
    theirs = partial(decode_constriction, words, lengths, table[0], m, n)
    if not np.array_equal(theirs(), symbols):
        raise Mismatch("constriction decodes other symbols.")
    with single():
        runs = {"compiled, symbols": forced("numba", partial(backend.decode, [matrix]))}
        for what, seconds in in_turn({**runs, "constriction's own decoder": theirs}, 3).items():
            yield _rate("scalar, one table", what, m * n, seconds)


def _same_weights(case: str, batch: Any, rules: Any, dtype: torch.dtype) -> None:
    with form("numba"):
        ours = backend.decode_weights(batch, rules, dtype)[0]
    with form("torch"):
        theirs = backend.decode_weights(batch, rules, dtype)[0]
    if not torch.equal(ours, theirs):
        raise Mismatch(f"{case}: weights differ from the definition's.")


def _rate(case: str, what: str, weights: int, seconds: float) -> Row:
    rate = weights / seconds / 1e6
    return {"section": "decode", "case": case, "what": what, "million_per_second": rate}


def authors() -> Iterator[Row]:
    """Read the times of the authors' C++ per weight on one thread, if their figures are at hand."""
    folder = os.environ.get("CERWU_GPU_DATA")
    path = Path(folder) / "reference.csv" if folder else None
    if path is None or not path.is_file():
        print("benchmark_cpu: CERWU_GPU_DATA has no reference.csv: no figures of the authors' C++.")
        return
    with path.open(encoding="utf-8") as file:
        runs = [row for row in csv.DictReader(file) if row["method"] == "cerwu"]
    for levels in ("16", "64"):
        times = [float(row["cpu_us_per_weight"]) for row in runs if row["nbins"] == levels]
        times = [time for time in times if time > 0]
        if times:
            yield {
                "section": "authors",
                "case": f"|G| = {levels}",
                "what": f"median of {len(times)} runs of the authors' C++",
                "ns_per_weight": 1e3 * statistics.median(times),
            }


LOAD = """
import json, resource, sys, time
sys.path.insert(0, {root!r})
from scripts.benchmark_resident import measure
print(json.dumps(measure({way!r}, {path!r}, {tokens})))
"""


def model(path: Path) -> Iterator[Row]:
    """Time loading and running a compressed model, each way in a process of its own."""
    for way, tokens in (("dense", 8), ("compressed", 8)):
        best: dict[str, Any] = {}
        for _ in range(3):
            program = LOAD.format(root=str(ROOT), way=way, path=str(path), tokens=tokens)
            command = [sys.executable, "-c", program]
            process = subprocess.run(command, capture_output=True, text=True, check=True)
            result = json.loads(process.stdout.splitlines()[-1])
            if not best or result["seconds_to_load"] < best["seconds_to_load"]:
                best = result
        yield {"section": "model", "case": way, **best}


def demo() -> dict[str, float]:
    """Return the seconds by stage of compressing the demo's model with its settings."""
    from cerwu_gpu import compress
    from cerwu_gpu.hf.text import demo_text
    from scripts.demo import configured, model_file

    with TemporaryDirectory() as folder:
        source, output = str(model_file()), Path(folder) / "small"
        return compress(source, output, config=configured(demo_text()[0])).seconds


def environment() -> dict[str, Any]:
    """Return a description of the machine and the versions."""
    names = ("cerwu_gpu", "torch", "numba", "numpy", "constriction")
    return {
        "date": date.today().isoformat(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "versions": {name: version(name) for name in names},
    }


def _cpu() -> str:
    """Return the processor's name and the widest vectors that numba may use."""
    names, widest = [], "no AVX2"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            names.append(value.strip())
        if key.strip() == "flags":
            flags = value.split()
            widest = next((x for x in ("avx512f", "avx2") if x in flags), widest)
    return f"{names[0] if names else 'unknown'}, {widest.upper()}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmark_cpu", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, metavar="SMALL", help="a compressed directory to load and run")
    add("--demo", action="store_true", help="compress the demo's model, and time each stage")
    add("--check", action="store_true", help="compare with the definitions only, on tiny sizes")
    add("--json", type=Path, default=RESULTS, metavar="FILE", help="where the results go")
    add("--page", type=Path, metavar="FILE", help="where the page goes; default: docs")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code: 0; 1 if a compiled form is wrong."""
    arguments = parse(argv)
    tiny = arguments.check
    where = environment()
    sections = [
        blocks(130 if tiny else 4096),
        layers((24, 20) if tiny else LAYER),
        decoders((40, 60) if tiny else CODED),
    ]
    if not tiny:
        sections += [busy(LAYER), authors()]
    if arguments.model is not None:
        sections.append(model(arguments.model))
    rows = []
    try:
        for section in sections:
            for row in section:
                rows.append(row)
                if not tiny:
                    print(json.dumps(row), flush=True)
    except Mismatch as error:
        print(f"benchmark_cpu: {error}", file=sys.stderr)
        return 1
    if tiny:
        print("benchmark_cpu: every compiled form is as defined")
        return 0
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    results = {**where, "rows": rows}
    if arguments.demo:
        results["stages"] = demo()
    arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_page(arguments.page, cpu=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
