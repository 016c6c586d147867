"""README and docs are true: their code runs, their options exist, their links lead somewhere.

Each page is carried out from top to bottom in a folder of its own. What it calls ./my-model and
my-text.txt is a toy model and a short text there, and hub names stand for the toy, too. Runs take
few samples. A command that is not run is in NOT_RUN with the reason, and is parsed all the same.
"""

import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn
from typer.main import get_command

from cerwu_gpu import CompressionConfig, Report
from cerwu_gpu.cli import app
from cerwu_gpu.config import Calibration, Text

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "kernels" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))

TOY = "./my-model"
NAMES = {
    "HuggingFaceTB/SmolLM2-135M": TOY,
    "EleutherAI/pythia-70m-deduped": TOY,
    "microsoft/resnet-18": "./my-resnet",
    "user/small": "small",
}
"""What pages name -> what is there."""
FEW = ("--samples", "4", "--sequence-length", "32", "--device", "cpu", "--quiet")
TEXTS = ("--calibration", "my-text.txt")
WINDOWS = ("--text", "my-text.txt", "--context-length", "32", "--max-windows", "2")
POINTS = ("--lmbda", "1e-7", "--levels", "7", "--uniform-lmbda", "1e-5")
ADDED: dict[str, tuple[str, ...]] = {
    "compress": (*TEXTS, *FEW),
    "eval": (*WINDOWS, "--device", "cpu", "--quiet"),
    "sweep": (*TEXTS, *WINDOWS, *POINTS, *FEW),
}
"""Command -> options that make it quick, after its own: the last one counts."""

ADDED_TO_IMAGES: dict[str, tuple[str, ...]] = {
    "compress": ("--samples", "4", "--device", "cpu", "--quiet"),
    "eval": ("--device", "cpu", "--quiet"),
    "sweep": (*POINTS, "--samples", "4", "--device", "cpu", "--quiet"),
}
"""Options for commands with --images, beside which texts are refused."""

STARTS_WITH = {"faq.md": "small", "report.md": "small"}
"""Page -> the compressed directory that its reader has already."""

NOT_RUN = {
    "cerwu-gpu compress model.gguf": "a .gguf file of a toy cannot be written; see hf/test_models",
    "cerwu-gpu sweep HUB -o sweep --max-windows 40 --methods nncodec": "nncodec is no dependency",
    "hf upload": "publishes",
    "cerwu-gpu push": "publishes; see serving/test_hub",
    "vllm serve": "vLLM is no dependency; see tests/vllm_plugin",
    "python -m vllm.entrypoints.openai.api_server": "the same",
    "lm_eval": "lm-eval is no dependency; see vllm_plugin/test_vllm",
    "python -m cerwu_gpu.serving.lm_eval": "lm-eval is no dependency; see serving/test_tasks",
    "--tasks": "the same",
    "pip install": "needs the network; the extras that it names are looked up",
    "torchrun": "starts processes; see ranks/test_ranks",
    "head=$(scontrol": "belongs to SLURM",
    "meeting=--rdzv-backend": "the same",
    "make": "the targets are looked up; .ci/run carries most of them out",
    "python convert_hf_to_gguf.py": "belongs to llama.cpp",
    "python scripts/fidelity.py": "its data are no part of the project; see scripts/test_fidelity",
    "python scripts/limit.py": "its data are no part of the project; see scripts/test_limit",
    "python scripts/sweep_cifar.py": "needs CIFAR-10; see sweep/test_cifar",
    "python scripts/plot.py sweep/sweep.jsonl cifar20/sweep.jsonl": "needs sweeps of CIFAR-10",
    "--bits": "a target takes many passes over a model this small; see compression/test_target",
    "--max-size": "the same",
    "--max-perplexity-increase": "the same",
}
"""How a line begins, or an option in it -> why it is not run. Hub names are written HUB."""

VLLM_OPTIONS = {"--dtype", "--model-loader-extra-config", "--enforce-eager"}
OTHERS_OPTIONS = {"--no-deps", "--outfile", "--max-restarts"} | VLLM_OPTIONS
"""Options of pip, llama.cpp, torchrun and vLLM."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def lines(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block."""
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def all_lines() -> list[list[str]]:
    shells = [text for page in PAGES for name, text in blocks(page) if name == "sh"]
    found = [words for text in shells for words in lines(text)]
    assert len(found) > 40
    return found


def reason(words: list[str]) -> str | None:
    """The key of NOT_RUN that holds for the line, None if the line is run."""
    line = " ".join("HUB" if NAMES.get(word) == TOY else word for word in words)
    fits = (key for key in NOT_RUN if f"{line} ".startswith(f"{key} ") or key in words)
    return next(fits, None)


def test_blocks_are_in_languages_that_are_carried_out() -> None:
    assert {name for page in PAGES for name, _ in blocks(page)} == {"python", "sh"}


