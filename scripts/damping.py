"""Measure how much damping a Hessian of few tokens needs, on layers of a real model.

    python scripts/damping.py CALIBRATION.txt EVALUATION.txt --json FILE.json

H of p tokens of the calibration text is damped and quantized against; the result is judged by J
under the H of the evaluation text, at the same lmbda: (loss / 2) / lmbda + bits, per weight. The
table has the bits that each damping costs beyond the best one of its row. The model is the one of
scripts/demo.py, in bfloat16.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from cerwu_gpu.cli.output import table
from cerwu_gpu.config import CompressionConfig, Objective
from cerwu_gpu.container.matrix import encode_matrix
from cerwu_gpu.hf.models import load_model
from cerwu_gpu.hf.text import load_text, token_windows
from cerwu_gpu.quantize.layer import quantize_stack
from cerwu_gpu.quantize.objective import quadratic_error
from scripts.demo import model_file

LAYERS = ("1.self_attn.q_proj", "1.mlp.down_proj", "14.self_attn.q_proj", "14.mlp.down_proj")
LAYERS += ("29.self_attn.q_proj", "29.mlp.down_proj")
TOKENS_PER_COLUMN = (0.25, 1.0, 4.0, 10.0)
DAMPINGS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
BITS = 2.5
"""Bits per weight at which dampings are compared."""
WINDOW, JUDGING = 512, 24
"""Tokens per window, and number of windows that judge."""


def moments(model: Any, tokens: Tensor, ratios: Sequence[float]) -> dict[str, dict[int, Tensor]]:
    """Return layer -> number of tokens -> H = (2/p) X X^T [n, n] float32 of the first p tokens, for
    p of each ratio to n, and of all."""
    sums: dict[str, dict[int, Tensor]] = {}
    seen = dict.fromkeys(LAYERS, 0)
    hooks = []
    for name in LAYERS:
        layer = model.get_submodule(f"model.layers.{name}")
        n = layer.in_features
        asked = {min(int(ratio * n), tokens.numel()) for ratio in ratios} | {tokens.numel()}
        sums[name] = {p: torch.zeros(n, n) for p in sorted(asked)}

        def note(_: Any, inputs: tuple[Tensor, ...], name: str = name) -> None:
            rows, last = inputs[0].flatten(0, 1).float(), 0
            for p, total in sums[name].items():  # each sum holds the rows since the one before
                first, last = last, max(last, min(p - seen[name], len(rows)))
                total += rows[first:last].T @ rows[first:last]
            seen[name] += len(rows)

        hooks.append(layer.register_forward_pre_hook(note))
    with torch.no_grad():
        for batch in torch.split(tokens, 4):
            model.base_model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    hessians: dict[str, dict[int, Tensor]] = {}
    for name, parts in sums.items():
        totals = torch.stack(list(parts.values())).cumsum(0)
        hessians[name] = {p: 2 / p * total for p, total in zip(parts, totals, strict=True)}
    return hessians


def cost(weight: Tensor, hessian: Tensor, judge: Tensor, lmbda: float, damping: float) -> Any:
    """Return J / lmbda per weight under the Hessian `judge`, and the bits per weight."""
    objective = Objective(lmbda=lmbda, sensitivity="none", damping=damping)
    config = CompressionConfig(objective=objective, limit_columns=0)
    stack = quantize_stack([weight], hessian, config)
    encoded = encode_matrix(stack.matrices[0], stack.relative_losses[0])
    bits = 8 * (4 * len(encoded.words) + len(encoded.side)) / weight.numel()
    difference = weight - stack.matrices[0].weight(torch.float32)
    loss = float(quadratic_error(difference, judge).sum())
    return loss / 2 / lmbda / weight.numel() + bits, bits


def usual_lmbda(weight: Tensor, hessian: Tensor) -> float:
    """Return the lmbda that gives about BITS."""
    lmbda = 1e-3 * float(quadratic_error(weight, hessian).sum()) / weight.numel()
    for _ in range(4):
        _, bits = cost(weight, hessian, hessian, lmbda, 1e-3)
        lmbda *= 4 ** (bits - BITS)  # the error falls by four with each bit
    return lmbda


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print one table, and write the JSON file."""
    parser = argparse.ArgumentParser(prog="damping", description="How much damping H needs.")
    parser.add_argument("calibration", help="text file of the Hessians that are damped")
    parser.add_argument("evaluation", help="text file of the Hessian that judges")
    parser.add_argument("--samples", type=int, default=30, help=f"windows of {WINDOW} tokens")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    loaded = load_model(model_file(), dtype=torch.bfloat16)
    seen, judging = (
        moments(
            loaded.model,
            token_windows(load_text(text), loaded.tokenizer, count, WINDOW, 0).tokens,
            ratios,
        )
        for text, count, ratios in (
            (arguments.calibration, arguments.samples, TOKENS_PER_COLUMN),
            (arguments.evaluation, JUDGING, ()),
        )
    )
    results = []
    for name in LAYERS:
        weight = loaded.model.get_submodule(f"model.layers.{name}").weight.detach().float()
        (judge,) = judging[name].values()
        *_, whole = seen[name].values()
        lmbda = usual_lmbda(weight, whole)
        for tokens, hessian in seen[name].items():
            costs = [cost(weight, hessian, judge, lmbda, damping)[0] for damping in DAMPINGS]
            columns = weight.shape[1]
            results.append({"layer": name, "columns": columns, "tokens": tokens, "costs": costs})
            print(
                name,
                tokens,
                *(f"{c - min(costs):.3f}" for c in costs),
                f"{min(costs):.3f}",
                flush=True,
            )
    header = ["layer", "columns", "tokens", *map(str, DAMPINGS)]
    rows = [
        [r["layer"], str(r["columns"]), str(r["tokens"])]
        + [f"{c - min(r['costs']):.3f}" for c in r["costs"]]
        for r in results
    ]
    print(f"\n{table(header, rows)}")
    if arguments.json:
        content = {"dampings": DAMPINGS, "bits": BITS, "results": results}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
