"""cerwu-gpu compress: compress a model and print its report."""

import sys
from contextlib import redirect_stdout
from os.path import expanduser, isfile  # unlike Path.is_file it takes text too long for a name
from pathlib import Path
from typing import Annotated, Any

import typer

from cerwu_gpu.cli import options
from cerwu_gpu.cli.output import (
    is_told_by_another_rank,
    listing,
    print_events,
    print_json,
    report_rows,
    set_verbosity,
    told_once,
)
from cerwu_gpu.config import all_settings, from_settings
from cerwu_gpu.container.output import check_apart
from cerwu_gpu.container.work import output_places
from cerwu_gpu.files import resolved


@options.closed
@options.with_settings(all_settings(), before="device")
def compress(
    context: typer.Context,
    model: options.Model,
    output: options.Output,
    device: options.Device = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace an existing compressed model; other files are never replaced.",
        ),
    ] = False,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart", help="Discard the progress of an unfinished run instead of resuming it."
        ),
    ] = False,
    hessian_cache: Annotated[
        Path | None, typer.Option(help="Directory to cache Hessians in, for reuse by later runs.")
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Skip the final check that decodes the output.")
    ] = False,
    card: Annotated[
        bool, typer.Option("--card", help="Write a model card for the Hub (README.md).")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Directory for report.json and report.html; default: OUTPUT.report.json and "
            "OUTPUT.report.html beside the output.",
        ),
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON only.")] = False,
    quiet: options.Quiet = False,
    **settings: Any,
) -> None:
    """Compress MODEL into a directory for load_compressed, info, eval and decompress."""
    config = from_settings(
        **options.given_settings(options.typed(context, settings)),
        hessian_cache=hessian_cache,
        verify=not no_verify,
    )
    grid = settings["grid"]
    places = output_places(resolved(output))
    read = {"the grid": grid if grid is not None and isfile(expanduser(grid)) else None}
    check_apart(places, {**read, "the images": settings["images"]})
    set_verbosity(quiet=quiet or is_told_by_another_rank())
    from cerwu_gpu.api import compress as run  # after the settings: torch takes seconds
    from cerwu_gpu.compression.report_files import report_paths
    from cerwu_gpu.ranks import joined

    # stdout is for the result, not for a library's messages
    with redirect_stdout(sys.stderr), joined(device) as ranks, told_once(ranks):
        result = run(
            model,
            output,
            config=config,
            device=ranks,
            overwrite=overwrite,
            restart=restart,
            card=card,
            report=report,
            progress=not quiet,
            trust_remote_code=trust_remote_code,
        )
    if not ranks.first:
        return
    if json:
        print_json(result.to_dict())
        return
    _, page = report_paths(resolved(output), report)
    rows = [("output", str(output)), ("report", str(page)), *report_rows(result)]
    typer.echo(listing(rows))
    print_events(result.events)
