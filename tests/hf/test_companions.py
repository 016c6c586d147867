"""The files beside the weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig

from cerwu_gpu import CompressionConfig, OutputError, compress, decompress
from cerwu_gpu.hf.causal_lm import CausalLM
from cerwu_gpu.hf.companions import compact
from cerwu_gpu.hf.models import LoadedModel, load_model
from tests.configs import configured
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


FILES = (
    *("chat_template.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenization_own.py", "own.tiktoken", "modules.json", "1_Pooling/config.json"),
    *("additional_chat_templates/tools.jinja", "LICENSE", "video_preprocessor_config.json"),
)


def directory(folder: Path, tokenizer: Any) -> Path:
    """The directory of a toy with further files."""
    toy("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}", encoding="utf-8")
    (folder / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]', encoding="utf-8")
    return folder


def test_every_file_is_carried_or_named(tmp_path: Path, toy_tokenizer: Any, toy_text: Path) -> None:
    source = directory(tmp_path / "source", toy_tokenizer)
    for name in ("README.md", "pytorch_model.bin", "figure.png", "other.safetensors"):
        (source / name).write_text("text", encoding="utf-8")
    (source / "runs").mkdir()
    config = configured(calibration=str(toy_text), samples=4, sequence_length=16)
    report = compress(str(source), tmp_path / "small", config=config, progress=False)
    assert all((tmp_path / "small" / name).is_file() for name in FILES)
    left = {"README.md", "pytorch_model.bin", "figure.png", "other.safetensors", "runs/"}
    assert left <= report.left.keys()
    told = [event for event in report.events if "not carried" in event]
    assert len(told) == 3, told
    decompress(tmp_path / "small", tmp_path / "plain")
    assert all((tmp_path / "plain" / name).is_file() for name in FILES)
    compress(str(source), tmp_path / "small", config=config, overwrite=True, progress=False)
    (tmp_path / "small" / "1_Pooling" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match=r"mine\.txt"):
        compress(str(source), tmp_path / "small", config=config, overwrite=True, progress=False)


def test_a_given_tokenizer_replaces_the_source_s(tmp_path: Path, toy_tokenizer: Any) -> None:
    source = directory(tmp_path / "source", toy_tokenizer)
    (source / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    output = tmp_path / "out"
    output.mkdir()
    loaded = replace(load_model(source), tokenizer=toy_tokenizer, replaced=True)
    write_companions(loaded, output)
    assert (output / "own.tiktoken").is_file()
    assert len((output / "tokenizer_config.json").read_text()) > 10


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    st.sampled_from([None, 1, "\t"]),
    st.booleans(),
)
def test_compact_json_has_the_same_content(value: Any, indent: Any, plain: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=plain).encode("utf-8", "surrogatepass")
    small = compact(text)
    assert json.loads(small.decode("utf-8", "surrogatepass")) == value
    assert len(small) <= len(
        json.dumps(value, separators=(",", ":"), ensure_ascii=plain).encode(
            "utf-8", "surrogatepass"
        )
    )


def test_what_is_no_json_stays() -> None:
    assert compact(b'{ "a": ') == b'{ "a": '


def test_the_compact_tokenizer_is_the_same(tmp_path: Path, toy_tokenizer: Any) -> None:
    toy("llama").save_pretrained(tmp_path / "m")
    toy_tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "out").mkdir()
    write_companions(load_model(tmp_path / "m"), tmp_path / "out")
    before, after = ((tmp_path / x / "tokenizer.json") for x in ("m", "out"))
    assert after.stat().st_size < 0.9 * before.stat().st_size
    text = "The harbour lies behind 12 low hills;\n\tnobody counts."
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text) == toy_tokenizer(text)