@pytest.fixture
def place(
    toy_directory: Path,
    toy_text: Path,
    toy_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The current directory, with what the pages name; `compress` of Python takes few samples."""
    from cerwu_gpu import api
    from tests.hf.test_image_text import save as save_vision_language
    from tests.models.toys import save_classifier, save_pictures, toy

    compress, text = api.compress, toy_text.read_text(encoding="utf-8")

    def compress_few(model: Any, output: str, **options: Any) -> Report:
        config = options.pop("config", CompressionConfig())
        if isinstance(config.calibration, Calibration):
            data = replace(config.text, source=Text(text), samples=4, sequence_length=32)
            config = replace(config, calibration=data)
            options["overwrite"] = options.get("overwrite", False) or Path(output).exists()
        return compress(model, output, config=config, progress=False, **options)

    monkeypatch.setattr("cerwu_gpu.compress", compress_few)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy_directory, tmp_path / "my-model")
    shutil.copyfile(toy_text, tmp_path / "my-text.txt")
    toy("resnet").save_pretrained(tmp_path / "my-resnet")
    save_classifier(tmp_path / "my-classifier")
    save_pictures(tmp_path / "my-images")
    save_vision_language("llava", toy_tokenizer, tmp_path / "my-vlm")
    return tmp_path


def given() -> dict[str, Any]:
    """What the examples of docs/models.md take for granted."""
    images = list(torch.randn(12, 3, 32, 32).split(6))
    module, fresh = (
        nn.Sequential(nn.Conv2d(3, 8, 3, stride=8), nn.Flatten(), nn.Linear(128, 4))
        for _ in range(2)
    )
    return {
        "images": images[0],
        "more_images": images[1],
        "batches": images,
        "module": module,
        "fresh_module": fresh,
    }


@each_page
def test_a_page_can_be_followed_from_top_to_bottom(
    page: Path,
    place: Path,
    compressed: tuple[Path, dict[str, Any]],
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if page.name in STARTS_WITH:
        shutil.copytree(compressed[0], place / STARTS_WITH[page.name])
    names = given()
    for language, text in blocks(page):
        if language == "python":
            for name, stand_in in NAMES.items():
                text = text.replace(name, stand_in)
            exec(compile(text, str(page), "exec"), names)
            continue
        for words in lines(text):
            if reason(words) is None:
                run(words, command, monkeypatch)


def run(words: list[str], command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of a shell block."""
    program, *arguments = [NAMES.get(word, word) for word in words]
    written = None
    if arguments[-2:-1] == [">"]:
        *arguments, _, written = arguments
    if program == "cerwu-gpu":
        alone = "--images" in arguments and "--calibration" not in arguments
        added = ADDED_TO_IMAGES if alone else ADDED
        options = added.get(arguments[0], ())
        if "--calibration" in arguments and options[:2] == TEXTS:
            options = options[2:]  # a second text would join the first
        outcome = command(*arguments, *options, *replaced(arguments))
        assert outcome.code == 0, (words, outcome.err)
        assert outcome.out.strip()
        if written is not None:
            Path(written).write_text(outcome.out, encoding="utf-8")
        return
    assert program == "python" and arguments[0].startswith("scripts/"), words
    assert script(arguments, monkeypatch) == 0, words


def replaced(arguments: list[str]) -> list[str]:
    """Lines of a page are alternatives: a later one replaces what an earlier one wrote."""
    if arguments[0] in ("compress", "decompress"):
        output = arguments[arguments.index("-o") + 1]
        if Path(output).exists() and "--overwrite" not in arguments:
            return ["--overwrite"]
    return []


def script(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of a script of the repository, in this process."""
    path = str(ROOT / arguments[0])
    monkeypatch.setattr(sys, "argv", [path, *arguments[1:]])
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(path, run_name="__main__")
    return int(end.value.code or 0)


@pytest.mark.parametrize("words", all_lines(), ids=" ".join)
def test_every_line_is_understood(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the parser that the program has; nothing is carried out."""
    match words[:-2] if words[-2:-1] == [">"] else words:
        case ["cerwu-gpu", name, *rest]:
            group: Any = get_command(app)
            with typer.Context(group, info_name="cerwu-gpu") as parent:
                group.commands[name].make_context(name, rest, parent=parent)
        case ["python", path, *rest] if (ROOT / path).is_file():
            assert script([path, "--help"], monkeypatch) == 0
            known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
            assert {word for word in rest if word.startswith("--")} <= known
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            for target in targets:
                assert re.search(rf"^{target}:", makefile, re.MULTILINE)
        case ["pip", "install", *rest]:
            settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
            extras = re.findall(r"\[([\w,]+)\]", " ".join(rest))
            assert set(extras) <= set(settings["project"]["optional-dependencies"])
        case _:
            assert reason(words) is not None, "nothing here knows this program"


def test_every_exception_is_needed() -> None:
    assert {reason(words) for words in all_lines()} - {None} == set(NOT_RUN)


def options() -> set[str]:
    """All options of the command line and of the scripts."""
    group: Any = get_command(app)
    commands = [group, *group.commands.values()]
    parameters = [parameter for each in commands for parameter in each.params]
    ours = {name for each in parameters for name in (*each.opts, *each.secondary_opts)}
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "scripts").glob("*.py")]
    scripts = set(re.findall(r'"(--[a-z][a-z-]*)"', "\n".join(sources)))
    return ours | scripts | {"--help", "--install-completion", "--show-completion"}


@each_page
def test_every_option_that_a_page_names_exists(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    spans = " ".join(re.findall(r"`([^`]+)`", prose))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", spans))
    assert named <= options() | OTHERS_OPTIONS


@each_page
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        target = page.parent / link.partition("#")[0]
        assert link.startswith("https://") or target.is_file() or target.is_dir(), link


@each_page
def test_a_page_names_no_place_of_a_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not [place for place in ("/home/", "/root/", "/tmp/", "/work/") if place in text]
