"""Compare what sensitivities predict for each kind of layer with the divergence it really causes.

    python scripts/allocation.py WIKITEXT -o FILE.jsonl

Each kind alone is quantized at two rates. With a squared gradient that is exact, and errors that
are small and independent, KL(original || compressed) would be half the sum over outputs of squared
gradient times squared error. The factor of a kind is the measured KL over that, a geometric mean
over both rates, of each text. In the end all layers are quantized at equal bits, without factors
and with those of one text, judged on both texts.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch import Tensor

from scripts.gradients import BLOCK, Gradients
from scripts.judge import Judge, at_bits, noted
from scripts.token_weights import floored

PARTS = {
    "q_proj": "q, k",
    "k_proj": "q, k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate, up",
    "up_proj": "gate, up",
    "down_proj": "down",
}
LMBDAS = (3e-9, 3e-8)
"""The two rates: about 3 and 2 bits."""


def kind_of(name: str, blocks: int) -> str:
    """Return the kind of a layer by its name."""
    place = BLOCK.search(name)
    assert place is not None
    ends = {0: "first block", blocks - 1: "last block"}
    return ends.get(int(place[1])) or PARTS[name.rpartition(".")[2]]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all kinds and then the factors, and append a line to the JSON Lines file for each."""
    parser = argparse.ArgumentParser(prog="allocation", description="Predicted and measured KL.")
    add = parser.add_argument
    add("wikitext", type=Path, help="folder with valid.txt and wiki.test.raw")
    add("-o", "--output", type=Path, required=True, metavar="FILE.jsonl")
    add("--bits", type=float, default=2.3, help="of the comparison in the end")
    add("--samples", type=int, default=24, help="calibration windows of 512 tokens")
    add("--probing", type=int, default=4, help="windows of each text that judge a kind")
    add("--windows", type=int, default=20, help="of each text that judge in the end")
    arguments = parser.parse_args(argv)
    judge = Judge(arguments.wikitext, arguments.windows)
    model = judge.loaded.model
    gradients = Gradients(model, judge.calibration(arguments.samples))
    hessians, alphas = gradients.hessians(), floored(gradients.few)
    kinds = {name: kind_of(name, model.config.num_hidden_layers) for name in gradients.original}
    factors: dict[str, dict[str, float]] = {name: {} for name in judge.windows}
    for kind in dict.fromkeys(kinds.values()):
        logs = dict.fromkeys(judge.windows, 0.0)
        for lmbda in LMBDAS:

            def alone(name: str, kind: str = kind) -> bool:
                return kinds[name] == kind

            done = gradients.quantize(hessians, alphas, lmbda, alone)
            quality = judge.quality(arguments.probing)
            measured = {name: x.kl for name, x in quality.items()}
            for name, kl in measured.items():
                logs[name] += math.log(kl / done.loss) / len(LMBDAS)
            row = {"kind": kind, "lmbda": lmbda, "bits": done.bits, "predicted": done.loss}
            noted(row | {"kl": measured}, arguments.output)
        for name, total in logs.items():
            factors[name][kind] = math.exp(total)
    noted({"factors": factors}, arguments.output)
    lmbda = 1e-8
    none = dict.fromkeys(kinds.values(), 1.0)
    for title, known in {"none": none, **factors}.items():
        weighed = {name: alpha * known[kinds[name]] for name, alpha in alphas.items()}
        measure = partial(_bits, gradients, hessians, weighed)
        result = at_bits(arguments.bits, lmbda, measure, judge.quality)
        lmbda = result.lmbda
        noted({"factors of": title} | result.row(), arguments.output)


def _bits(
    gradients: Gradients,
    hessians: Mapping[str, Tensor],
    alphas: Mapping[str, Tensor],
    lmbda: float,
) -> float:
    return gradients.quantize(hessians, alphas, lmbda).bits


if __name__ == "__main__":
    main()
