"""Wrong input on the command line: one sentence, exit code 2, and nothing left behind."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

Command = Callable[..., Any]
FEW = ("--samples", "4", "--sequence-length", "32", "--quiet")


def contents(directory: Path) -> dict[str, bytes | None]:
    """Everything below `directory`: relative path -> bytes (None for a directory)."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def assert_refused(outcome: Any, *parts: str) -> None:
    lines = outcome.err.strip().splitlines()
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("cerwu-gpu: ")
    assert lines[0].endswith(".")
    for part in parts:
        assert part in lines[0]


WRONG_SETTINGS: tuple[tuple[Sequence[str], str], ...] = (
    (("--samples", "0"), "samples"),
    (("--sequence-length", "1"), "sequence_length"),
    (("--lmbda", "-0.1"), "lmbda"),
    (("--lmbda", "nan"), "lmbda"),
    (("--levels", "1"), "levels"),
    (("--levels", "-3"), "levels"),
    (("--passes", "0"), "passes"),
    (("--block-size", "0"), "block_size"),
    (("--limit-columns", "-1"), "limit_columns"),
    (("--batch-size", "0"), "batch_size"),
    (("--damping", "-1"), "damping"),
    (("--grid", "0"), "grid"),
    (("--grid", ""), "grid"),
    (("--grid", "0,one"), "grid"),
    (("--grid", "no-such-file.txt"), "no-such-file.txt"),
    (("--grid", "1,0"), "grid"),
    (("--grid", "0,1", "--levels", "5"), "levels"),
    (("--include", "no.such.weight"), "no.such.weight"),
    (("--calibration", "no-such-text.txt"), "no-such-text.txt"),
    (("--calibration", "self:0.5"), "share"),
    (("--device", "no-such-device"), "no-such-device"),
)


@pytest.mark.parametrize(("options", "part"), WRONG_SETTINGS, ids=lambda value: "".join(value))
def test_a_wrong_setting_is_refused(
    command: Command,
    toy_directory: Path,
    toy_text: Path,
    tmp_path: Path,
    options: Sequence[str],
    part: str,
) -> None:
    arguments = ("compress", toy_directory, "-o", tmp_path / "out", "--calibration", toy_text)
    outcome = command(*arguments, *FEW, *options)
    assert_refused(outcome, part)
    assert contents(tmp_path) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_named(
    command: Command, toy_directory: Path, toy_text: Path, tmp_path: Path
) -> None:
    options = ("--calibration", toy_text, *FEW, "--device", "cuda")
    assert_refused(command("compress", toy_directory, "-o", tmp_path / "out", *options), "cuda")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("text", ["", " \n\t\n"], ids=["empty", "blank"])
def test_an_empty_text_is_refused(
    command: Command, toy_directory: Path, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(text, encoding="utf-8")
    options = ("-o", tmp_path / "out", "--calibration", path, *FEW)
    assert_refused(command("compress", toy_directory, *options), "text is empty")
    assert_refused(command("eval", toy_directory, "--text", path, "--quiet"), "text is empty")
    assert list(contents(tmp_path)) == ["empty.txt"]


@pytest.mark.parametrize("name", ["no-such-model", "no/such-model", "no-such-model.gguf"])
def test_a_missing_model_is_refused(
    command: Command, toy_text: Path, tmp_path: Path, name: str
) -> None:
    missing = tmp_path / name
    options = ("-o", tmp_path / "out", "--calibration", toy_text, *FEW)
    assert_refused(command("compress", missing, *options), str(missing))
    assert_refused(command("compress", name, *options), name)  # as a name on the hub
    assert_refused(command("eval", missing, "--text", toy_text, "--quiet"), str(missing))
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("missing", "part"),
    [
        ("model.safetensors", "model has no weights"),
        ("tokenizer*", "model has no tokenizer"),
        ("config.json", "model has no config.json"),
    ],
)
def test_an_incomplete_model_is_refused(
    command: Command,
    toy_directory: Path,
    toy_text: Path,
    tmp_path: Path,
    missing: str,
    part: str,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(toy_directory, model)
    for path in model.glob(missing):
        path.unlink()
    before = contents(tmp_path)
    options = ("-o", tmp_path / "out", "--calibration", toy_text, *FEW)
    assert_refused(command("compress", model, *options), part)
    assert contents(tmp_path) == before


def test_an_output_that_holds_something_is_refused_and_kept(
    command: Command, toy_directory: Path, toy_text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine", encoding="utf-8")
    options = ("-o", output, "--calibration", toy_text, *FEW)
    assert_refused(command("compress", toy_directory, *options), str(output), "overwrite")
    assert contents(tmp_path) == {"out": None, "out/notes.txt": b"mine"}


def test_an_output_that_is_a_file_is_refused_and_kept(
    command: Command, toy_directory: Path, toy_text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.write_text("mine", encoding="utf-8")
    options = ("-o", output, "--calibration", toy_text, *FEW, "--overwrite")
    assert_refused(command("compress", toy_directory, *options), str(output))
    assert contents(tmp_path) == {"out": b"mine"}


@pytest.mark.parametrize("name", ["info", "verify", "decompress"])
def test_a_directory_that_is_not_compressed_is_refused(
    command: Command, toy_directory: Path, tmp_path: Path, name: str
) -> None:
    more = ("-o", tmp_path / "out") if name == "decompress" else ()
    missing = tmp_path / "missing"
    assert_refused(command(name, toy_directory, *more), "no compressed model")
    assert_refused(command(name, missing, *more), str(missing))
    assert contents(tmp_path) == {}


def test_a_changed_byte_is_found(
    command: Command, compressed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(compressed[0], broken)
    weights = broken / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert_refused(command("verify", broken), "have changed")


@pytest.mark.parametrize(
    "options",
    [("--context-length", "1"), ("--stride", "0"), ("--max-windows", "0")],
    ids=lambda value: "".join(value),
)
def test_a_wrong_window_is_refused(
    command: Command, toy_directory: Path, toy_text: Path, options: Sequence[str]
) -> None:
    outcome = command("eval", toy_directory, "--text", toy_text, "--quiet", *options)
    assert_refused(outcome, options[0].strip("-").replace("-", "_"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("compress",),
        ("compress", "model"),
        ("compress", "model", "-o", "out", "--method", "magic"),
        ("compress", "model", "-o", "out", "--samples", "many"),
        ("info", "--no-such-option"),
        ("no-such-command",),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(command: Command, arguments: Sequence[str]) -> None:
    code, out, err = command(*arguments)
    assert code == 2
    assert out == ""
    assert "Error" in err


def test_an_interrupt_ends_with_130(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cerwu_gpu.api.compress", interrupted)
    outcome = command("compress", "model", "-o", tmp_path / "out")
    assert outcome == (130, "", "cerwu-gpu: interrupted.\n")
