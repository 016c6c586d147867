"""cerwu-gpu eval: the perplexity of a model, compressed or not, and of the one it came from."""

import sys
from contextlib import redirect_stdout
from time import perf_counter
from typing import Annotated

import typer

from cerwu_gpu.cli.output import listing, print_json, set_verbosity


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Compressed directory, hub name, model directory or .gguf file."
        ),
    ],
    text: Annotated[
        str, typer.Option(help="Text file, or wikitext2 for the test part of WikiText-2.")
    ] = "wikitext2",
    context_length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens from window to window; default: the context length."),
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option(help="Only so many windows; default: the whole text.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in work at a time.")] = 4,
    against: Annotated[
        str | None, typer.Option(metavar="ORIGINAL", help="Model to compare with.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default: a GPU where there is one.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own Python code.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON and nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Measure MODEL's perplexity on a text in sliding windows."""
    set_verbosity(quiet=quiet)
    from cerwu_gpu.hf.evaluation import perplexity
    from cerwu_gpu.hf.models import require_tokenizer
    from cerwu_gpu.hf.opening import open_model
    from cerwu_gpu.hf.text import load_text

    def measure(name: str) -> float:
        loaded = open_model(name, device=device, trust_remote_code=trust_remote_code)
        return perplexity(
            loaded.model,
            require_tokenizer(loaded.tokenizer),
            content,
            context_length=context_length,
            stride=stride,
            max_windows=max_windows,
            batch_size=batch_size,
            progress=not quiet,
        )

    begin = perf_counter()
    with redirect_stdout(sys.stderr):  # whatever a library prints, stdout carries the result only
        content = load_text(text, part="evaluation")
        measured = measure(model)
        original = None if against is None else measure(against)
    seconds = perf_counter() - begin
    if json:
        print_json(
            {
                "model": model,
                "perplexity": measured,
                "original": against,
                "original_perplexity": original,
                "text": text,
                "context_length": context_length,
                "stride": stride or context_length,
                "max_windows": max_windows,
                "seconds": seconds,
            }
        )
        return
    rows = [("model", model), ("perplexity", f"{measured:.4f}")]
    if against is not None and original is not None:
        rows += [
            ("original", against),
            ("perplexity of the original", f"{original:.4f}"),
            ("increase", f"{measured / original - 1:+.2%}"),
        ]
    typer.echo(listing([*rows, ("seconds", f"{seconds:.1f}")]))
