"""The README is true: its code runs, its commands exist, its links lead somewhere."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from cerwu_gpu import CompressionConfig, Report
from cerwu_gpu.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_NAME = "HuggingFaceTB/SmolLM2-135M"


def blocks(language: str) -> list[str]:
    """The fenced code blocks of `language`."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """The arguments of each line that starts `program` in a shell block."""
    lines = [
        shlex.split(line, comments=True) for text in blocks("sh") for line in text.splitlines()
    ]
    return [words[1:] for words in lines if words and words[0] == program]


def test_the_python_examples_run(
    toy_directory: Path, toy_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, on a toy model in place of the hub's and few calibration samples."""
    from cerwu_gpu.hf import compression

    compress = compression.compress
    text = toy_text.read_text(encoding="utf-8")

    def compress_toy(model: str, output: str, **options: Any) -> Report:
        few = replace(options.pop("config", CompressionConfig()), samples=4, sequence_length=32)
        return compress(model, output, config=few, text=text, **options)

    monkeypatch.setattr("cerwu_gpu.compress", compress_toy)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-text.txt").write_text(text, encoding="utf-8")
    examples = blocks("python")
    assert len(examples) == 2
    for example in examples:
        assert HUB_NAME in example
        exec(compile(example.replace(HUB_NAME, str(toy_directory)), "README.md", "exec"), {})
    assert (tmp_path / "small" / "config.json").is_file()


@pytest.mark.parametrize("arguments", commands("cerwu-gpu"), ids=" ".join)
def test_every_command_line_is_understood(arguments: list[str]) -> None:
    """Parsed as the program does it, not carried out."""
    group: Any = get_command(app)
    name, *rest = arguments
    with typer.Context(group, info_name="cerwu-gpu") as parent:
        group.commands[name].make_context(name, rest, parent=parent)


def test_every_command_is_shown() -> None:
    group: Any = get_command(app)
    assert {arguments[0] for arguments in commands("cerwu-gpu")} == set(group.commands)


def test_the_make_targets_exist_and_the_test_command_is_named() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [words[0] for words in commands("make")]
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}: ", makefile, re.MULTILINE)


def test_every_link_to_a_file_leads_to_one() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).is_file(), link
