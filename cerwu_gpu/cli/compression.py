"""cerwu-gpu compress: a model in, a compressed directory and a table out."""

import re
import sys
from contextlib import redirect_stdout
from os.path import isfile  # unlike Path.is_file it takes text too long for a name
from pathlib import Path
from typing import Annotated

import typer

from cerwu_gpu.cli import options
from cerwu_gpu.cli.output import listing, print_events, print_json, report_rows, set_verbosity
from cerwu_gpu.config import (
    CompressionConfig,
    Method,
    Quantizer,
    RateModel,
    Scale,
    Sensitivity,
)
from cerwu_gpu.container.output import check_apart
from cerwu_gpu.container.work import output_places
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.quantities import parse_share, parse_size

DEFAULT = CompressionConfig()


def compress(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory to write; must be new or empty.")
    ],
    method: Annotated[
        Method, typer.Option(help="Rounding rule; optq has lmbda 0, rtn no Hessian.")
    ] = DEFAULT.method,
    lmbda: Annotated[
        float, typer.Option(help="Output error worth paying for one bit: more makes it smaller.")
    ] = DEFAULT.lmbda,
    levels: Annotated[
        int | None,
        typer.Option(help="Uniform grid with so many levels by abs-max; default: steps by column."),
    ] = DEFAULT.levels,
    grid: Annotated[
        str | None,
        typer.Option(help="Sorted grid values: a file of numbers, or numbers with commas."),
    ] = None,
    scale: Annotated[
        Scale, typer.Option(help="What abs-max is taken over, with --levels or --grid.")
    ] = DEFAULT.scale,
    quantizer: Annotated[Quantizer, typer.Option(help="Kind of quantizer.")] = DEFAULT.quantizer,
    rate_model: Annotated[
        RateModel, typer.Option(help="What the search takes bits to be; others need a given grid.")
    ] = DEFAULT.rate_model,
    bits: Annotated[
        float | None, typer.Option(help="Wanted bits per quantized weight; sets lmbda.")
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Most bytes of the directory, e.g. 60MB; sets lmbda."),
    ] = None,
    max_perplexity_increase: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Most growth of the perplexity, e.g. 2%; sets lmbda."),
    ] = None,
    sensitivity: Annotated[
        Sensitivity, typer.Option(help="What an output's error costs: by layer, by row, or alike.")
    ] = DEFAULT.sensitivity,
    passes: options.Passes = DEFAULT.passes,
    damping: options.Damping = DEFAULT.damping,
    damping_by: options.DampingBy = DEFAULT.damping_by,
    block_size: Annotated[int, typer.Option(help="Columns per lazy block.")] = DEFAULT.block_size,
    include: options.Include = None,
    exclude: options.Exclude = None,
    keep_head: Annotated[
        bool, typer.Option("--keep-head", help="Leave the embedding and the head as they are.")
    ] = DEFAULT.keep_head,
    calibration: options.Calibration = DEFAULT.calibration,
    samples: options.Samples = DEFAULT.samples,
    sequence_length: options.SequenceLength = DEFAULT.sequence_length,
    batch_size: options.CalibrationBatch = DEFAULT.batch_size,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Calibrate on the already quantized blocks.")
    ] = DEFAULT.sequential,
    correct_drift: Annotated[
        bool | None,
        typer.Option(
            "--correct-drift/--ignore-drift",
            help="Quantize for the compressed model's own inputs; default: yes, unless --levels, "
            "--sequential or --hessian-cache is given.",
        ),
    ] = DEFAULT.correct_drift,
    seed: options.Seed = DEFAULT.seed,
    limit_columns: Annotated[
        int, typer.Option(help="Report the theoretical limit of matrices up to so wide; 0: none.")
    ] = DEFAULT.limit_columns,
    strict: Annotated[
        bool, typer.Option("--strict", help="Turn every event of the report into an error.")
    ] = DEFAULT.strict,
    device: options.Device = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a compressed model; nothing else ever is.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, not where an unfinished run stopped.")
    ] = False,
    hessian_cache: Annotated[
        Path | None, typer.Option(help="Directory in which Hessians are kept for the next run.")
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not decode the result once more at the end.")
    ] = False,
    card: Annotated[
        bool, typer.Option("--card", help="Write a model card for the Hub: README.md.")
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
    json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON and nothing else.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Compress MODEL into a directory that load_compressed, info and eval read."""
    config = CompressionConfig(
        method=method,
        lmbda=lmbda,
        levels=levels,
        grid=None if grid is None else parse_grid(grid),
        scale=scale,
        quantizer=quantizer,
        rate_model=rate_model,
        passes=passes,
        damping=damping,
        damping_by=damping_by,
        sensitivity=sensitivity,
        bits=bits,
        max_size=None if max_size is None else parse_size(max_size),
        max_perplexity_increase=(
            None if max_perplexity_increase is None else parse_share(max_perplexity_increase)
        ),
        block_size=block_size,
        include=tuple(include or DEFAULT.include),
        exclude=tuple(exclude or DEFAULT.exclude),
        keep_head=keep_head,
        calibration=calibration,
        samples=samples,
        sequence_length=sequence_length,
        batch_size=batch_size,
        sequential=sequential,
        correct_drift=correct_drift,
        seed=seed,
        limit_columns=limit_columns,
        strict=strict,
    )
    if grid is not None and isfile(grid):
        check_apart(output_places(output.expanduser().resolve()), {"the grid": Path(grid)})
    set_verbosity(quiet=quiet)
    from cerwu_gpu.hf.compression import compress as run  # after the settings: torch takes seconds
    from cerwu_gpu.hf.report_files import report_paths

    with redirect_stdout(sys.stderr):  # whatever a library prints, stdout carries the result only
        done = run(
            model,
            output,
            config=config,
            device=device,
            overwrite=overwrite,
            restart=restart,
            hessian_cache=hessian_cache,
            verify=not no_verify,
            card=card,
            report=report,
            progress=not quiet,
            trust_remote_code=trust_remote_code,
        )
    if json:
        print_json(done.to_dict())
        return
    _, page = report_paths(output.expanduser().resolve(), report)
    rows = [("output", str(output)), ("report", str(page)), *report_rows(done)]
    typer.echo(listing(rows))
    print_events(done.events)


def parse_grid(text: str) -> tuple[float, ...]:
    """The numbers of `text`, or of the file it names, between commas or white space.

    Raises:
        ConfigError: something in it is not a number, or there is none.
    """
    try:
        content = Path(text).read_text(encoding="utf-8") if isfile(text) else text
        return tuple(float(value) for value in re.split(r"[,\s]+", content.strip(", \t\r\n")))
    except ValueError:  # a decoding error is one, too
        raise ConfigError(
            f"grid is {text!r}: give numbers with commas between them, or a file of numbers."
        ) from None
