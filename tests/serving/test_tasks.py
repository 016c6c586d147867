"""Tasks of lm-eval, run by lm-eval itself on a data set that needs no network."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cerwu_gpu import load_compressed
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.hf.evaluation import task_results
from cerwu_gpu.hf.models import load_tokenizer
from tests.hf.toys import toy

TASK = """\
task: next_word
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{words}}}}"
doc_to_target: right
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task of four questions; lm-eval must be installed."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return question(tmp_path)


def question(folder: Path) -> Path:
    """The file of a task that asks the same question four times, written to a folder."""
    rows = folder / "rows.jsonl"
    asked = {"start": "the gulls follow", "words": [" them", " zzz"]}
    rows.write_text("".join(json.dumps({**asked, "right": n % 2}) + "\n" for n in range(4)))
    path = folder / "next_word.yaml"
    path.write_text(TASK.format(rows=rows))
    return path


def test_a_task_is_run_by_lm_eval(task: Path, toy_tokenizer: Any) -> None:
    results = task_results(toy("llama"), toy_tokenizer, [str(task)])
    # The same two answers four times, and each of them is right every other time.
    assert results["next_word"]["acc"] == 0.5
    first = task_results(toy("llama"), toy_tokenizer, [str(task)], examples=1)
    assert first["next_word"]["acc"] in (0.0, 1.0)


def test_eval_prints_tasks_of_both_models_and_needs_no_text(
    task: Path,
    command: Callable[..., Any],
    compressed: tuple[Path, dict[str, Any]],
    toy_directory: Path,
) -> None:
    options = ("--tasks", task, "--against", toy_directory, "--device", "cpu", "--quiet")
    code, out, _ = command("eval", compressed[0], *options, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["tasks"]["next_word"]["acc"] == 0.5
    assert result["original_tasks"]["next_word"]["acc"] == 0.5
    assert result["text"] is None
    assert "perplexity" not in result
    code, out, _ = command("eval", compressed[0], *options)
    assert code == 0
    assert ["next_word", "acc", "0.5000", "0.5000"] in [line.split() for line in out.splitlines()]


@pytest.mark.parametrize(
    "name", ["none.yaml", pytest.param("none", marks=pytest.mark.slow)], ids=["file", "name"]
)
def test_an_unknown_task_is_one_sentence(name: str, task: Path, toy_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=rf"lm-eval cannot run {name} \(.*: check the names"):
        task_results(toy("llama"), toy_tokenizer, [name])


@pytest.mark.slow
@pytest.mark.parametrize("resident", ["dense", "compressed"])
def test_the_command_of_lm_eval_knows_compressed_directories(
    resident: str, task: Path, compressed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "cerwu_gpu.serving.lm_eval",
        "--model",
        "cerwu",
        "--tasks",
        task,
    ]
    options = ["--model_args", f"pretrained={compressed[0]},resident={resident}", "--limit", "1"]
    options += ["--log_samples", "--output_path", tmp_path / "out"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("samples_next_word_*.jsonl")
    (sample,) = map(json.loads, file.read_text("utf-8").splitlines())
    assert "there is no CUDA device here" in done.stderr or torch.cuda.is_available()
    answers = [float(response[0]) for (response,) in sample["resps"]]
    model, tokenizer = load_compressed(compressed[0]), load_tokenizer(compressed[0], False)
    asked = [tuple(one.values()) for one in sample["arguments"].values()]
    expected = [log_likelihood(model, tokenizer, *one) for one in asked]
    assert answers == pytest.approx(expected, abs=1e-4)


def log_likelihood(model: Any, tokenizer: Any, start: str, word: str) -> float:
    """The logarithm of a word's probability after a start, in nats."""
    tokens = torch.tensor(tokenizer(start + word).input_ids)
    first = len(tokenizer(start).input_ids)
    with torch.no_grad():
        logs = model(tokens[None, :-1]).logits[0, first - 1 :].log_softmax(dim=-1)
    return float(logs.gather(1, tokens[first:, None]).sum())


def test_without_lm_eval_the_remedy_is_named_before_anything_is_loaded(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # makes `import lm_eval` an ImportError
    code, out, error = command("eval", tmp_path / "none", "--tasks", "arc_easy", "--quiet")
    assert (code, out) == (2, "")
    assert error.strip().endswith("not installed: pip install 'cerwu_gpu[eval]'.")
