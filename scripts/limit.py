"""How far from the information-theoretic limit: bits, loss and gap of real layers.

    python scripts/limit.py DIR --bits 1.5 2.5 3.5 --quantizer scalar trellis8 trellis32 \\
        --baseline --reference FILE.csv --json FILE.json --picture FILE.png

DIR holds *.npz files with W [m, n] and its undamped H [n, n]. For every layer, quantizer and rate
the lmbda is sought that gives the asked bits per weight, everything that is stored counted (the
words of the streams, tables, classes, steps, escapes); then the loss, the limit at that loss and
the gap are told (docs/method.md). --baseline runs the paper's method (one step and one table for
the matrix, the best number of levels) and tells our bits over its bits at equal loss; --reference
does the same with points that were measured elsewhere.
"""

import argparse
import csv
import json
import math
import platform
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any, get_args

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import cerwu_gpu
from cerwu_gpu.cli.output import number, table
from cerwu_gpu.config import DampingBy, Objective, Quantizer, from_settings
from cerwu_gpu.errors import CerwuError
from cerwu_gpu.quantize.limit import Limit
from cerwu_gpu.quantize.objective import quadratic_error
from scripts.limit_points import (
    TOLERANCE,
    Hull,
    Layer,
    Point,
    Result,
    baseline,
    gaps,
    solve,
)

Lines = dict[str, list[tuple[float, float]]]
"""Points (bits, gap) along the hull of each other method."""
PAPER = "paper"
"""Name of --baseline in tables; that of --reference is REFERENCE."""
REFERENCE = "reference"
SETTINGS = ("passes", "damping", "damping_by")
"""Options that go into every configuration, the paper's method included."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="limit", description="How far real layers are from the information-theoretic limit."
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="*.npz files with W [m, n] and H [n, n]")
    add("--bits", type=float, nargs="+", required=True, help="stored bits per weight to compare at")
    add("--quantizer", nargs="+", choices=get_args(Quantizer), default=get_args(Quantizer))
    add("--baseline", action="store_true", help="run the paper's method, too (minutes)")
    add("--reference", type=Path, metavar="FILE.csv", help="points of others: rows of method cerwu")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    add("--picture", type=Path, metavar="FILE.png", help="draw the gaps (needs matplotlib)")
    add("--passes", type=int, default=Objective.passes)
    add("--damping", type=float, default=Objective.damping)
    add("--damping-by", choices=get_args(DampingBy), default=Objective.damping_by)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return the exit code: 0, or 2 after one sentence about wrong input."""
    arguments = parse(argv)
    try:
        run(arguments)
    except (CerwuError, OSError) as error:
        print(f"limit: {error}", file=sys.stderr)
        return 2
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Check all inputs, then measure, print and write."""
    if not all(math.isfinite(bits) and bits > 0 for bits in arguments.bits):
        raise CerwuError("--bits must be finite numbers above 0.")
    settings = {key: getattr(arguments, key) for key in SETTINGS}
    from_settings(**settings)
    if arguments.picture and find_spec("matplotlib") is None:
        raise CerwuError("--picture needs matplotlib: pip install 'cerwu_gpu[plots]'.")
    paths = sorted(arguments.folder.glob("*.npz"))
    if not paths:
        raise CerwuError(f"{arguments.folder} holds no *.npz files: name a folder that does.")
    for path in paths:
        read_arrays(path)  # an error in a file is found before the other ones take minutes
    measured = read_reference(arguments.reference) if arguments.reference else {}
    for path in (arguments.json, arguments.picture):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)

    bits, quantizers = sorted(set(arguments.bits)), list(dict.fromkeys(arguments.quantizer))
    results: list[Result] = []
    lines: dict[str, Lines] = {}
    points: dict[str, list[Point]] = {}
    for layer in tqdm(map(read_layer, paths), total=len(paths), desc="layers", disable=None):
        hulls = {}
        if arguments.baseline:
            points[layer.name] = baseline(layer, bits, settings)
            hulls[PAPER] = Hull.of((p.bits, p.relative_loss) for p in points[layer.name])
        if layer.name in measured:
            hulls[REFERENCE] = Hull.of(measured[layer.name])
        results += solve(layer, quantizers, bits, settings, hulls)
        lines[layer.name] = {other: gaps(hull, layer) for other, hull in hulls.items()}

    methods = [PAPER] * arguments.baseline + [REFERENCE] * bool(arguments.reference)
    print_results(results, methods)
    if arguments.json:
        document = report(arguments, results, points, methods)
        text = json.dumps(document, indent=1, allow_nan=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if arguments.picture:
        from scripts.limit_picture import draw

        draw(results, lines, arguments.picture)


def read_arrays(path: Path) -> tuple[Tensor, Tensor]:
    """Read and check W [m, n] and H [n, n] float32."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            matrices = {key: arrays[key] for key in ("W", "H") if key in arrays}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise CerwuError(f"{path} cannot be read ({error}): save it with numpy.savez.") from None
    for key in ("W", "H"):
        if key not in matrices:
            raise CerwuError(f"{path} holds no {key}: save W [m, n] and H [n, n] in it.")
    W, H = matrices["W"], matrices["H"]
    if W.ndim != 2 or 0 in W.shape or H.shape != (W.shape[1], W.shape[1]):
        raise CerwuError(f"{path}: W {W.shape} and H {H.shape} must be [m, n] and [n, n].")
    if W.dtype.kind != "f" or H.dtype.kind != "f":
        raise CerwuError(f"{path}: W is {W.dtype} and H is {H.dtype}: both must be floats.")
    if not (np.isfinite(W).all() and np.isfinite(H).all()):
        raise CerwuError(f"{path}: W or H has values that are not finite: compute them again.")
    return torch.from_numpy(W.astype(np.float32)), torch.from_numpy(H.astype(np.float32))


