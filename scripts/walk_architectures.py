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
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cerwu_gpu import CerwuError, compress, decompress, from_settings, load_compressed
from cerwu_gpu.hf.kinds import kind_of

VOCABULARY = 160
SECONDS = 120
"""Limit of a family [s of the processor]."""
CLASSES = {
    "emu3": "Emu3ForConditionalGeneration",
    "mllama": "MllamaForConditionalGeneration",
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
}
"""Classes of the checkpoints of families whose causal class transformers does not build, or does
not load again, from the configuration of the family."""
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
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("index_n_heads", "index_num_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("index_head_dim", "swa_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("shared_experts_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("expert_ffn_hidden_size", "dense_intermediate_size"), 16),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "conf_num_hidden_layers"), 2),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size"), 32),
    **dict.fromkeys(("shape_vocab_size", "pronunciation_vocab_size"), 20),
    **dict.fromkeys(("shape_embed_dim", "pronunciation_embed_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 4),
    "swa_num_attention_heads": 4,
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), VOCABULARY - 2),
    "eos_token_id": VOCABULARY - 1,
    "pad_token_id": 0,
    "hidden_size_per_layer_input": 8,
}
"""Sizes by the names that configurations give them."""
ALSO: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16},
    "blt": {
        "encoder_hash_byte_group_vocab": 20,
        "global_config": {"num_hidden_layers": 4},
        "decoder_config": {"hidden_size_global": 32},
        "encoder_config": {"hidden_size_global": 32},
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "cpmant": {
        **{"dim_ff": 56, "dim_head": 8, "position_bias_num_buckets": 8},
        **{"position_bias_max_distance": 64, "prompt_types": 4, "prompt_length": 4},
        "segment_types": 3,
    },
    "ctrl": {"dff": 56},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": [
            "sliding_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        **{"o_groups": 2, "o_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 8},
        **{"index_topk": 2, "hc_mult": 2, "num_key_value_heads": 1, "head_dim": 16},
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "dots3_note": {
        "vision_config": {
            "pyramid_num_routed": [-1, 4],
            **{"adapter_in_dim": 32, "adapter_out_dim": 32},
        },
        "audio_config": {
            **{"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
            "feature_size": 16,
        },
        "text_config": {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2},
    },
    "emu3": {
        "vocabulary_map": {
            **{"<|extra_200|>": 150, "<image>": 151},
            **{f"<|visual token {i:06}|>": 152 + i for i in range(4)},
        },
        "vq_config": {
            **{"codebook_size": 4, "base_channels": 32, "channel_multiplier": [1]},
            **{"num_res_blocks": 1, "embed_dim": 4},
        },
    },
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "fuyu": {"text_config": {"model_type": "persimmon"}},
    "gemma3": {"vision_config": {"image_size": 32, "patch_size": 8}, "mm_tokens_per_image": 4},
    "gemma3n": {
        "text_config": {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "laurel_rank": 8,
        },
        "audio_config": {
            **{"conf_num_hidden_layers": 2, "conf_num_attention_heads": 4},
            **{"input_feat_size": 16, "sscp_conv_channel_size": [8, 4]},
        },
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
    },
    "gemma4": {
        "audio_config": {"subsampling_conv_channels": [8, 4], "output_proj_dims": 32},
        "text_config": {"global_head_dim": 8},
        "vision_config": {"position_embedding_size": 64, "patch_size": 4},
    },
    "gemma4_assistant": {
        "text_config": {
            **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
            "global_head_dim": 8,
        },
        "backbone_hidden_size": 32,
    },
    "gemma4_unified": {
        "audio_config": {"audio_embed_dim": 16},
        "text_config": {"global_head_dim": 8},
        "vision_config": {
            **{"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32},
            "patch_size": 2,
        },
    },
    "gemma4_text": {"global_head_dim": 8},
    "gemma4_unified_text": {"global_head_dim": 8},
    "gemma4_unified_assistant": {
        "text_config": {"global_head_dim": 8},
        "backbone_hidden_size": 32,
    },
    "got_ocr2": {
        "vision_config": {
            **{"image_size": 64, "mlp_dim": 56, "output_channels": 8, "global_attn_indexes": [1]},
        },
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4},
    "inkling_text": {
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8},
        **{"d_rel": 4, "rel_extent": 32, "local_layer_ids": [0]},
    },
    "inkling2_loop_text": {"unpadded_vocab_size": VOCABULARY},
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {
        **{"linear_head_dim": 8, "linear_num_heads": 4},
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 16},
    "mllama": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {
            **{"image_size": 28, "num_global_layers": 1, "attention_heads": 4},
            **{"intermediate_layers_indices": [0], "vision_output_dim": 64},
        },
    },
    "moshi": {"audio_vocab_size": VOCABULARY, "num_codebooks": 2},
    "moss_transcribe_diarize": {"audio_config": {"num_mel_bins": 16, "max_source_positions": 32}},
    "musicgen": {"audio_encoder": {"num_filters": 2, "codebook_size": 16}},
    "musicgen_melody": {"audio_encoder": {"num_filters": 2, "codebook_size": 16}},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "phi4_multimodal": {
        "audio_config": {
            **{"num_blocks": 2, "nemo_conv_channels": 8, "ext_pw_out_channel": 32},
            **{"depthwise_separable_out_channel": 32, "input_size": 16},
        },
        "vision_config": {"image_size": 28},
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
    "xmod": {"default_language": "en_XX"},
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
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
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
    given |= also
    for name, part in kind.sub_configs_defaults.items():
        inside = also.get(name, {})
        named = inside.get("model_type", part.model_type)
        inner = CONFIG_MAPPING[named] if part.config_class is AutoConfig else part.config_class
        given[name] = _tiny(inner, inside).to_dict()
    return kind(**given)


def made(family: str) -> Any:
    """Return a model of a family with random weights."""
    torch.manual_seed(11)
    if family in CLASSES:
        model: Any = getattr(transformers, CLASSES[family])(tiny(family))
    else:
        model = AutoModelForCausalLM.from_config(tiny(family))
    model.eval()
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
    source = home / "source"
    try:
        made(family).save_pretrained(source)
    except ImportError:  # a package is missing, which compress must say
        tiny(family).save_pretrained(source)
        save_file({"none": torch.zeros(1)}, source / "model.safetensors", {"format": "pt"})
    except Exception as error:
        return Verdict(family, "not built", f"{type(error).__name__}: {error}".split("\n")[0])
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
    kind = kind_of(ours)
    assert kind is not None
    theirs = kind.auto.from_pretrained(home / "small").eval()
    decompress(home / "small", home / "plain")
    plain = kind.auto.from_pretrained(home / "plain").eval()
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
    raise TimeoutError(f"more than {SECONDS} s of the processor")


def walk(families: list[str]) -> Iterator[Verdict]:
    """Yield the verdict of each family."""
    signal.signal(signal.SIGPROF, _late)
    for family in families:
        with tempfile.TemporaryDirectory() as name:
            home = Path(name)
            generator = torch.Generator().manual_seed(1)
            letters = torch.randint(0, 88, (80, 60), generator=generator)
            lines = ["".join(chr(33 + int(i)) for i in row) for row in letters]
            (home / "text.txt").write_text("\n".join(lines), encoding="utf-8")
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                yield verdict(family, home, home / "text.txt")
            except TimeoutError as error:
                yield Verdict(family, "not finished", f"{error}")
            except Exception as error:
                what = f"{type(error).__name__}: {error}".split("\n")[0]
                yield Verdict(family, "fails", what.replace(str(home), ""))
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)


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
