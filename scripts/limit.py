"""How far from the information-theoretic limit: bits, loss and gap of real layers.

    python scripts/limit.py DIR --bits 1.5 2.5 3.5 --quantizer scalar trellis4 trellis8 \\
        --baseline --reference FILE.csv --json FILE.json --picture FILE.png

DIR holds *.npz files with W [m, n] and its undamped H [n, n]. For every layer, quantizer and rate
the lmbda is sought that gives the asked bits per weight, everything that is stored counted (the
words of the streams, tables, classes, steps, escapes); then the loss, the limit at that loss and
the gap are printed (docs/method.md). --baseline runs the paper's method (one step and one table for
the matrix, the best number of levels) and prints the ratio of bits at equal loss; --reference
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
"""(bits, gap) along the hull of each other method."""
PAPER = "paper"
"""What --baseline is called in tables; --reference is called REFERENCE."""
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
    """The exit code: 0, or 2 after one sentence about wrong input."""
    arguments = parse(argv)
    try:
        run(arguments)
    except (CerwuError, OSError) as error:
        print(f"limit: {error}", file=sys.stderr)
        return 2
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Check everything that can be checked, then measure, print and write."""
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
        read_arrays(path)  # a wrong file is refused before the others take their minutes
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

    others = [PAPER] * arguments.baseline + [REFERENCE] * bool(arguments.reference)
    print_results(results, others)
    if arguments.json:
        document = report(arguments, results, points, others)
        text = json.dumps(document, indent=1, allow_nan=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if arguments.picture:
        from scripts.limit_picture import draw

        draw(results, lines, arguments.picture)


def read_arrays(path: Path) -> tuple[Tensor, Tensor]:
    """W [m, n] and H [n, n] float32, checked."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {key: arrays[key] for key in ("W", "H") if key in arrays}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise CerwuError(f"{path} cannot be read ({error}): save it with numpy.savez.") from None
    for key in ("W", "H"):
        if key not in found:
            raise CerwuError(f"{path} holds no {key}: save W [m, n] and H [n, n] in it.")
    W, H = found["W"], found["H"]
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
    """(bits, relative loss) of the rows whose method is cerwu, by layer."""
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


def print_results(results: Sequence[Result], others: Sequence[str]) -> None:
    header = ["layer", "quantizer", "asked", "bits", "lmbda", "relative loss", "limit", "gap"]
    header += [f"/ {other}" for other in others]
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
            *(number(r.ratio(other), 3) for other in others),
        ]
        for r in results
    ]
    print(table(header, rows))
    print(f"\n{table(*summary_table(results, others))}\n")
    for r in results:
        if abs(r.point.bits - r.asked) > TOLERANCE:
            print(
                f"{r.layer}, {r.quantizer}: {r.point.bits:.4f} bits is as near to {r.asked:g} as "
                f"{r.evaluations} trials came"
            )
    for other in others:
        for layer in dict.fromkeys(r.layer for r in results):
            own = [r for r in results if r.layer == layer and r.others.get(other, 0) is None]
            if own:
                cases = ", ".join(f"{r.quantizer} {r.asked:g}" for r in own)
                print(f"{layer}: no loss of {other} overlaps that of {cases}")


def summary(results: Sequence[Result], others: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Mean gap, worst gap, mean and worst ratio to each other method, by quantizer."""
    found: dict[str, dict[str, Any]] = {}
    for quantizer in dict.fromkeys(r.quantizer for r in results):
        own = [r for r in results if r.quantizer == quantizer]
        worst = max(own, key=lambda r: r.gap)
        found[quantizer] = {
            "mean_gap": mean(r.gap for r in own),
            "worst_gap": worst.gap,
            "worst": f"{worst.layer}, {worst.asked:g} bits",
        }
        for other in others:
            ratios = [ratio for r in own if (ratio := r.ratio(other)) is not None]
            found[quantizer][f"mean_ratio_{other}"] = mean(ratios) if ratios else None
            found[quantizer][f"worst_ratio_{other}"] = max(ratios, default=None)
    return found


def summary_table(
    results: Sequence[Result], others: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    header = ["quantizer", "mean gap", "worst gap", "at"]
    for other in others:
        header += [f"/ {other}, mean", "worst"]
    rows = []
    for quantizer, figures in summary(results, others).items():
        row = [quantizer, f"{figures['mean_gap']:.4f}", f"{figures['worst_gap']:.4f}"]
        row.append(figures["worst"])
        for other in others:
            row += [number(figures[f"{kind}_ratio_{other}"], 3) for kind in ("mean", "worst")]
        rows.append(row)
    return header, rows


def cpu() -> str:
    """The processor in words."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report(
    arguments: argparse.Namespace,
    results: Sequence[Result],
    points: dict[str, list[Point]],
    others: Sequence[str],
) -> dict[str, Any]:
    """What --json writes."""
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
        "summary": summary(results, others),
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
                for p in found
            ]
            for name, found in points.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
