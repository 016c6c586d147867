"""Tasks of lm-eval, run by lm-eval itself on a data set that needs no network."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cerwu_gpu.errors import ConfigError
from cerwu_gpu.hf.evaluation import task_results
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
    rows = tmp_path / "rows.jsonl"
    question = {"start": "the gulls follow", "words": [" them", " zzz"]}
    rows.write_text("".join(json.dumps({**question, "right": n % 2}) + "\n" for n in range(4)))
    path = tmp_path / "next_word.yaml"
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


def test_without_lm_eval_the_remedy_is_named_before_anything_is_loaded(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # makes `import lm_eval` an ImportError
    code, out, error = command("eval", tmp_path / "none", "--tasks", "arc_easy", "--quiet")
    assert (code, out) == (2, "")
    assert error.strip().endswith("not installed: pip install 'cerwu_gpu[eval]'.")
