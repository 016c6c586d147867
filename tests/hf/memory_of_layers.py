"""Print the anonymous memory after sensitivities of toys that stay on disk, which differ in their
number of blocks: `python -m tests.hf.memory_of_layers FOLDER 2 8` prints a JSON list of bytes.

Each one is measured in a fork of one process, so that nothing is imported more than once.
"""

import json
import os
import sys
from pathlib import Path

import torch

import cerwu_gpu.api  # noqa: F401  # before the forks
from cerwu_gpu import CompressionConfig
from cerwu_gpu.config import Batches
from cerwu_gpu.hf.causal_lm import CausalLM
from cerwu_gpu.hf.kinds import load_kind
from scripts.streaming_memory import anonymous_bytes
from tests.hf.toys import VOCABULARY, toy

SIZES = {"hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 256}


def added(model: Path) -> int:
    """Return the bytes that stay when a model's sensitivities are computed."""
    torch.set_num_threads(1)
    tokens = torch.randint(VOCABULARY, (4, 256), generator=torch.Generator().manual_seed(0))
    config = CompressionConfig(calibration=Batches(inputs=[tokens]))
    adapter = CausalLM(load_kind(model, stream=True)[1], config, device=torch.device("cpu"))
    adapter.calibrate(config)
    before = anonymous_bytes()
    adapter.sensitivities(config)
    return anonymous_bytes() - before


def main() -> None:
    """Make each toy in one process, measure it in another one, and print."""
    folder, *numbers = sys.argv[1:]
    results = []
    for number in numbers:
        model, result = Path(folder) / f"model-{number}", Path(folder) / f"{number}.json"
        if os.fork() == 0:
            toy("llama", num_hidden_layers=int(number), **SIZES).save_pretrained(model)
            os._exit(0)
        os.wait()
        if os.fork() == 0:
            result.write_text(json.dumps(added(model)))
            os._exit(0)
        os.wait()
        results.append(json.loads(result.read_text()))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
