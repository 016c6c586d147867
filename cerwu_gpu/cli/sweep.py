"""cerwu-gpu sweep: a grid of settings for one model, and what it takes to keep its quality."""

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args

import typer

from cerwu_gpu.cli import options
from cerwu_gpu.cli.output import print_json, set_verbosity
from cerwu_gpu.cli.sweep_tables import minimum_table, points_table, summary, time_words
from cerwu_gpu.config import (
    Quantizer,
    RateModel,
    Scale,
    Sensitivity,
    from_settings,
)
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.sweep.points import Axes, System, check_available, grid_points
from cerwu_gpu.sweep.run import HESSIANS, TABLE, check_folder, run_sweep

AXES = Axes()
HEADS = ("quantize", "keep")
DRIFTS = ("ignore", "correct")
TEXT = "wikitext2"
Value = TypeVar("Value")


def _joined(values: Sequence[object]) -> str:
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


SETTINGS = (
    *("calibration", "samples", "sequence_length", "batch_size", "passes", "damping", "damping_by"),
    *("include", "exclude", "seed"),
)
"""Settings that all points share."""


@options.with_settings(SETTINGS, before="device")
def sweep(
    model: options.Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Directory for the results; an unfinished sweep in it is resumed.",
        ),
    ],
    methods: Annotated[
        str, typer.Option(metavar="LIST", help=f"Methods, any of {_joined(get_args(System))}.")
    ] = _joined(AXES.systems),
    quantizer: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help=f"Quantizers for waterfilled, any of {_joined(get_args(Quantizer))}.",
        ),
    ] = _joined(AXES.quantizers),
    lmbda: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Rate-distortion trade-offs for waterfilled: loss accepted to save one bit.",
        ),
    ] = _joined(AXES.lmbdas),
    sensitivity: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help=f"Error weightings for waterfilled, any of {_joined(get_args(Sensitivity))}.",
        ),
    ] = _joined(AXES.sensitivities),
    levels: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Numbers of levels of the uniform grids (cerwu, cerwu-gamma0, optq, rtn).",
        ),
    ] = _joined(AXES.levels),
    uniform_lmbda: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Trade-offs for cerwu and cerwu-gamma0: output error accepted to save one bit.",
        ),
    ] = _joined(AXES.uniform_lmbdas),
    rate_model: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help=f"Rate models for cerwu and cerwu-gamma0, any of {_joined(get_args(RateModel))}.",
        ),
    ] = _joined(AXES.rate_models),
    scale: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Granularity of the abs-max scale of uniform grids: per-tensor or per-row; "
            "default: per-tensor for cerwu and cerwu-gamma0, per-row for optq and rtn.",
        ),
    ] = None,
    qp: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Quantization parameters for nncodec; adding 4 doubles the step size.",
        ),
    ] = _joined(AXES.qps),
    drift: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Drift correction for waterfilled: ignore, correct, or both; correct repeats the "
            "calibration for each point.",
        ),
    ] = "ignore",
    head: Annotated[
        str,
        typer.Option(metavar="LIST", help="Embedding and output head: quantize, keep, or both."),
    ] = "quantize",
    text: Annotated[
        str | None,
        typer.Option(
            help="Evaluation text: a text file, or wikitext2 for the test split of WikiText-2; "
            "default: wikitext2."
        ),
    ] = None,
    context_length: Annotated[int, typer.Option(help="Tokens per evaluation window.")] = 512,
    max_windows: options.MaxWindows = None,
    images: options.Images = None,
    device: options.Device = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the compressed model of each point.")
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON only.")] = False,
    quiet: options.Quiet = False,
    **settings: Any,
) -> None:
    """Compress MODEL with all combinations of a grid of settings and measure their perplexity.

    A LIST is comma-separated.
    """
    if images is not None and text is not None:
        raise ConfigError("images are for classifiers: drop text, or drop images.")
    given = options.given_settings(settings)
    base = from_settings(**given, limit_columns=0)  # a table has no place for it
    axes = Axes(
        systems=cast(tuple[System, ...], words("methods", methods, get_args(System))),
        quantizers=cast(tuple[Quantizer, ...], words("quantizer", quantizer, get_args(Quantizer))),
        lmbdas=numbers("lmbda", lmbda, float),
        sensitivities=cast(
            tuple[Sensitivity, ...], words("sensitivity", sensitivity, get_args(Sensitivity))
        ),
        levels=numbers("levels", levels, int),
        uniform_lmbdas=numbers("uniform_lmbda", uniform_lmbda, float),
        rate_models=cast(
            tuple[RateModel, ...], words("rate_model", rate_model, get_args(RateModel))
        ),
        scales=(
            () if scale is None else cast(tuple[Scale, ...], words("scale", scale, get_args(Scale)))
        ),
        qps=numbers("qp", qp, int),
        drifts=corrections(drift),
        keep_heads=tuple(choice == "keep" for choice in words("head", head, HEADS)),
    )
    points = grid_points(axes, base)
    check_available(points)
    set_verbosity(quiet=quiet)
    from cerwu_gpu.api import image_subject, text_subject  # after the settings: torch takes seconds
    from cerwu_gpu.hf.text import load_text, text_file

    output = output.expanduser()
    check_folder(
        output,
        {
            "the model": model,
            "the calibration text": text_file(base.text.named or ""),
            "the evaluation text": text_file(text or TEXT),
        },
    )
    with redirect_stdout(sys.stderr):  # whatever a library prints, stdout carries the result only
        base = replace(base, keep_head=all(axes.keep_heads))
        shared: dict[str, Any] = {
            "device": device,
            "progress": not quiet,
            "trust_remote_code": trust_remote_code,
        }
        if images is None:
            evaluation = load_text(text or TEXT, part="evaluation")
            subject = text_subject(
                model,
                base,
                evaluation,
                output / HESSIANS,
                context_length=context_length,
                max_windows=max_windows,
                **shared,
            )
        else:
            subject = image_subject(model, base, images, output / HESSIANS, **shared)
        rows = run_sweep(subject, points, output, keep=keep, progress=not quiet)
    if json:
        print_json({"table": str(output / TABLE), **summary(rows)})
        return
    typer.echo("\n\n".join([points_table(rows), minimum_table(rows), time_words(rows)]))
    typer.echo(f"\ntable: {output / TABLE}")


def corrections(drift: str) -> tuple[bool, ...]:
    """Return whether drift is corrected, for each word of a LIST.

    Raises:
        ConfigError: a word is not of DRIFTS.
    """
    return tuple(choice == "correct" for choice in words("drift", drift, DRIFTS))


def _values(name: str, text: str) -> list[str]:
    values = [part.strip() for part in text.split(",")]
    if "" in values:
        raise ConfigError(f"{name} is {text!r}: give values with commas between them.")
    return values


def words(name: str, text: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """Return the words of a LIST.

    Raises:
        ConfigError: one of them is not `allowed`.
    """
    given = _values(name, text)
    for word in given:
        if word not in allowed:
            raise ConfigError(f"{name} is {word!r}: choose from {', '.join(allowed)}.")
    return tuple(given)


def numbers(name: str, text: str, parse: Callable[[str], Value]) -> tuple[Value, ...]:
    """Return the numbers of a LIST.

    Raises:
        ConfigError: one of them is none, or refused by `parse`.
    """
    try:
        return tuple(parse(value) for value in _values(name, text))
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError(f"{name} is {text!r}: give numbers with commas between them.") from None
