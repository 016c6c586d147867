"""All that a model and its tokenizer bring into a compressed directory is known as a part of it."""

import ast
from pathlib import Path
from typing import Any

import transformers.models

from cerwu_gpu.container.output import foreign_content
from cerwu_gpu.hf import card, companions
from tests.configs import compress_flat, configured
from tests.hf.toys import toy

COPIED = sorted(
    {
        *(name for name in companions.TOKENIZER_PARTS if "/" not in name),
        *("LICENSE*", "preprocessor_config.json", "generation_config.json"),
        card.CARD_FILE,
    }
)


def vocabularies() -> set[str]:
    """The names under which the tokenizers of transformers save, read from their sources."""
    names: set[str] = set()
    for file in Path(transformers.models.__path__[0]).glob("*/tokenization_*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VOCAB_FILES_NAMES":
                assert isinstance(node.value, ast.Dict)
                names.update(ast.literal_eval(value) for value in node.value.values)
    return names


def test_copied_files_are_known(compressed: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for file in compressed[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name in COPIED:
        (folder / name.replace("*", "-1.txt")).touch()
    assert foreign_content(folder) is None


def test_vocabularies_are_known(compressed: tuple[Path, Any], tmp_path: Path) -> None:
    names = vocabularies()
    assert {"vocab.txt", "spiece.model", "target_vocab.json"} <= names
    for file in compressed[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in names:
        (tmp_path / name).touch()
    assert foreign_content(tmp_path) is None


def test_a_model_in_memory_is_replaced_with_all_that_its_tokenizer_saves(
    toy_tokenizer: Any, toy_text: Path, tmp_path: Path
) -> None:
    """More than one chat template is saved into a folder of its own."""
    tokenizer = toy_tokenizer.from_pretrained(_saved(toy_tokenizer, tmp_path / "tokenizer"))
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    for overwrite in (False, True):
        compress_flat(
            toy("llama"),
            tmp_path / "out",
            config=configured(samples=2, sequence_length=32, sensitivity="none"),
            tokenizer=tokenizer,
            text=toy_text.read_text(encoding="utf-8"),
            card=True,
            overwrite=overwrite,
            progress=False,
        )
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").is_file()


def _saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder
