"""Compare our baselines with the results of the authors' own programs.

    python scripts/fidelity.py DIR --layer NAME --json FILE.json

DIR holds golden/ (integer symbols of the authors' C++ under frozen rate models), reference.csv
(bits and losses of their adaptive coder and of NNCodec) and layers/NAME.npz (W and its H). Three
tables come out: agreement with the symbols by method and rate model; the adaptive model's bits and
losses over theirs; NNCodec's over those that were measured, where nncodec is installed.
"""

import argparse
import csv
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor

from cerwu_gpu.baselines.adaptive import AdaptiveRate
from cerwu_gpu.baselines.nncodec import nncodec_roundtrip
from cerwu_gpu.baselines.paper import FrozenRate, PaperMethod, paper_problem
from cerwu_gpu.cli.output import table
from cerwu_gpu.config import RateModel
from cerwu_gpu.errors import CerwuError
from cerwu_gpu.quantize.layer import relative_loss

METHODS: dict[str, PaperMethod] = {"cerwu": "cerwu", "optq-rd": "cerwu-gamma0", "optq": "optq"}
RATE_MODELS: dict[str, RateModel] = {
    "shannon": "histogram",
    "gaussian": "gaussian",
    "uniform": "uniform",
}
"""Our names of rate models by the authors' names."""

Row = dict[str, Any]


def golden(folder: Path) -> list[Row]:
    """Return the agreement with each run of golden/index.json, and our loss over theirs."""
    rows = []
    for run in json.loads((folder / "index.json").read_text(encoding="utf-8")):
        weight, hessian = matrices(folder / f"{run['case']}.npz")
        theirs = torch.from_numpy(np.load(folder / run["file"])["q"].astype(np.int32))
        problem = paper_problem(
            weight,
            hessian,
            method=METHODS[run["method"]],
            levels=run["nbins"],
            lmbda=run["lmbda"],
        )
        symbols = FrozenRate.of(RATE_MODELS[run["rate_model"]], problem).search(problem)
        loss = relative_loss(weight, symbols * problem.step, hessian)
        rows.append(
            {key: run[key] for key in ("case", "method", "rate_model", "nbins", "lmbda")}
            | {
                "agreement": float((symbols == theirs).float().mean()),
                "loss_ratio": loss / relative_loss(weight, theirs * run["step"], hessian),
            }
        )
    return rows


def adaptive(runs: list[Row], weight: Tensor, hessian: Tensor) -> list[Row]:
    """Run the adaptive model at the settings of the authors' runs in row order."""
    rate, rows = AdaptiveRate(), []
    for run in runs:
        if (run["rate_model"], run["scan"]) != ("deepcabac", "row") or run["method"] not in METHODS:
            continue
        problem = paper_problem(
            weight,
            hessian,
            method=METHODS[run["method"]],
            levels=int(run["nbins"]),
            lmbda=float(run["lmbda"]),
        )
        symbols = rate.search(problem)
        bits = rate.code_length(symbols) / symbols.numel()
        loss = relative_loss(weight, symbols * problem.step, hessian)
        rows.append(compared(run, ("method", "nbins", "lmbda"), bits, loss))
    return rows


def nncodec(runs: list[Row], weight: Tensor, hessian: Tensor) -> list[Row]:
    """Run NNCodec's round trip at the measured steps."""
    rows = []
    for run in runs:
        if not run["method"].startswith("nncodec"):
            continue
        decoded, size = nncodec_roundtrip(
            {"weight": weight.numpy()}, qp=int(run["qp"]), dependent=run["method"].endswith("dq")
        )
        loss = relative_loss(weight, torch.from_numpy(decoded["weight"]), hessian)
        rows.append(compared(run, ("method", "qp"), 8 * size / weight.numel(), loss))
    return rows


def compared(run: Row, keys: Sequence[str], bits: float, loss: float) -> Row:
    return {key: run[key] for key in keys} | {
        "bits": bits,
        "relative_loss": loss,
        "bits_ratio": bits / float(run["bits_per_weight"]),
        "loss_ratio": loss / float(run["relative_loss"]),
    }


def matrices(path: Path) -> tuple[Tensor, Tensor]:
    arrays = np.load(path)
    return torch.from_numpy(arrays["W"]), torch.from_numpy(arrays["H"])


def golden_table(rows: list[Row]) -> str:
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["method"], row["rate_model"]].append(row)
    groups["all", ""] = rows
    return table(
        ["method", "rate model", "runs", "mean agreement", "least", "loss off by at most"],
        [
            [
                method,
                model,
                str(len(group)),
                f"{mean(row['agreement'] for row in group):.3%}",
                f"{min(row['agreement'] for row in group):.3%}",
                f"{max(abs(row['loss_ratio'] - 1) for row in group):.2%}",
            ]
            for (method, model), group in groups.items()
        ],
    )


def ratio_table(rows: list[Row]) -> str:
    keys = [key for key in rows[0] if key not in ("bits", "relative_loss")][:-2]
    return table(
        [*keys, "bits", "over theirs", "relative loss", "over theirs"],
        [
            [
                *(row[key] for key in keys),
                f"{row['bits']:.4f}",
                f"{row['bits_ratio'] - 1:+.1%}",
                f"{row['relative_loss']:.4g}",
                f"{row['loss_ratio'] - 1:+.1%}",
            ]
            for row in rows
        ],
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fidelity", description="Ours against the authors'.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--layer", default="model.layers.14.self_attn.q_proj", metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    arguments = parser.parse_args(argv)
    results: dict[str, Any] = {"layer": arguments.layer}
    try:
        results["golden"] = golden(arguments.folder / "golden")
        print(golden_table(results["golden"]))
        weight, hessian = matrices(arguments.folder / "layers" / f"{arguments.layer}.npz")
        with (arguments.folder / "reference.csv").open(encoding="utf-8") as lines:
            runs = [run for run in csv.DictReader(lines) if run["layer"] == arguments.layer]
        for name, measure in (("adaptive", adaptive), ("nncodec", nncodec)):
            if name == "nncodec" and find_spec(name) is None:
                print(f"{name}: left out, it is not installed.", file=sys.stderr)
                continue
            results[name] = measure(runs, weight, hessian)
            print(f"\n{name}, {arguments.layer}\n{ratio_table(results[name])}")
    except (OSError, CerwuError) as error:
        print(f"fidelity: {error}", file=sys.stderr)
        return 2
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
