"""Compare treatments of drift: none, a fixed share of the correction, or a share for each layer.

    python scripts/drift_shares.py WIKITEXT -o FILE.jsonl

Behind compressed blocks a layer sees X_hat in place of X. The correction of its target is
W D, D = (G - H_hat) H_hat^-1, G = E[X X_hat^T]. The cases:

- none: H of X, no correction;
- quarter: H of X_hat, a quarter of the correction;
- fitted: the share is the one with the least error on tokens that did not make the correction
  (two halves of the sequences, each the judge of the other's), in closed form;
- residual: as fitted, and o_proj and down_proj also answer for the error R - R_hat that the
  residual stream has already: E[(R - R_hat) X_hat^T] H_hat^-1 joins the correction.

Layers of the first blocks are quantized, all at one lmbda; bits are next to equal.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from cerwu_gpu.config import CompressionConfig, Objective
from cerwu_gpu.container.matrix import encode_matrix
from cerwu_gpu.quantize.layer import quantize_stack
from cerwu_gpu.quantize.objective import DRIFT_DAMPING, DRIFT_SHARE, damp, solve
from scripts.gradients import Gradients
from scripts.judge import Judge, noted
from scripts.token_weights import floored

CASES = ("none", "quarter", "fitted", "residual")
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Layers of a block that share an input."""
ENDS = {"self_attn.o_proj": 0, "mlp.down_proj": 1}
"""Layers that write into the residual stream, and the place of what it holds before them."""


@dataclass
class Watched:
    """Inputs [tokens, n] of each group of a block, and the residual stream before both its ends."""

    inputs: list[Tensor]
    residual: list[Tensor]


class Stream:
    """Hidden states of all sequences in front of a block, with the arguments of the blocks."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self.hidden: list[Tensor] = []
        self.keywords: dict[str, Any] = {}
        first = model.model.layers[0]

        def note(_: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
            keywords = dict(keywords)
            hidden = arguments[0] if arguments else keywords.pop("hidden_states")
            self.hidden.append(hidden.detach())
            self.keywords = keywords

        hook = first.register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad():
            for ids in tokens:
                model.model(input_ids=ids[None], use_cache=False)
        hook.remove()

    @torch.no_grad()
    def watched(self, block: Any, number: int) -> tuple[Watched, Tensor]:
        """Return the inputs in the block for one sequence, and its output."""
        inputs: list[Tensor] = [torch.empty(0)] * len(GROUPS)
        residual = [self.hidden[number][0], torch.empty(0)]
        hooks = []
        for place, names in enumerate(GROUPS):

            def note(_: nn.Module, arguments: Any, place: int = place) -> None:
                inputs[place] = arguments[0][0].float()

            hooks.append(block.get_submodule(names[0]).register_forward_pre_hook(note))

        def between(_: nn.Module, arguments: Any) -> None:
            residual[1] = arguments[0][0]

        hooks.append(block.post_attention_layernorm.register_forward_pre_hook(between))
        output = block(self.hidden[number], **self.keywords)
        for hook in hooks:
            hook.remove()
        output = output[0] if isinstance(output, tuple) else output
        return Watched(inputs, [x.float() for x in residual]), output


class Moments:
    """Sums over the two halves of the sequences, of one group."""

    def __init__(self) -> None:
        self.hessian: list[Any] = [0.0, 0.0]
        self.cross: list[Any] = [0.0, 0.0]
        self.residual: list[Any] = [0.0, 0.0]
        self.plain: Any = 0.0

    def add(self, half: int, x: Tensor, x_hat: Tensor, r: Tensor | None) -> None:
        """Add a sequence: inputs [tokens, n], and the residual stream's error [tokens, d]."""
        self.plain = self.plain + x.T @ x
        self.hessian[half] = self.hessian[half] + x_hat.T @ x_hat
        self.cross[half] = self.cross[half] + x.T @ x_hat
        if r is not None:
            self.residual[half] = self.residual[half] + r.T @ x_hat

    def wanted(self, weight: Tensor, half: int | None, residual: bool) -> tuple[Tensor, Tensor]:
        """Return E[(W (X - X_hat) + R - R_hat) X_hat^T] and H_hat, of a half or of all."""
        halves = (0, 1) if half is None else (half,)
        hessian = sum(self.hessian[i] for i in halves)
        difference = weight @ (sum(self.cross[i] for i in halves) - hessian)
        if residual:
            difference = difference + sum(self.residual[i] for i in halves)
        return difference, hessian


