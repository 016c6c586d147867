"""Measure what a Kronecker-factored output side of the objective brings.

    python scripts/output_side.py WIKITEXT -o FILE.jsonl

The objective counts squared errors of each output by itself, with A = diag(alpha). Here A [m, m] is
the second moment of the loss's gradient at all outputs of a matrix, and the loss tr(A D H D^T). In
groups of rows, one after the other, with L unit lower triangular by blocks and
A = L^T diag(S_1, ..., S_G) L, it is

    sum_g tr(S_g E_g H E_g^T),   E_g = D_g + K_g D_(groups before),

so that a group is quantized as if alone, toward W_g + K_g D_before, by the diagonal of S_g. Cases:

- rows: A is diagonal, whole matrices;
- groups: the same in groups of rows, which have their own tables in the file;
- coupled:RHO: as groups, by all of A, the entries off its diagonal times 1 - RHO.

All at equal bits, judged on texts that calibrated nothing.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from cerwu_gpu.config import CompressionConfig, Objective
from cerwu_gpu.container.matrix import encode_matrix
from cerwu_gpu.quantize.layer import quantize_stack
from cerwu_gpu.quantize.objective import upper_factor
from scripts.gradients import Gradients
from scripts.judge import Judge, at_bits, noted
from scripts.token_weights import floored

CASES = ("rows", "groups", "coupled:0.2", "coupled:0.35")
GROUPS = 8
"""Groups of rows, every eighth row in each."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all cases, and append a line to the JSON Lines file for each."""
    parser = argparse.ArgumentParser(prog="output_side", description="Rows that are coupled.")
    add = parser.add_argument
    add("wikitext", type=Path, help="folder with valid.txt and wiki.test.raw")
    add("cases", nargs="*", default=list(CASES), metavar="CASE", help=", ".join(CASES))
    add("-o", "--output", type=Path, required=True, metavar="FILE.jsonl")
    add("--bits", type=float, default=2.3)
    add("--stride", type=int, default=6, help="distance of the blocks that are quantized")
    add("--samples", type=int, default=24, help="calibration windows of 512 tokens")
    add("--windows", type=int, default=10, help="of each text that judges")
    arguments = parser.parse_args(argv)
    judge = Judge(arguments.wikitext, arguments.windows, dtype=torch.float32)
    tokens = judge.calibration(arguments.samples)
    gradients = Gradients(judge.loaded.model, tokens, arguments.stride, coupled=True)
    hessians, lmbda = gradients.hessians(), 1e-8
    for case in arguments.cases:
        if case == "rows":
            alphas = floored(gradients.all)

            def bits(lmbda: float, alphas: Mapping[str, Tensor] = alphas) -> float:
                return gradients.quantize(hessians, alphas, lmbda).bits

        else:
            kept = 1 - float(case.partition(":")[2]) if case.startswith("coupled") else 0.0
            bits = partial(_in_groups, gradients, hessians, kept)
        result = at_bits(arguments.bits, lmbda, bits, judge.quality)
        lmbda = result.lmbda
        noted({"case": case, "stride": arguments.stride} | result.row(), arguments.output)


@torch.no_grad()
def _in_groups(
    gradients: Gradients, hessians: Mapping[str, Tensor], kept: float, lmbda: float
) -> float:
    """Quantize all layers in groups of rows; return the bits per weight.

    Args:
        kept: share of A's entries off its diagonal.
    """
    config = CompressionConfig(objective=Objective(lmbda=lmbda), limit_columns=0)
    alphas = floored(gradients.all)
    coded = weights = 0
    for key, seen in gradients.inputs.items():
        for name in seen.names:
            gram = gradients.grams[name] * kept
            gram.diagonal().copy_(alphas[name])
            original = gradients.original[name].float()
            quantized = torch.zeros_like(original)
            for group in _groups(gram):
                error = original[group.before] - quantized[group.before]
                target = original[group.rows] + group.effect @ error
                (matrix,) = quantize_stack(
                    [target], hessians[key], config, [group.alpha], gradients.tokens
                ).matrices
                encoded = encode_matrix(matrix, 0.0)
                coded += 4 * len(encoded.words) + len(encoded.side)
                quantized[group.rows] = matrix.weight(torch.float32)
            weights += original.numel()
            gradients.put(name, quantized)
    return 8 * coded / weights


class _Group:
    """Rows that are quantized together.

    Attributes:
        rows, before: their numbers, and those of the rows that are quantized already.
        alpha: diagonal of S_g.
        effect: K_g [rows, rows before].
    """

    def __init__(self, rows: Tensor, before: Tensor, upper: Tensor) -> None:
        """Take the columns of these rows in A's factor R, A = R R^T, from row 0 of R on."""
        self.rows, self.before = rows, before
        square = upper[len(before) :]
        self.alpha = square.square().sum(dim=1).float()
        behind = upper[: len(before)].T
        self.effect = torch.linalg.solve_triangular(square.T, behind, upper=False).float()


def _groups(gram: Tensor) -> list[_Group]:
    """Return the groups of the rows of a matrix, by A [m, m] float32."""
    members = [torch.arange(first, len(gram), GROUPS) for first in range(GROUPS)]
    order = torch.cat(members)
    upper = upper_factor(gram[order][:, order].double())
    groups, first = [], 0
    for rows in members:
        last = first + len(rows)
        groups.append(_Group(rows, order[:first], upper[:last, first:last]))
        first = last
    return groups


if __name__ == "__main__":
    main()
