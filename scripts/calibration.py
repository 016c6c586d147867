"""Measure what calibrates best: texts, their shares, their first token, the damping.

    python scripts/calibration.py WIKITEXT STORIES.txt -o FILE.jsonl wiki wiki+self wiki+python

WIKITEXT is a folder with valid.txt and wiki.test.raw of WikiText-2. A case is one or two of the
texts wiki, python (Python's documentation), stories and self (text that the model writes), in equal
shares of 24 windows of 512 tokens. Every other block of the model of scripts/demo.py is quantized,
in bfloat16, without correction of drift; KL(original || compressed) judges it, on windows
of wiki.test.raw, Python's documentation and the stories that calibrated nothing.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from torch.nn import functional

from cerwu_gpu.compression.pipeline import stack_sensitivities, stacks
from cerwu_gpu.config import CompressionConfig, Objective, Source, Text
from cerwu_gpu.container.matrix import encode_matrix
from cerwu_gpu.hf.causal_lm import CausalLM
from cerwu_gpu.hf.models import LoadedModel, load_model
from cerwu_gpu.hf.sources import Windows, calibration_tokens
from cerwu_gpu.hf.text import SELF, CalibrationTokens, demo_text, load_text
from cerwu_gpu.quantize.layer import quantize_stack
from scripts.demo import model_file

SAMPLES, LENGTH, JUDGING = 24, 512, 6
"""Windows that calibrate, their tokens, and windows of each text that judge."""
STRIDE = 2
"""Distance of the blocks that are quantized."""
BATCH = 4


class Subject:
    """The model, its texts and the predictions of its original weights."""

    def __init__(self, wikitext: Path, stories: Path) -> None:
        self.loaded: LoadedModel = load_model(model_file(), dtype=torch.bfloat16)
        documentation, rest = demo_text()
        self.texts: dict[str, str | Text] = {
            "wiki": Text(load_text(str(wikitext / "valid.txt"))),
            "python": Text(documentation),
            "stories": Text(load_text(str(stories))),
            "self": SELF,
        }
        test = Text(load_text(str(wikitext / "wiki.test.raw")))
        self.judging = {
            "wiki": self.tokens([test], JUDGING).tokens,
            "python": self.tokens([Text(rest)], JUDGING).tokens,
            "stories": self.tokens([self.texts["stories"]], SAMPLES, JUDGING).held_out,
        }
        self.original = {name: self.hidden(x) for name, x in self.judging.items()}

    def tokens(
        self, texts: Sequence[str | Text], samples: int, held_out: int = 0
    ) -> CalibrationTokens:
        """Return windows of texts, in equal shares."""
        windows = Windows(
            samples=samples, sequence_length=LENGTH, seed=0, batch_size=SAMPLES, held_out=held_out
        )
        sources = [Source(text, 1 / len(texts)) for text in texts]
        return calibration_tokens(sources, self.loaded.model, self.loaded.tokenizer, windows)

    @torch.no_grad()
    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the last hidden states [samples, sequence, d]."""
        base: Any = self.loaded.model.base_model
        parts = [base(input_ids=x, use_cache=False)[0] for x in torch.split(tokens, BATCH)]
        return torch.cat(parts)

    @torch.no_grad()
    def divergence(self, name: str) -> float:
        """Return KL(original || compressed) per predicted token, in nats."""
        head: Any = self.loaded.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        total, count = 0.0, 0
        pairs = zip(self.original[name], self.hidden(self.judging[name]), strict=True)
        for before, after in pairs:
            log_p, log_q = (head(x[:-1]).float().log_softmax(-1) for x in (before, after))
            total += float(functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
            count += len(log_p)
        return total / count

    @contextmanager
    def restored(self, names: Sequence[str]) -> Iterator[None]:
        """Put the original weights back at the end."""
        before = {name: self.loaded.model.get_parameter(name).detach().clone() for name in names}
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in before.items():
                    self.loaded.model.get_parameter(name).copy_(weight)

    def measure(self, tokens: Tensor, lmbda: float, damping: float | None) -> dict[str, Any]:
        """Quantize the blocks and return bits per weight and divergences."""
        blocks: Any = self.loaded.model.get_submodule("model.layers")
        config = CompressionConfig(
            objective=Objective(lmbda=lmbda, damping=damping),
            drift="ignore",
            keep_head=True,
            limit_columns=0,
            include=tuple(f"model.layers.{i}.*" for i in range(0, len(blocks), STRIDE)),
        )
        adapter = CausalLM(self.loaded, config, device=torch.device("cpu"))
        adapter.take(CalibrationTokens(tokens, tokens[:0]))
        sensitivities = adapter.sensitivities(config)
        bits = weights = 0
        with self.restored(list(adapter.layouts)):
            for block in adapter.blocks(config):
                statistics = block.statistics()
                for stack in stacks(block.matrices()):
                    seen = statistics[stack[0].input]
                    alphas = stack_sensitivities(stack, statistics, config, sensitivities)
                    given = [matrix.weight for matrix in stack]
                    result = quantize_stack(given, seen.hessian, config, alphas, seen.rows_seen)
                    for matrix, quantized in zip(stack, result.matrices, strict=True):
                        encoded = encode_matrix(quantized, 0.0)
                        bits += 8 * (4 * len(encoded.words) + len(encoded.side))
                        weights += matrix.weight.numel()
                        block.replace(matrix.name, 0, quantized.weight(torch.bfloat16).float())
            divergences = {name: self.divergence(name) for name in self.judging}
        return {"bits": bits / weights, "kl": divergences}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the cases, and append a line to the JSON Lines file for each."""
    parser = argparse.ArgumentParser(prog="calibration", description="What calibrates best.")
    add = parser.add_argument
    add("wikitext", type=Path, help="folder with valid.txt and wiki.test.raw")
    add("stories", type=Path, help="text file of stories")
    add("cases", nargs="+", metavar="CASE", help="wiki, python, stories, self, or two with a +")
    add("-o", "--output", type=Path, required=True, metavar="FILE.jsonl")
    add("--lmbda", type=float, nargs="+", default=[1e-8])
    add("--damping", type=float, nargs="+", default=[None], help="default: by the tokens")
    arguments = parser.parse_args(argv)
    subject = Subject(arguments.wikitext, arguments.stories)
    for case in arguments.cases:
        tokens = subject.tokens([subject.texts[name] for name in case.split("+")], SAMPLES).tokens
        for lmbda in arguments.lmbda:
            for damping in arguments.damping:
                row = {"case": case, "lmbda": lmbda, "damping": damping}
                row |= subject.measure(tokens, lmbda, damping)
                line = json.dumps(row)
                print(line, flush=True)
                with arguments.output.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
