"""cerwu-gpu sweep: compress a model with a grid of settings, and compare their qualities."""

import sys
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cerwu_gpu.cli import options
from cerwu_gpu.cli.axes import take_axes, with_axes
from cerwu_gpu.cli.output import (
    is_told_by_another_rank,
    print_json,
    set_verbosity,
    told_once,
)
from cerwu_gpu.cli.sweep_tables import minimum_table, points_table, summary, time_words
from cerwu_gpu.config import Distillation, from_settings
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.files import resolved
from cerwu_gpu.sweep.points import Axes, check_available, grid_points
from cerwu_gpu.sweep.run import HESSIANS, TABLE, check_folder, run_sweep

if TYPE_CHECKING:
    from cerwu_gpu.sweep.model import ModelSubject

TEXT = "wikitext2"
"""Default evaluation text."""
SETTINGS = (
    *("calibration", "samples", "sequence_length", "batch_size", "images", "passes", "damping"),
    *("damping_by", "include", "exclude", "seed"),
)
"""Settings that all points share."""


@options.closed
@options.with_settings(SETTINGS, before="device")
@with_axes(before="text")
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
    text: Annotated[
        str | None,
        typer.Option(
            help="Evaluation text: a text file, or wikitext2 for the test split of WikiText-2; "
            "default: wikitext2."
        ),
    ] = None,
    context_length: Annotated[int, typer.Option(help="Tokens per evaluation window.")] = 512,
    max_windows: options.MaxWindows = None,
    max_images: options.MaxImages = None,
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
    axes = take_axes(settings)
    given = options.given_settings(settings)
    images = given.get("images")
    if images is not None:
        options.refuse_beside_images(
            {
                "text": (text, None),
                "context_length": (context_length, 512),
                "max_windows": (max_windows, None),
                "head": (axes.keep_heads, Axes().keep_heads),
            }
        )
    elif max_images is not None:
        raise ConfigError("max_images is of images: give images, too.")
    base = from_settings(**given, limit_columns=0)  # a table has no place for it
    points = grid_points(axes, base)
    check_available(points)
    set_verbosity(quiet=quiet or is_told_by_another_rank())
    from cerwu_gpu.api import image_subject, text_subject  # after the settings: torch takes seconds
    from cerwu_gpu.hf.sources import calibration_files
    from cerwu_gpu.hf.text import load_text, text_file
    from cerwu_gpu.ranks import joined

    output = resolved(output)
    steps = max(axes.distillations)
    base = replace(
        base,
        keep_head=all(axes.keep_heads),
        distillation=Distillation(steps=steps) if steps else None,
    )
    read = {
        "the model": model,
        **calibration_files(base),
        "the evaluation text": text_file(text or TEXT),
        "the images": images,
    }
    with ExitStack() as stack:
        # stdout is for the result, not for a library's messages
        stack.enter_context(redirect_stdout(sys.stderr))
        ranks = stack.enter_context(joined(device))
        stack.enter_context(told_once(ranks))
        ranks.from_first(partial(check_folder, output, read))
        hessians = output / HESSIANS
        if not ranks.local:
            hessians = Path(stack.enter_context(TemporaryDirectory()))
        shown = not quiet and ranks.first

        def subject() -> "ModelSubject":
            shared: dict[str, Any] = {
                "device": ranks.device,
                "progress": shown,
                "trust_remote_code": trust_remote_code,
            }
            if images is not None:
                return image_subject(model, base, hessians, max_images=max_images, **shared)
            return text_subject(
                model,
                base,
                load_text(text or TEXT, part="evaluation"),
                hessians,
                context_length=context_length,
                max_windows=max_windows,
                **shared,
            )

        rows = run_sweep(
            ranks.agree(subject), points, output, keep=keep, progress=shown, ranks=ranks
        )
    if not ranks.first:
        return
    if json:
        print_json({"table": str(output / TABLE), **summary(rows)})
        return
    typer.echo("\n\n".join([points_table(rows), minimum_table(rows), time_words(rows)]))
    typer.echo(f"\ntable: {output / TABLE}")
