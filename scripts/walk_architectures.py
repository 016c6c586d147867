"""Compress a tiny model of every causal language model of transformers, load it by each door, and
print a table of the verdicts.

    python scripts/walk_architectures.py --json verdicts.jsonl
    python scripts/walk_architectures.py llama mixtral
"""

import argparse
import inspect
import json
import signal
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cerwu_gpu import CerwuError, compress, decompress, from_settings, load_compressed

VOCABULARY = 160
SECONDS = 120
"""Time limit of a family."""
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "dec_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_inner", "ffn_dim", "d_ff"), 56),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 56),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "sliding_window"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), VOCABULARY - 2),
    "eos_token_id": VOCABULARY - 1,
    "pad_token_id": 0,
    "hidden_size_per_layer_input": 8,
}
"""Sizes by the names that configurations give them."""
ALSO: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16},
    "ctrl": {"dff": 56},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "fuyu": {
        "text_config": {
            "model_type": "persimmon",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCABULARY},
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 16},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "recurrent_gemma": {"lru_width": 32, "block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 8],
        "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 8,
        "feed_forward_size": 56,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 4,
        "hash_seed": 1,
    },
    "xlm": {"emb_dim": 32},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "n_mamba_heads": 4,
        "mamba_d_state": 16,
        "adapter_rank": 8,
    },
}
"""Further settings of some families."""


OF_TOYS = ("token reached", "calibration tokens for", "no gradient reached", "its inputs are 0")
"""Words of events that a toy with random weights and a short text brings about."""


@dataclass(frozen=True)
class Verdict:
    """Verdict on a family: "works", "refused" or a fault, and the sentence."""

    family: str
    result: str
    why: str = ""


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters."""
    vocabulary = {chr(33 + i) if i < 90 else f"<{i}>": i for i in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    last = f"<{VOCABULARY - 1}>"
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="!", eos_token=last)


def tiny(family: str) -> Any:
    """Return a small configuration of a family."""
    return _tiny(CONFIG_MAPPING[family], ALSO.get(family, {}))


def _tiny(kind: Any, also: dict[str, Any]) -> Any:
    fields = set(inspect.signature(kind.__init__).parameters) | set(kind.attribute_map)
    fields |= set(getattr(kind, "__dataclass_fields__", ()))
    given = {name: value for name, value in SMALL.items() if name in fields}
    if "qk_rope_head_dim" in given:
        given.pop("head_dim", None)  # that of the rotary part
    if {"kv_lora_rank", "num_key_value_heads"} <= given.keys():
        given["num_key_value_heads"] = given["num_attention_heads"]  # latent ones are no groups
    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        if name in fields and part is not transformers.AutoConfig:
            given[name] = _tiny(part, {}).to_dict()
    return kind(**{**given, **also})


def made(family: str) -> Any:
    """Return a model of a family with random weights."""
    torch.manual_seed(11)
    model: Any = AutoModelForCausalLM.from_config(tiny(family)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
    return model


def stored(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors in a directory."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return found


def verdict(family: str, home: Path, text: Path) -> Verdict:
    """Take a family through everything."""
    try:
        model = made(family)
    except Exception as error:
        return Verdict(family, "not built", f"{type(error).__name__}: {error}".split("\n")[0])
    source = home / "source"
    model.save_pretrained(source)
    tokenizer().save_pretrained(source)
    settings = {"samples": 6, "sequence_length": 32, "lmbda": 1e-5, "calibration": str(text)}
    try:
        report = compress(
            str(source), home / "small", config=from_settings(**settings), progress=False
        )
    except CerwuError as error:
        return Verdict(family, "refused", str(error).replace(str(source), "the model"))
    refusals: list[str] = []
    faults = list(_faults(home, source, refusals))
    told = [event for event in report.events if not any(words in event for words in OF_TOYS)]
    return Verdict(family, "; ".join(faults) or "works", "; ".join([*told, *refusals]))


def _faults(home: Path, source: Path, refusals: list[str]) -> Iterator[str]:
    tokens = torch.arange(1, 25)[None]
    ours = load_compressed(home / "small").eval()
    theirs = AutoModelForCausalLM.from_pretrained(home / "small").eval()
    decompress(home / "small", home / "plain")
    plain = AutoModelForCausalLM.from_pretrained(home / "plain").eval()
    theirs.save_pretrained(home / "saved")
    others = {"from_pretrained": theirs, "decompress": plain}
    try:
        others["resident"] = load_compressed(home / "small", resident="compressed")
    except CerwuError as error:
        refusals.append(f"resident: {error}")
    with torch.no_grad():
        expected = ours(tokens, use_cache=False).logits
        for door, model in others.items():
            if not torch.equal(model(tokens, use_cache=False).logits, expected):
                yield f"{door}: other logits"
    for folder in ("plain", "saved"):
        if stored(home / folder) != stored(source):
            lost = stored(source).keys() - stored(home / folder).keys()
            yield f"{folder}: other names or shapes ({min(lost, default='')})"


def _late(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def walk(families: list[str]) -> Iterator[Verdict]:
    """Yield the verdict of each family."""
    signal.signal(signal.SIGALRM, _late)
    for family in families:
        with tempfile.TemporaryDirectory() as name:
            home = Path(name)
            generator = torch.Generator().manual_seed(1)
            letters = torch.randint(0, 88, (80, 60), generator=generator)
            lines = ["".join(chr(33 + int(i)) for i in row) for row in letters]
            (home / "text.txt").write_text("\n".join(lines), encoding="utf-8")
            signal.alarm(SECONDS)
            try:
                yield verdict(family, home, home / "text.txt")
            except TimeoutError as error:
                yield Verdict(family, "not finished", f"{error}")
            except Exception as error:
                what = f"{type(error).__name__}: {error}".split("\n")[0]
                yield Verdict(family, "fails", what.replace(str(home), ""))
            finally:
                signal.alarm(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="model types; default: all")
    parser.add_argument("--json", type=Path, help="file for the verdicts, one a line")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    verdicts = []
    for one in walk(given.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        verdicts.append(one)
        print(f"{one.family}: {one.result} {one.why}", flush=True)
        if given.json is not None:
            with given.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(vars(one)) + "\n")
    works = sum(one.result == "works" for one in verdicts)
    print(f"{works} of {len(verdicts)} work")


if __name__ == "__main__":
    main()
