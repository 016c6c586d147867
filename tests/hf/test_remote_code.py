"""A compressed directory is data: code beside it runs only where the user says so."""

import json
import shutil
from pathlib import Path

import pytest

from cerwu_gpu import FormatError, ModelError, load_compressed
from cerwu_gpu.serving.loading import open_model

GOLDEN = Path(__file__).parents[1] / "golden" / "scalar"
CODE = """
from pathlib import Path
Path(__file__).with_name("ran").write_text("code of the repository ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class Config(LlamaConfig):  # classes of its own, as transformers marks those that it loads
    pass

class Model(LlamaForCausalLM):
    pass

class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A golden directory whose configuration, generation settings and tokenizer name code."""
    path = Path(shutil.copytree(GOLDEN, tmp_path / "model"))
    (path / "evil.py").write_text(CODE.replace("__file__", repr(str(path / "evil.py"))))
    for file, names in (
        ("config.json", {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
        ("generation_config.json", {"AutoConfig": "evil.Config"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "evil.Tokenizer"]}),
    ):
        content = json.loads((path / file).read_text())
        content["auto_map"] = names
        (path / file).write_text(json.dumps(content))
    return path


def test_loading_runs_no_code_of_the_directory(directory):
    load_compressed(directory)
    assert not (directory / "ran").exists()


def test_opening_with_its_tokenizer_runs_none_either(directory):
    try:
        open_model(directory)
    except ModelError as error:
        assert "trust" in str(error) or "tokenizer" in str(error)
    assert not (directory / "ran").exists()


def test_an_architecture_that_only_the_directory_knows_is_refused(directory):
    content = json.loads((directory / "config.json").read_text())
    content["model_type"] = "evil"
    (directory / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="transformers cannot build its model"):
        load_compressed(directory)
    assert not (directory / "ran").exists()


def test_with_trust_the_tokenizer_s_code_runs(directory):
    """The tests above would see it."""
    open_model(directory, trust_remote_code=True)
    assert (directory / "ran").exists()


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "[1]", "[" * 10**5], ids=["empty", "list", "deep"])
def test_settings_that_are_none_are_refused_by_name(directory, file, text):
    (directory / file).write_text(text)
    with pytest.raises(FormatError, match=file):
        load_compressed(directory)
