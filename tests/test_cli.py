"""The command line from end to end, on a toy model; wrong input is in test_cli_wrong_input.py."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import cerwu_gpu
from cerwu_gpu.cli.output import listing, print_json, size, table
from cerwu_gpu.config import all_settings

ROOT = Path(__file__).resolve().parents[1]
Command = Callable[..., Any]
FEW = ("--samples", "4", "--sequence-length", "32", "--quiet")


def test_compress_json_is_the_report(compressed: tuple[Path, dict[str, Any]]) -> None:
    output, report = compressed
    names = {field.name for field in dataclasses.fields(cerwu_gpu.Report)}
    assert set(report) == names
    files = [path for path in output.rglob("*") if path.is_file()]
    assert report["directory_bytes"] == sum(path.stat().st_size for path in files)
    assert len(report["layers"]) == 2 * 7 + 1  # two blocks, and the tied head
    bits = [8 * (layer["words_bytes"] + layer["side_bytes"]) for layer in report["layers"]]
    weights = [layer["shape"][0] * layer["shape"][1] for layer in report["layers"]]
    assert report["bits_per_weight"] == pytest.approx(sum(bits) / sum(weights))


def test_compress_ends_with_a_table(
    command: Command, toy_directory: Path, toy_text: Path, tmp_path: Path
) -> None:
    calibration = ("--calibration", toy_text, *FEW)
    code, out, _ = command("compress", toy_directory, "-o", tmp_path / "small", *calibration)
    assert code == 0
    for line in (
        r"bits per quantized weight +\d",
        r"compressed directory +[\d,]+ bytes",
        r"original +[\d,]+ bytes",
        r"seconds in all +\d",
        r"events: ",
    ):
        assert re.search(rf"^{line}", out, re.MULTILINE), line


def test_two_calibration_texts_are_in_the_command_that_repeats_the_run(
    command: Command, toy_directory: Path, toy_text: Path, tmp_path: Path
) -> None:
    texts = ("--calibration", f"{toy_text}:0.75", "--calibration", "self:0.25")
    code, _, _ = command("compress", toy_directory, "-o", tmp_path / "small", *texts, *FEW)
    assert code == 0
    report = json.loads((tmp_path / "small.report.json").read_text(encoding="utf-8"))
    assert report["settings"]["calibration"] == [f"{toy_text}:0.75", "self:0.25"]
    assert " ".join(texts) in report["command"]
    assert f"calibration=('{toy_text}:0.75', 'self:0.25')" in report["python"]


def test_quiet_leaves_stderr_empty_of_the_libraries_bars_too(
    toy_directory: Path, toy_text: Path, tmp_path: Path
) -> None:
    environment = {k: v for k, v in os.environ.items() if "PROGRESS" not in k and "TQDM" not in k}
    arguments = (toy_directory, "-o", tmp_path / "small", "--calibration", toy_text, *FEW)
    run = subprocess.run(
        [sys.executable, ROOT / "scripts" / "compress.py", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_info_accounts_for_every_byte(
    command: Command, compressed: tuple[Path, dict[str, Any]]
) -> None:
    directory, report = compressed
    code, out, _ = command("info", directory, "--json")
    content = json.loads(out)
    parts = [*content["tensors"], *content["files"]]
    assert code == 0
    assert sum(part["bytes"] for part in parts) == content["total_bytes"]
    assert content["total_bytes"] == report["directory_bytes"]
    losses = {layer["name"]: layer["relative_loss"] for layer in report["layers"]}
    stored = {entry["name"]: entry["relative_loss"] for entry in content["tensors"]}
    assert losses == pytest.approx({name: stored[name] for name in losses}, rel=1e-3)


def test_info_prints_one_row_per_part_and_their_sum(
    command: Command, compressed: tuple[Path, dict[str, Any]]
) -> None:
    directory, _ = compressed
    code, out, _ = command("info", directory)
    rows = [line.split() for line in out.split("\n\n")[0].splitlines()[2:]]
    *parts, total = [int(row[-1].replace(",", "")) for row in rows]
    assert code == 0
    assert rows[-1][0] == "total"
    assert sum(parts) == total
    assert {"model.layers.1.mlp.down_proj.weight", "config.json"} <= {row[0] for row in rows}


def test_verify_accepts_what_compress_wrote(
    command: Command, compressed: tuple[Path, dict[str, Any]]
) -> None:
    assert command("verify", compressed[0])[0] == 0


def test_eval_compares_with_the_original(
    command: Command,
    compressed: tuple[Path, dict[str, Any]],
    toy_directory: Path,
    toy_text: Path,
) -> None:
    windows = ("--context-length", "32", "--stride", "16", "--max-windows", "4", "--quiet")
    options = ("--text", toy_text, *windows, "--device", "cpu")
    code, out, _ = command("eval", compressed[0], *options, "--against", toy_directory, "--json")
    result = json.loads(out)
    assert code == 0

    from transformers import AutoModelForCausalLM, AutoTokenizer

    for model, key in (
        (cerwu_gpu.load_compressed(compressed[0], device="cpu"), "perplexity"),
        (AutoModelForCausalLM.from_pretrained(toy_directory), "original_perplexity"),
    ):
        expected = cerwu_gpu.perplexity(
            model,
            AutoTokenizer.from_pretrained(toy_directory),
            toy_text.read_text(encoding="utf-8"),
            context_length=32,
            stride=16,
            max_windows=4,
        )
        assert result[key] == pytest.approx(expected, rel=1e-5)

    code, out, _ = command("eval", compressed[0], *options, "--against", toy_directory)
    assert code == 0
    assert re.search(rf"^perplexity +{result['perplexity']:.4f}$", out, re.MULTILINE)


def test_decompress_writes_the_weights_that_load_compressed_gives(
    command: Command, compressed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    code, _, _ = command("decompress", compressed[0], "-o", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto").state_dict()
    loaded = cerwu_gpu.load_compressed(compressed[0], device="cpu").state_dict()
    assert code == 0
    assert plain.keys() == loaded.keys()
    assert all(torch.equal(plain[name], loaded[name]) for name in plain)


def test_overwrite_replaces_a_compressed_model(
    command: Command,
    compressed: tuple[Path, dict[str, Any]],
    toy_directory: Path,
    toy_text: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "small"
    shutil.copytree(compressed[0], output)
    (output / "LICENSE").write_text("old", encoding="utf-8")
    options = ("-o", output, "--calibration", toy_text, *FEW, "--overwrite")
    assert command("compress", toy_directory, *options)[0] == 0
    assert (output / "config.json").is_file()
    assert not (output / "LICENSE").exists()


def test_every_setting_is_an_option(command: Command) -> None:
    _, out, _ = command("compress", "--help")
    for name in all_settings():
        assert f"--{name.replace('_', '-')} " in out, name


def test_a_grid_comes_from_a_file_or_from_the_option(tmp_path: Path) -> None:
    from cerwu_gpu.cli.options import parse_grid

    path = tmp_path / "grid.txt"
    path.write_text("-1.5 -0.5\n0, 0.5\n1.5\n", encoding="utf-8")
    assert parse_grid(str(path)) == parse_grid("-1.5,-0.5,0,0.5,1.5") == (-1.5, -0.5, 0, 0.5, 1.5)
    many = ",".join(map(str, range(2000)))  # too long for a file's name
    assert parse_grid(many) == tuple(range(2000))


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        (("-m", "cerwu_gpu"), ("--version",), f"cerwu-gpu {cerwu_gpu.__version__}"),
        ((ROOT / "scripts/compress.py",), ("--help",), "Usage: cerwu-gpu compress"),
        ((ROOT / "scripts/evaluate.py",), ("--help",), "Usage: cerwu-gpu eval"),
    ],
    ids=["module", "compress", "evaluate"],
)
def test_the_other_ways_to_start_it(
    script: tuple[str | Path, ...], arguments: Sequence[str], expected: str, tmp_path: Path
) -> None:
    """The scripts run from anywhere, whether or not the package is installed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT) if script[0] == "-m" else ""}
    result = subprocess.run(
        [sys.executable, *script, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": float("nan"), "bits": [1.5, float("inf")]})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "bits": [1.5, None]}


def test_sizes_are_exact_and_readable() -> None:
    assert size(999) == "999 bytes"
    assert size(79_331_204) == "79,331,204 bytes (79.3 MB)"


def test_a_table_lines_its_columns_up() -> None:
    assert table(("x", "y"), [("a", "1"), ("bcd", "22")]) == "x     y\n-------\na     1\nbcd  22"
    assert listing([("a", "1"), ("bcd", "22")]) == "a    1\nbcd  22"
