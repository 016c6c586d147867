"""Decompressed models have the names of their sources, and nothing of a source vanishes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import cerwu_gpu
from cerwu_gpu import ModelError
from tests.configs import compress_flat, configured
from tests.hf.toys import toy, toy_tokens

CHEAP: dict[str, Any] = {
    "samples": 4,
    "sequence_length": 16,
    "sensitivity": "none",
    "lmbda": 3e-4,
}
HEAD = "mtp.layers.0.mlp.up_proj.weight"


def source(family: str, folder: Path, tokenizer: Any, change: Callable[[Any], Any]) -> Path:
    """The directory of a toy, with its checkpoint changed."""
    toy(family).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def small(model: Path, output: Path, text: Path, **settings: Any) -> Any:
    config = configured(**{**CHEAP, "calibration": str(text), **settings})
    return cerwu_gpu.compress(str(model), output, config=config, progress=False)


def stored(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the safetensors files of a directory."""
    found: dict[str, tuple[int, ...]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    return found


def same(state: dict[str, Any]) -> dict[str, Any]:
    return state


def without_prefix(state: dict[str, Any]) -> dict[str, Any]:
    """As the oldest GPT-2 on the Hub has them."""
    return {name.removeprefix("transformer."): tensor for name, tensor in state.items()}


def one_renamed(state: dict[str, Any]) -> dict[str, Any]:
    """One name without the prefix, all others with it."""
    return {name.replace("transformer.ln_f", "ln_f"): tensor for name, tensor in state.items()}


def inner(state: dict[str, Any]) -> dict[str, Any]:
    """As `save_pretrained(save_original_format=False)` writes them."""
    return {n: t.contiguous() for n, t in toy("mixtral").state_dict().items()}


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gpt_neox", same),
        ("mixtral", same),
        ("mixtral", inner),
        ("gpt2", without_prefix),
        ("gpt2", one_renamed),
    ],
)
def test_names_and_shapes_are_those_of_the_source(
    family: str, change: Any, tmp_path: Path, toy_tokenizer: Any, toy_text: Path
) -> None:
    model = source(family, tmp_path / "source", toy_tokenizer, change)
    small(model, tmp_path / "small", toy_text)
    ours = cerwu_gpu.load_compressed(tmp_path / "small")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    cerwu_gpu.decompress(tmp_path / "small", tmp_path / "plain")
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("plain", "ours", "theirs"):
        assert stored(tmp_path / folder) == stored(model), folder
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        logits = ours(toy_tokens(2)).logits
        assert torch.equal(again(toy_tokens(2)).logits, logits)
        assert torch.equal(theirs(toy_tokens(2)).logits, logits)


def test_a_usual_model_has_nothing_more_in_its_configuration(
    tmp_path: Path, toy_tokenizer: Any, toy_text: Path
) -> None:
    model = source("llama", tmp_path / "source", toy_tokenizer, same)
    report = small(model, tmp_path / "small", toy_text)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["quantization_config"] == {"format": 1, "quant_method": "cerwu"}
    assert not any("source" in event for event in report.events)


def test_what_transformers_does_not_load_is_kept_and_told(
    tmp_path: Path, toy_tokenizer: Any, toy_text: Path
) -> None:
    extra = torch.randn(56, 32)
    model = source("llama", tmp_path / "m", toy_tokenizer, lambda s: {**s, HEAD: extra})
    report = small(model, tmp_path / "small", toy_text)
    assert any(HEAD in event for event in report.events)
    assert report.original_bytes >= extra.numel() * 4 + 1
    for door in (cerwu_gpu.load_compressed, AutoModelForCausalLM.from_pretrained):
        assert not any("mtp" in name for name in door(tmp_path / "small").state_dict())
    cerwu_gpu.load_compressed(tmp_path / "small", resident="compressed")
    expected = cerwu_gpu.load_compressed(tmp_path / "small").state_dict()
    filled = cerwu_gpu.load_compressed(tmp_path / "small", into=toy("llama")).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in filled.items())
    cerwu_gpu.decompress(tmp_path / "small", tmp_path / "plain")
    assert stored(tmp_path / "plain") == stored(model)
    index = json.loads((tmp_path / "plain" / "model.safetensors.index.json").read_text())
    assert torch.equal(load_file(tmp_path / "plain" / index["weight_map"][HEAD])[HEAD], extra)
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    with pytest.raises(ModelError, match="strict"):
        small(model, tmp_path / "other", toy_text, strict=True)


