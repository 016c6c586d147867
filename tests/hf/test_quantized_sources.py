"""Checkpoints in fp8 and mxfp4: what transformers makes of them is compressed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

import cerwu_gpu
from cerwu_gpu import CerwuError
from tests.hf.toys import toy, toy_tokens

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def to_fp8(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The projections in float8 with one scale each."""
    changed = {}
    for name, tensor in state.items():
        changed[name] = tensor
        if name.endswith("proj.weight"):
            scale = tensor.float().abs().max() / 448
            changed[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            changed[f"{name}_scale_inv"] = scale.reshape(1, 1)
    return changed


def to_mxfp4(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts as random blocks of 32 numbers of 4 bits, each with an exponent."""
    generator, changed = torch.Generator().manual_seed(5), {}
    for name, tensor in state.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            changed[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        shape = experts, outputs, inputs // 32
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator)
        changed[f"{name}_blocks"] = blocks.to(torch.uint8)
        changed[f"{name}_scales"] = torch.randint(120, 124, shape, generator=generator).to(
            torch.uint8
        )
    return changed


SOURCES: dict[str, tuple[Any, Any, Any, Any]] = {
    "fp8": (
        lambda: toy("llama", tie_word_embeddings=False),
        to_fp8,
        FP8,
        FineGrainedFP8Config(dequantize=True),
    ),
    "mxfp4": (
        lambda: toy("gpt_oss", intermediate_size=64),
        to_mxfp4,
        MXFP4,
        Mxfp4Config(dequantize=True),
    ),
}


def source(name: str, folder: Path, tokenizer: Any) -> Path:
    make, change, described, _ = SOURCES[name]
    model = make().to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = described
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def settings(text: Path, **given: Any) -> Any:
    return cerwu_gpu.from_settings(
        calibration=str(text), samples=4, sequence_length=32, lmbda=1e-11, **given
    )


@pytest.mark.parametrize("name", SOURCES)
def test_it_is_made_of_what_transformers_makes_of_it(
    name: str, tmp_path: Path, toy_tokenizer: Any, toy_text: Path
) -> None:
    model, out = source(name, tmp_path / "m", toy_tokenizer), tmp_path / "small"
    report = cerwu_gpu.compress(model, out, config=settings(toy_text), progress=False)
    assert [event for event in report.events if f"its weights are in {name}" in event]
    original = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=SOURCES[name][3], dtype="auto"
    ).state_dict()
    loaded = cerwu_gpu.load_compressed(out)
    for key, value in loaded.state_dict().items():
        difference = (value.float() - original[key].float()).norm()
        assert float(difference / original[key].float().norm()) < 0.6  # not by a scale
    with torch.no_grad():
        logits = loaded(toy_tokens(2)).logits
        cerwu_gpu.decompress(out, tmp_path / "plain")
        for path in (out, tmp_path / "plain"):
            other = AutoModelForCausalLM.from_pretrained(path)
            assert torch.equal(other(toy_tokens(2)).logits, logits)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    names = {key.removesuffix("_blocks") for key in load_file(model / "model.safetensors")}
    kept = {key for key in names if not key.endswith(("_scale_inv", "_scales"))}
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == kept


def test_quantized_tensors_that_are_not_loaded_are_named(
    tmp_path: Path, toy_tokenizer: Any, toy_text: Path
) -> None:
    model = source("fp8", tmp_path / "m", toy_tokenizer)
    state = load_file(model / "model.safetensors")
    state["model.mtp.q_proj.weight"] = state["model.layers.0.self_attn.q_proj.weight"].clone()
    state["model.mtp.q_proj.weight_scale_inv"] = torch.ones(1, 1)
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "small"
    report = cerwu_gpu.compress(model, out, config=settings(toy_text), progress=False)
    assert [event for event in report.events if event.startswith("model.mtp.q_proj.weight is left")]
    with pytest.raises(CerwuError, match=r"model\.mtp\.q_proj\.weight is left out.*\(strict\)"):
        cerwu_gpu.compress(
            model, tmp_path / "other", config=settings(toy_text, strict=True), progress=False
        )
