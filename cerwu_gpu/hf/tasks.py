"""Tasks of the LM Evaluation Harness (lm-eval), run by its own code."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cerwu_gpu.errors import ConfigError, reason

TASK_SUFFIXES = (".yaml", ".yml")


def task_results(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int = 4,
    examples: int | None = None,
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, as `lm_eval.simple_evaluate` names and computes them.

    Args:
        model: where it is; lm-eval leaves it there.
        tasks: names that lm-eval knows, or files of tasks (.yaml).
        batch_size: requests in work at a time.
        examples: only so many of each task; None: all.

    Raises:
        ConfigError: lm-eval is not installed, a task is unknown, or it cannot be run (its data
            set cannot be fetched).
    """
    check_available()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    named = [str(Path(t).absolute()) if t.endswith(TASK_SUFFIXES) else t for t in tasks]
    try:
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=named,
            task_manager=_task_manager(not all(t.endswith(TASK_SUFFIXES) for t in tasks)),
            limit=examples,
            log_samples=False,
        )
    except Exception as error:  # whatever a task's data set or code raises
        raise ConfigError(
            f"lm-eval cannot run {', '.join(tasks)} ({reason(error)}): check the names "
            "(`lm-eval ls tasks`) and the network."
        ) from error
    results: dict[str, dict[str, object]] = found["results"]
    return {task: _metrics(values) for task, values in results.items()}


@cache
def _task_manager(named: bool) -> Any:
    """What lm-eval knows of tasks; with its own ones, `named`, it reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=named)


def check_available() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ConfigError(
            "tasks need lm-eval, which is not installed: pip install 'cerwu_gpu[eval]'."
        ) from None


def _metrics(values: dict[str, object]) -> dict[str, float]:
    """The numbers of a task; "acc,none" is called "acc", other filters keep their name."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if "," in name and isinstance(value, int | float)
    }