def test_constants_of_old_checkpoints_are_left_with_the_reason(
    tmp_path: Path, toy_tokenizer: Any, toy_text: Path
) -> None:
    name, mask = "transformer.h.0.attn.bias", torch.ones(1, 1, 128, 128)
    model = source("gpt2", tmp_path / "m", toy_tokenizer, lambda s: {**s, name: mask})
    report = small(model, tmp_path / "small", toy_text)
    assert not any("attn.bias" in event for event in report.events)
    assert report.left[name] == "a constant that the model computes"
    assert name not in stored(tmp_path / "small")


def test_a_head_beside_the_embedding_that_it_is_tied_to_is_named(
    tmp_path: Path, toy_tokenizer: Any, toy_text: Path
) -> None:
    def both(state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}

    model = source("llama", tmp_path / "m", toy_tokenizer, both)
    report = small(model, tmp_path / "small", toy_text, strict=True)
    assert "stored once" in report.left["lm_head.weight"]


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
@pytest.mark.parametrize("fp8", [True, False])
def test_scales_without_a_description_are_refused(
    suffix: str, fp8: bool, tmp_path: Path, toy_tokenizer: Any, toy_text: Path
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def scaled(state: dict[str, Any]) -> dict[str, Any]:
        weight = state[name].to(torch.float8_e4m3fn) if fp8 else state[name]
        return {**state, name: weight, f"{name}{suffix}": torch.ones(1, 1)}

    model = source("llama", tmp_path / "m", toy_tokenizer, scaled)
    with pytest.raises(ModelError, match="quantization_config"):
        small(model, tmp_path / "small", toy_text)


def test_an_adapter_beside_the_weights_is_refused(
    tmp_path: Path, toy_tokenizer: Any, toy_text: Path
) -> None:
    model = source("llama", tmp_path / "m", toy_tokenizer, same)
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ModelError, match="merge it"):
        small(model, tmp_path / "small", toy_text)


@pytest.mark.parametrize(
    ("architecture", "sentence"),
    [
        ("LlamaForQuestionAnswering", "names LlamaForQuestionAnswering, which is no class of"),
        ("LlamaForSequenceClassification", "lacks 1 of the model's weights, among them score"),
    ],
)
def test_another_architecture_is_refused(
    architecture: str, sentence: str, tmp_path: Path, toy_tokenizer: Any, toy_text: Path
) -> None:
    model = source("llama", tmp_path / "m", toy_tokenizer, same)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    with pytest.raises(ModelError, match=sentence):
        small(model, tmp_path / "small", toy_text)


@pytest.mark.parametrize("entry", [{"carried": "x"}, {"renamed": [1]}, {"conversions": [["a"]]}])
def test_a_malformed_entry_is_refused(
    entry: dict[str, Any], tmp_path: Path, toy_tokenizer: Any, toy_text: Path
) -> None:
    model = source("llama", tmp_path / "m", toy_tokenizer, same)
    small(model, tmp_path / "small", toy_text)
    file = tmp_path / "small" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= entry
    file.write_text(json.dumps(config))
    for door in (cerwu_gpu.load_compressed, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(cerwu_gpu.FormatError, match=r"config\.json"):
            door(tmp_path / "small")


def test_a_model_in_memory_keeps_the_names_it_was_loaded_by(
    tmp_path: Path, toy_tokenizer: Any, toy_text: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        source("mixtral", tmp_path / "source", toy_tokenizer, inner)
    )
    text = toy_text.read_text(encoding="utf-8")
    compress_flat(
        model, tmp_path / "small", config=configured(**CHEAP), text=text, tokenizer=toy_tokenizer
    )
    cerwu_gpu.decompress(tmp_path / "small", tmp_path / "plain")
    assert stored(tmp_path / "plain") == stored(tmp_path / "source")
