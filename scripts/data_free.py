"""Measure which importance of matrices serves best where no data calibrates (H = I).

    python scripts/data_free.py WIKITEXT -o FILE.jsonl

With m rows and n columns, alpha is 1 (none), one over the mean energy of a row (relative), n times
that (weight: the relative error of each weight counts alike), or n times that over the square root
of the layer's weights. Those of every STRIDE-th block are quantized, and compared at equal bits.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from cerwu_gpu.config import CompressionConfig, Objective
from cerwu_gpu.container.matrix import encode_matrix
from cerwu_gpu.quantize.layer import quantize_stack
from scripts.gradients import linear_layers
from scripts.judge import Judge, at_bits, noted

Importance = Callable[[Tensor], float]
IMPORTANCES: dict[str, Importance] = {
    "none": lambda w: 1.0,
    "relative": lambda w: 1 / float(w.square().sum(dim=1).mean()),
    "weight": lambda w: 1 / float(w.square().mean()),
    "root": lambda w: 1 / float(w.square().mean()) ** 0.5,
}
"""alpha of a matrix [m, n] under H = I."""
FIRST = {"none": 1e-5, "relative": 1e-5, "weight": 5e-3, "root": 2e-4}
"""lmbda of the first search."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all cases, and append a line to the JSON Lines file for each."""
    parser = argparse.ArgumentParser(prog="data_free", description="Importance without data.")
    add = parser.add_argument
    add("wikitext", type=Path, help="folder with valid.txt and wiki.test.raw")
    add("cases", nargs="*", default=list(IMPORTANCES), metavar="CASE")
    add("-o", "--output", type=Path, required=True, metavar="FILE.jsonl")
    add("--bits", type=float, nargs="+", default=[3.5])
    add("--stride", type=int, default=1, help="distance of the blocks that are quantized")
    add("--windows", type=int, default=20, help="of each text that judges")
    arguments = parser.parse_args(argv)
    judge = Judge(arguments.wikitext, arguments.windows)
    layers = linear_layers(judge.loaded.model, arguments.stride)
    original = {name: layer.weight.detach().clone() for name, layer in layers.items()}

    @torch.no_grad()
    def quantize(importance: Importance, lmbda: float) -> float:
        config = CompressionConfig(objective=Objective(lmbda=lmbda), limit_columns=0)
        coded = weights = 0
        for name, weight in original.items():
            given = weight.float()
            alpha = torch.full((len(given),), importance(given))
            (matrix,) = quantize_stack([given], torch.eye(given.shape[1]), config, [alpha]).matrices
            encoded = encode_matrix(matrix, 0.0)
            coded += 4 * len(encoded.words) + len(encoded.side)
            weights += weight.numel()
            layers[name].weight.copy_(matrix.weight(torch.bfloat16))
        return 8 * coded / weights

    for case in arguments.cases:
        measure = partial(quantize, IMPORTANCES[case])
        for wanted in arguments.bits:
            measured = at_bits(wanted, FIRST[case], measure, judge.quality)
            row = {"importance": case, "stride": arguments.stride}
            noted(row | measured.row(), arguments.output)


if __name__ == "__main__":
    main()
