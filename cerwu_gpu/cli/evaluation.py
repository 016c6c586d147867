"""cerwu-gpu eval: measure a model's quality and its distance from its original."""

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cerwu_gpu.cli import options
from cerwu_gpu.cli.output import listing, print_json, set_verbosity, table
from cerwu_gpu.errors import ConfigError

if TYPE_CHECKING:
    from cerwu_gpu.hf.models import LoadedModel

TEXT = "wikitext2"
Results = dict[str, dict[str, float]]
"""Results by task and metric."""


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Compressed directory, Hub model id, model directory or .gguf file.",
        ),
    ],
    text: Annotated[
        str | None,
        typer.Option(
            help="Evaluation text: a text file, or wikitext2 for the test split of WikiText-2; "
            "default: wikitext2, unless --tasks is given."
        ),
    ] = None,
    context_length: Annotated[int, typer.Option(help="Tokens per evaluation window.")] = 512,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens between window starts; default: the context length."),
    ] = None,
    max_windows: options.MaxWindows = None,
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.")] = 4,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="ORIGINAL", help="Original model to compare with; both are held in memory."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Comma-separated lm-eval tasks; requires lm-eval."),
    ] = None,
    examples: Annotated[
        int | None, typer.Option(help="Maximum number of examples per task; default: all.")
    ] = None,
    images: options.Images = None,
    max_images: options.MaxImages = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure the perplexity of MODEL on a text with sliding windows, and run lm-eval tasks.

    With --against, evaluate both models on the same tokens and report the mean KL divergence
    KL(original || MODEL) and the top-1 agreement; of embedding models the mean cosine.
    """
    set_verbosity(quiet=quiet)
    from cerwu_gpu.hf.evaluation import check_tasks_available, task_results
    from cerwu_gpu.hf.models import require_tokenizer
    from cerwu_gpu.hf.text import load_text
    from cerwu_gpu.serving.loading import open_model

    if images is not None:
        options.refuse_beside_images(
            {
                "text": (text, None),
                "tasks": (tasks, None),
                "examples": (examples, None),
                "context_length": (context_length, 512),
                "stride": (stride, None),
                "max_windows": (max_windows, None),
            }
        )
    elif max_images is not None:
        raise ConfigError("max_images is of images: give images, too.")
    names = [task.strip() for task in tasks.split(",")] if tasks is not None else []
    text = text or (None if names or images is not None else TEXT)
    begin = perf_counter()
    with redirect_stdout(sys.stderr):  # stdout is for the result, not for a library's messages
        if names:
            check_tasks_available()
        content = None if text is None else load_text(text, part="evaluation")
        pair = [
            open_model(name, device=device, trust_remote_code=trust_remote_code)
            for name in (model, against)
            if name is not None
        ]
        numbers: dict[str, Any] = {}
        if content is not None:
            numbers = _on_text(
                pair, content, context_length, stride, max_windows, batch_size, not quiet
            )
        if images is not None:
            numbers = _on_images(model, pair, images, max_images, batch_size)
        results: list[Results | None] = [None, None]
        for place, loaded in enumerate(pair if names else ()):
            results[place] = task_results(
                loaded.model,
                require_tokenizer(loaded.tokenizer or pair[0].tokenizer),
                names,
                batch_size=batch_size,
                examples=examples,
            )
    scores, original_scores = results
    seconds = perf_counter() - begin
    if json:
        print_json(
            {
                "model": model,
                "original": against,
                **numbers,
                "tasks": scores,
                "original_tasks": original_scores,
                "text": text,
                "context_length": context_length,
                "stride": stride or context_length,
                "max_windows": max_windows,
                "seconds": seconds,
            }
        )
        return
    rows = [("model", model), *([("original", against)] if against is not None else [])]
    typer.echo(listing([*rows, *_in_words(numbers), ("seconds", f"{seconds:.1f}")]))
    if scores is not None:
        typer.echo(f"\n{_task_table(scores, original_scores)}")


def _on_text(
    pair: "list[LoadedModel]",
    content: str,
    context_length: int,
    stride: int | None,
    max_windows: int | None,
    batch_size: int,
    progress: bool,
) -> dict[str, Any]:
    """Return the perplexity of a model, or the fields of a Comparison or a Divergence of two."""
    from cerwu_gpu.hf.divergence import divergence, is_compared_by_divergence
    from cerwu_gpu.hf.evaluation import check_same_tokens, compare, perplexity
    from cerwu_gpu.hf.models import require_tokenizer

    settings: dict[str, Any] = {
        "context_length": context_length,
        "stride": stride,
        "max_windows": max_windows,
        "batch_size": batch_size,
        "progress": progress,
    }
    tokenizer = require_tokenizer(pair[0].tokenizer)
    if is_compared_by_divergence(pair[0]):
        if settings.pop("stride") is not None:
            raise ConfigError("stride is of models that predict a next or masked token: drop it.")
        original = pair[1] if len(pair) == 2 else None
        if original is not None:
            check_same_tokens(tokenizer, original.tokenizer, content)
        result = asdict(divergence(pair[0], original, content, **settings))
        return {field: value for field, value in result.items() if value is not None}
    if len(pair) == 1:
        return {"perplexity": perplexity(pair[0].model, tokenizer, content, **settings)}
    check_same_tokens(tokenizer, pair[1].tokenizer, content)
    return asdict(compare(pair[0].model, pair[1].model, tokenizer, content, **settings))


def _on_images(
    name: str, pair: "list[LoadedModel]", images: str, count: int | None, batch_size: int
) -> dict[str, Any]:
    """Return the accuracy of a classifier, or the fields of an ImageComparison of two."""
    from cerwu_gpu.hf.images import compare_on_images, load_images

    known = pair[0].model.config.label2id or {}
    labels = {name: int(number) for name, number in known.items()}
    pixels = load_images(
        images, name, part="evaluation", labels=labels, count=count, batch_size=batch_size
    )
    original = pair[1].model if len(pair) == 2 else None
    compared = asdict(compare_on_images(pair[0].model, pixels, original))
    return {field: value for field, value in compared.items() if value is not None}


def _in_words(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if "accuracy" in numbers:
        rows.append(("accuracy", f"{numbers['accuracy']:.2%}"))
        if "original_accuracy" in numbers:
            rows += [
                ("accuracy of the original", f"{numbers['original_accuracy']:.2%}"),
                ("mean KL divergence", f"{numbers['kl_divergence']:.6f} nats per image"),
                ("top-1 agreement", f"{numbers['top1_agreement']:.2%}"),
            ]
        rows.append(("images", f"{numbers['images']:,}"))
    if "perplexity" in numbers:
        rows.append(("perplexity", f"{numbers['perplexity']:.4f}"))
    if "cosine" in numbers:
        rows.append(("mean cosine of the embeddings", f"{numbers['cosine']:.6f}"))
    if "rms_difference" in numbers:
        rows.append(("root mean square of the difference", f"{numbers['rms_difference']:.6f}"))
    if "original_perplexity" in numbers:
        increase = numbers["perplexity"] / numbers["original_perplexity"] - 1
        rows += [
            ("perplexity of the original", f"{numbers['original_perplexity']:.4f}"),
            ("increase", f"{increase:+.2%}"),
        ]
    if "kl_divergence" in numbers and "accuracy" not in numbers:
        each = "token" if "perplexity" in numbers else "label"
        rows += [
            ("mean KL divergence", f"{numbers['kl_divergence']:.6f} nats per {each}"),
            ("top-1 agreement", f"{numbers['top1_agreement']:.2%}"),
        ]
    if "tokens" in numbers:
        rows.append(("predicted tokens", f"{numbers['tokens']:,}"))
    if "predictions" in numbers:
        rows.append(("predictions", f"{numbers['predictions']:,}"))
    return rows


def _task_table(results: Results, original: Results | None) -> str:
    header = ["task", "metric", "value", *(["original"] if original is not None else [])]
    rows = [
        [task, metric, f"{value:.4f}"]
        + ([] if original is None else [f"{original[task][metric]:.4f}"])
        for task, metrics in results.items()
        for metric, value in metrics.items()
    ]
    return table(header, rows)