def correction(difference: Tensor, hessian: Tensor) -> Tensor:
    """Return difference H_hat^-1 with the damping of the package."""
    damped = damp(hessian, DRIFT_DAMPING, "mean")
    return solve(damped, difference.T.double()).T.float()


def fitted_share(weight: Tensor, moments: Moments, residual: bool) -> float:
    """Return the share of each half's correction that serves the other half best."""
    gain = power = 0.0
    for half in (0, 1):
        delta = correction(*moments.wanted(weight, half, residual))
        difference, hessian = moments.wanted(weight, 1 - half, residual)
        gain += float((delta * difference).sum())
        power += float(((delta @ hessian) * delta).sum())
    return min(max(gain / power, 0.0), 1.0) if power > 0 else 0.0


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all cases, and append a line to the JSON Lines file for each."""
    parser = argparse.ArgumentParser(prog="drift_shares", description="Treatments of drift.")
    add = parser.add_argument
    add("wikitext", type=Path, help="folder with valid.txt and wiki.test.raw")
    add("cases", nargs="*", default=list(CASES), metavar="CASE", help=", ".join(CASES))
    add("-o", "--output", type=Path, required=True, metavar="FILE.jsonl")
    add("--lmbda", type=float, default=1e-8)
    add("--blocks", type=int, default=10, help="number of first blocks that are quantized")
    add("--samples", type=int, default=24, help="calibration windows of 512 tokens")
    add("--windows", type=int, default=20, help="of each text that judges")
    add("--full-precision", action="store_true", help="float32, faster on many CPUs")
    arguments = parser.parse_args(argv)
    dtype = torch.float32 if arguments.full_precision else torch.bfloat16
    judge = Judge(arguments.wikitext, arguments.windows, dtype=dtype)
    model: Any = judge.loaded.model
    tokens = judge.calibration(arguments.samples)
    alphas = floored(Gradients(model, tokens[:8]).few)
    config = CompressionConfig(objective=Objective(lmbda=arguments.lmbda), limit_columns=0)
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    for case in arguments.cases:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(originals[name])
        plain, drifted = Stream(model, tokens), Stream(model, tokens)
        coded = weights = 0
        shares: dict[str, list[float]] = {names[0]: [] for names in GROUPS}
        for index, block in enumerate(model.model.layers[: arguments.blocks]):
            moments = [Moments() for _ in GROUPS]
            for number in range(len(tokens)):
                seen, output = plain.watched(block, number)
                behind = seen if case == "none" else drifted.watched(block, number)[0]
                plain.hidden[number] = output
                for place, names in enumerate(GROUPS):
                    end = ENDS.get(names[0])
                    error = None
                    if end is not None and case == "residual":
                        error = seen.residual[end] - behind.residual[end]
                    x, x_hat = seen.inputs[place], behind.inputs[place]
                    moments[place].add(number % 2, x, x_hat, error)
            for place, names in enumerate(GROUPS):
                layers = [block.get_submodule(name) for name in names]
                given = [layer.weight.detach().float() for layer in layers]
                weight, seen_by = torch.cat(given), moments[place]
                residual = case == "residual" and names[0] in ENDS
                hessian = seen_by.hessian[0] + seen_by.hessian[1]
                if case == "none":
                    target = weight
                else:
                    share = DRIFT_SHARE
                    if case != "quarter":
                        share = fitted_share(weight, seen_by, residual)
                    shares[names[0]].append(share)
                    target = weight + share * correction(*seen_by.wanted(weight, None, residual))
                targets = list(torch.split(target, [len(x) for x in given]))
                rows = [alphas[f"model.layers.{index}.{name}"] for name in names]
                hessian = hessian * (2 / tokens.numel())
                result = quantize_stack(targets, hessian, config, rows, tokens.numel())
                for layer, matrix in zip(layers, result.matrices, strict=True):
                    encoded = encode_matrix(matrix, 0.0)
                    coded += 4 * len(encoded.words) + len(encoded.side)
                    weights += layer.weight.numel()
                    with torch.no_grad():
                        layer.weight.copy_(matrix.weight(torch.bfloat16))
            if case != "none":
                for number in range(len(tokens)):
                    drifted.hidden[number] = drifted.watched(block, number)[1]
        quality = {name: x._asdict() for name, x in judge.quality().items()}
        row = {"case": case, "blocks": arguments.blocks, "bits": 8 * coded / weights}
        noted(row | {"lmbda": arguments.lmbda, "shares": shares} | quality, arguments.output)


if __name__ == "__main__":
    main()
