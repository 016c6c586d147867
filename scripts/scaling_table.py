"""The table of docs/scaling.md: what `cerwu-gpu plan` predicts for models of four sizes.

Their configurations are written here, with the published sizes of Llama-3.1-8B and -70B,
Qwen3-235B-A22B and DeepSeek-V3; no weights are needed:

    python scripts/scaling_table.py
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import DeepseekV3Config, LlamaConfig, Qwen3MoeConfig

from cerwu_gpu.config import from_settings
from cerwu_gpu.hf.plan import outline, plan

BITS = 3.0
RANKS = (1, 8, 16)
LLAMA: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "dtype": "bfloat16"}
CONFIGS = {
    "8B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        **LLAMA,
    ),
    "70B": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        **LLAMA,
    ),
    "235B-A22B": Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=4096,
        num_hidden_layers=94,
        num_attention_heads=64,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=1536,
        dtype="bfloat16",
    ),
    "671B": DeepseekV3Config(dtype="bfloat16"),  # the defaults are DeepSeek-V3's sizes
}


def lines() -> Iterator[str]:
    """Yield the lines of the table."""
    settings = from_settings(calibration="wikitext2")
    head = ("model", "processes", "memory of a process, GB", "sent by one, GB", "file, GB")
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(Path(folder))
            known = outline(folder, settings)
        for ranks in RANKS:
            result = plan(known, settings, ranks=ranks, bits=BITS)
            numbers = (result.peak, max(result.sent), result.file_bytes)
            cells = " | ".join(f"{number / 1e9:,.0f}" for number in numbers)
            yield f"| {name} | {ranks} | {cells} |"


if __name__ == "__main__":
    for line in lines():
        print(line, flush=True)
