"""A tiny randomly initialised model of each family that docs/models.md names."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 320
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
"""With grouped-query attention: k and v have fewer rows than q."""
WINDOW: dict[str, Any] = {"sliding_window": 8, "head_dim": 8}
"""Every other block sees only 8 tokens back, so that masks differ between blocks."""
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
    "gpt_neox_serial": lambda: GPTNeoXConfig(**SIZES, use_parallel_residual=False),
    "llama": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=8),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=8),
    "gemma2": lambda: Gemma2Config(**GROUPED, **WINDOW, layer_types=MIXED),
    "gemma3": lambda: Gemma3TextConfig(**GROUPED, **WINDOW, layer_types=MIXED),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128, bos_token_id=0
    ),
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "opt_projected": lambda: OPTConfig(
        **SIZES, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    "phi": lambda: PhiConfig(**SIZES),
    "falcon": lambda: FalconConfig(**SIZES, new_decoder_architecture=False, alibi=False),
    "bloom": lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4),
    "mixtral": lambda: MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **GROUPED,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **GROUPED, **WINDOW, num_local_experts=4, num_experts_per_tok=2, layer_types=MIXED
    ),
}
FAMILIES = tuple(CONFIGS)
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")


def toy(family: str, **changes: Any) -> PreTrainedModel:
    """A model of this family, float32, in eval mode; the same weights every time."""
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            # The usual spread of 0.02 leaves tiny models almost linear, and biases zero.
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def toy_tokens(samples: int = 5, sequence_length: int = 24) -> torch.Tensor:
    """int64 [samples, sequence_length], random, the same every time."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(VOCABULARY, (samples, sequence_length), generator=generator)
