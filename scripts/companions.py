"""Measure what JSON without blanks saves of a compressed directory, and that nothing else changes.

    python scripts/companions.py MODEL TEXT... -o scripts/results/companions.json

MODEL is compressed with `--effort fast`. Beside the result a second directory gets the same
weights, and the files around them as transformers writes them, with blanks. The texts must have
the same tokens in both, and the first of these the same logits.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cerwu_gpu import compress, load_compressed
from cerwu_gpu.compression.run import directory_bytes
from cerwu_gpu.config import from_settings
from cerwu_gpu.files import read_json, write_text

LOGITS = 512
"""Number of tokens whose logits are compared."""
SETTINGS = ("config.json", "generation_config.json")


def with_blanks(compact: Path, folder: Path) -> None:
    """Write a copy of a compressed directory whose JSON is as transformers writes it."""
    shutil.copytree(compact, folder)
    AutoTokenizer.from_pretrained(compact).save_pretrained(folder)
    for name in SETTINGS:
        if (folder / name).exists():
            content = json.dumps(read_json(folder / name), indent=2, sort_keys=True)
            write_text(folder / name, content + "\n")


@torch.no_grad()
def first_logits(folder: Path, ids: list[int]) -> Tensor:
    """Return the logits [1, LOGITS, vocabulary] of a directory's model for the first tokens."""
    logits: Tensor = load_compressed(folder)(torch.tensor([ids[:LOGITS]])).logits
    return logits


def tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of texts."""
    return [tokenizer(text).input_ids for text in texts]


def sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file of a directory."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the JSON file, and return 1 where tokens or logits differ."""
    parser = argparse.ArgumentParser(prog="companions", description="JSON with and without blanks.")
    add = parser.add_argument
    add("model", type=Path)
    add("texts", type=Path, nargs="+", metavar="TEXT")
    add("-o", "--output", type=Path, required=True, metavar="FILE.json")
    arguments = parser.parse_args(argv)
    texts = [path.read_text(encoding="utf-8") for path in arguments.texts]
    with tempfile.TemporaryDirectory() as work:
        small, before = Path(work) / "small", Path(work) / "before"
        config = from_settings(effort="fast")
        report = compress(arguments.model, small, config=config, progress=False)
        with_blanks(small, before)
        ids = [tokens(AutoTokenizer.from_pretrained(x), texts) for x in (small, before)]
        same_logits = torch.equal(*(first_logits(x, ids[0][0]) for x in (small, before)))
        content = {
            "model": arguments.model.name,
            "lmbda": report.lmbda,
            "bits_per_weight": report.bits_per_weight,
            "bytes": directory_bytes(small),
            "bytes_with_blanks": directory_bytes(before),
            "share_saved": 1 - directory_bytes(small) / directory_bytes(before),
            "files": sizes(small),
            "files_with_blanks": sizes(before),
            "tokens": sum(map(len, ids[0])),
            "same_tokens": ids[0] == ids[1],
            "same_logits": same_logits,
        }
    write_text(arguments.output, json.dumps(content, indent=1) + "\n")
    return 0 if content["same_tokens"] and content["same_logits"] else 1


if __name__ == "__main__":
    sys.exit(main())
