"""What is said of README alone; its code, options and links are checked by test_docs.py."""

import re
import shlex
from pathlib import Path
from typing import Any

from typer.main import get_command

from cerwu_gpu.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_SCREEN = 40
"""Lines."""


def commands(program: str) -> list[list[str]]:
    """The arguments of each line that starts `program` in a shell block."""
    texts = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line, comments=True) for text in texts for line in text.splitlines()]
    return [words[1:] for words in lines if words and words[0] == program]


def test_the_first_screen_has_three_lines_of_code_and_figures() -> None:
    top = "\n".join(README.splitlines()[:FIRST_SCREEN])
    code = re.search(r"^```python\n(.*?)^```", top, re.MULTILINE | re.DOTALL)
    assert code is not None
    assert len([line for line in code[1].splitlines() if line.strip()]) == 3
    for figure in ("bits per quantized weight", "bytes", "perplexity", "seconds"):
        assert re.search(rf"^\| {figure}", top, re.MULTILINE), figure


def test_every_command_is_shown() -> None:
    group: Any = get_command(app)
    assert {arguments[0] for arguments in commands("cerwu-gpu")} == set(group.commands)


def test_the_demo_and_the_test_command_are_named() -> None:
    assert commands("make") == [["demo"], ["test"]]


def test_every_page_is_linked() -> None:
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").iterdir() if path.suffix != ".png"}
    assert pages <= set(re.findall(r"\]\(([^)\s]+)\)", README))