def read_layer(path: Path) -> Layer:
    weight, hessian = read_arrays(path)
    energy = float(quadratic_error(weight, hessian).sum())
    if energy <= 0:
        raise CerwuError(f"{path}: W has no effect under H, so there is nothing to measure.")
    return Layer(path.stem, weight, hessian, Limit.of(weight, hessian), energy)


def read_reference(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Read (bits, relative loss) of the rows whose method is cerwu, by layer."""
    points: dict[str, list[tuple[float, float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["method"] == "cerwu":
                    pair = float(row["bits_per_weight"]), float(row["relative_loss"])
                    if not pair[1] > 0:
                        raise CerwuError(f"{path}: relative_loss must be above 0.")
                    points.setdefault(row["layer"], []).append(pair)
    except KeyError as error:
        raise CerwuError(f"{path} has no column {error.args[0]}: add it.") from None
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise CerwuError(f"{path} cannot be read as a table ({error}).") from None
    return points


def print_results(results: Sequence[Result], methods: Sequence[str]) -> None:
    header = ["layer", "quantizer", "asked", "bits", "lmbda", "relative loss", "limit", "gap"]
    header += [f"/ {method}" for method in methods]
    rows = [
        [
            r.layer,
            r.quantizer,
            f"{r.asked:g}",
            f"{r.point.bits:.4f}",
            f"{r.point.lmbda:.3e}",
            f"{r.point.relative_loss:.3e}",
            f"{r.limit:.4f}",
            f"{r.gap:.4f}",
            *(number(r.ratio(method), 3) for method in methods),
        ]
        for r in results
    ]
    print(table(header, rows))
    print(f"\n{table(*summary_table(results, methods))}\n")
    for r in results:
        if abs(r.point.bits - r.asked) > TOLERANCE:
            print(
                f"{r.layer}, {r.quantizer}: {r.point.bits:.4f} bits is as near to {r.asked:g} as "
                f"{r.evaluations} trials came"
            )
    for method in methods:
        for layer in dict.fromkeys(r.layer for r in results):
            apart = [r for r in results if r.layer == layer and r.others.get(method, 0) is None]
            if apart:
                cases = ", ".join(f"{r.quantizer} {r.asked:g}" for r in apart)
                print(f"{layer}: no loss of {method} overlaps that of {cases}")


def summary(results: Sequence[Result], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return mean gap, worst gap, mean and worst ratio to each other method, by quantizer."""
    figures: dict[str, dict[str, Any]] = {}
    for quantizer in dict.fromkeys(r.quantizer for r in results):
        cases = [r for r in results if r.quantizer == quantizer]
        worst = max(cases, key=lambda r: r.gap)
        figures[quantizer] = {
            "mean_gap": mean(r.gap for r in cases),
            "worst_gap": worst.gap,
            "worst": f"{worst.layer}, {worst.asked:g} bits",
        }
        for method in methods:
            ratios = [ratio for r in cases if (ratio := r.ratio(method)) is not None]
            figures[quantizer][f"mean_ratio_{method}"] = mean(ratios) if ratios else None
            figures[quantizer][f"worst_ratio_{method}"] = max(ratios, default=None)
    return figures


def summary_table(
    results: Sequence[Result], methods: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    header = ["quantizer", "mean gap", "worst gap", "at"]
    for method in methods:
        header += [f"/ {method}, mean", "worst"]
    rows = []
    for quantizer, figures in summary(results, methods).items():
        row = [quantizer, f"{figures['mean_gap']:.4f}", f"{figures['worst_gap']:.4f}"]
        row.append(figures["worst"])
        for method in methods:
            row += [number(figures[f"{kind}_ratio_{method}"], 3) for kind in ("mean", "worst")]
        rows.append(row)
    return header, rows


def cpu() -> str:
    """Return the processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report(
    arguments: argparse.Namespace,
    results: Sequence[Result],
    points: dict[str, list[Point]],
    methods: Sequence[str],
) -> dict[str, Any]:
    """Return the contents of --json."""
    packages = ("torch", "numpy", "constriction")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "versions": {
            "cerwu_gpu": cerwu_gpu.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "settings": {
            "bits": arguments.bits,
            "quantizer": arguments.quantizer,
            **{key: getattr(arguments, key) for key in SETTINGS},
        },
        "summary": summary(results, methods),
        "results": [
            {
                **{k: v for k, v in asdict(r).items() if k not in ("point", "others")},
                **{k: v for k, v in asdict(r.point).items() if k != "levels"},
                "gap": r.gap,
                "bits_of_others": r.others,
            }
            for r in results
        ],
        "baseline": {
            name: [
                {key: getattr(p, key) for key in ("levels", "lmbda", "bits", "relative_loss")}
                for p in of_layer
            ]
            for name, of_layer in points.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
