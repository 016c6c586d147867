"""The files beside the weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig

from cerwu_gpu import CompressionConfig
from cerwu_gpu.hf.causal_lm import CausalLM
from cerwu_gpu.hf.models import LoadedModel, load_model
from tests.hf.toys import toy


def write_companions(loaded: LoadedModel, folder: Path) -> None:
    CausalLM(loaded, CompressionConfig(), device=torch.device("cpu")).write_files(folder)


@pytest.mark.parametrize("files", [False, True], ids=["in memory", "copied"])
def test_nothing_says_where_the_model_lay(files: bool, tmp_path: Path, toy_tokenizer: Any) -> None:
    source, output = tmp_path / "at-home", tmp_path / "out"
    toy("llama").save_pretrained(source)
    toy_tokenizer.save_pretrained(source)
    loaded = load_model(source)
    assert loaded.model.config.name_or_path == str(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    output.mkdir()
    write_companions(LoadedModel(loaded.model, tokenizer, source if files else None), output)
    written = {file.name: file.read_text(encoding="utf-8") for file in output.iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= set(written)
    assert [name for name, text in written.items() if "at-home" in text] == []


def test_nor_do_the_parts_of_a_configuration(tmp_path: Path) -> None:
    model = toy("llama")
    model.config.text_config = LlamaConfig(name_or_path="/at/home")
    model.config.others = [{"_name_or_path": "/at/home"}]
    write_companions(LoadedModel(model, None, None), tmp_path)
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    assert "_name_or_path" not in text
    assert json.loads(text)["text_config"]["model_type"] == "llama"
