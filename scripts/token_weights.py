"""Measure whether tokens should count by their gradients, and how many give the sensitivities.

    python scripts/token_weights.py WIKITEXT -o FILE.jsonl

The cases: H of equal tokens, or with token t weighted by |g_t|^power, g_t the gradient of the
sequence's loss at the outputs of the matrices that see it, normalised to a mean of 1 and at least
0.05; sensitivities of the first 4,096 calibration tokens, or of all. All are compared at equal
bits of the blocks' weights, with head and embedding kept and drift left alone.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch import Tensor

from cerwu_gpu.quantize.sensitivity import FLOOR
from scripts.gradients import FEW, Gradients
from scripts.judge import Judge, at_bits, noted


def floored(alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return sensitivities of at least a share of their layer's mean, as `row` has them."""
    return {name: x.clamp_min(FLOOR * x.mean()) for name, x in alphas.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all cases, and append a line to the JSON Lines file for each."""
    parser = argparse.ArgumentParser(prog="token_weights", description="What a token counts.")
    add = parser.add_argument
    add("wikitext", type=Path, help="folder with valid.txt and wiki.test.raw")
    add("-o", "--output", type=Path, required=True, metavar="FILE.jsonl")
    add("--powers", type=float, nargs="+", default=[0.0, 1.0, 2.0])
    add("--bits", type=float, default=2.3)
    add("--lmbda", type=float, default=1e-8, help="of the first search")
    add("--samples", type=int, default=24, help="calibration windows of 512 tokens")
    add("--stride", type=int, default=1, help="distance of the blocks that are quantized")
    add("--windows", type=int, default=20, help="of each text that judges")
    arguments = parser.parse_args(argv)
    judge = Judge(arguments.wikitext, arguments.windows)
    tokens = judge.calibration(arguments.samples)
    gradients = Gradients(judge.loaded.model, tokens, arguments.stride, weighted=True)
    cases = [
        (power, count, floored(alphas))
        for power in arguments.powers
        for alphas, count in ((gradients.few, FEW), (gradients.all, len(tokens)))
    ]
    lmbda, hessians = arguments.lmbda, {}
    for number, (power, count, alphas) in enumerate(cases):
        if number % 2 == 0:
            hessians = gradients.hessians(power)

        def quantize(
            lmbda: float,
            hessians: Mapping[str, Tensor] = hessians,
            alphas: Mapping[str, Tensor] = alphas,
        ) -> float:
            return gradients.quantize(hessians, alphas, lmbda).bits

        measured = at_bits(arguments.bits, lmbda, quantize, judge.quality)
        lmbda = measured.lmbda
        case = {"power": power, "sensitivity_tokens": count * tokens.shape[1]}
        noted(case | {"stride": arguments.stride} | measured.row(), arguments.output)


if __name__ == "__main__":
    main()
