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
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Output directory; must be new or empty unless --overwrite is given.",
        ),
    ],
    method: Annotated[
        Method,
        typer.Option(
            help="Quantization method; cerwu-gamma0 does not complete the square, optq has lmbda "
            "0, rtn uses no Hessian."
        ),
    ] = DEFAULT.method,
    lmbda: Annotated[
        float,
        typer.Option(
            help="Rate-distortion trade-off: output error accepted to save one bit; larger values "
            "give smaller files."
        ),
    ] = DEFAULT.lmbda,
    levels: Annotated[
        int | None,
        typer.Option(
            help="Number of levels of a uniform grid scaled by abs-max; default: no uniform grid, "
            "but a step size per column, derived from lmbda."
        ),
    ] = DEFAULT.levels,
    grid: Annotated[
        str | None,
        typer.Option(
            help="Grid values in increasing order: comma-separated numbers, or a file of numbers."
        ),
    ] = None,
    scale: Annotated[
        Scale, typer.Option(help="Granularity of the abs-max scale with --levels or --grid.")
    ] = DEFAULT.scale,
    quantizer: Annotated[
        Quantizer,
        typer.Option(help="Scalar quantizer, or trellis-coded quantization with 4 or 8 states."),
    ] = DEFAULT.quantizer,
    rate_model: Annotated[
        RateModel,
        typer.Option(
            help="Code length model of the search; others than histogram need --levels or --grid."
        ),
    ] = DEFAULT.rate_model,
    bits: Annotated[
        float | None, typer.Option(help="Target bits per quantized weight; lmbda is searched.")
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Maximum size of the output directory, e.g. 60MB; lmbda is searched.",
        ),
    ] = None,
    max_perplexity_increase: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Maximum relative increase of the perplexity, e.g. 2%; lmbda is searched.",
        ),
    ] = None,
    sensitivity: Annotated[
        Sensitivity,
        typer.Option(
            help="Weighting of output errors: none, relative to the layer's output energy, or by "
            "squared gradients per layer, per row, or balanced with relative."
        ),
    ] = DEFAULT.sensitivity,
    passes: options.Passes = DEFAULT.passes,
    damping: options.Damping = DEFAULT.damping,
    damping_by: options.DampingBy = DEFAULT.damping_by,
    block_size: Annotated[
        int, typer.Option(help="Columns per block of lazy batched updates.")
    ] = DEFAULT.block_size,
    include: options.Include = None,
    exclude: options.Exclude = None,
    keep_head: Annotated[
        bool,
        typer.Option(
            "--keep-head", help="Do not quantize the input embedding and the output head."
        ),
    ] = DEFAULT.keep_head,
    calibration: options.Calibration = DEFAULT.calibration,
    samples: options.Samples = DEFAULT.samples,
    sequence_length: options.SequenceLength = DEFAULT.sequence_length,
    batch_size: options.CalibrationBatch = DEFAULT.batch_size,
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential",
            help="Calibrate each block on the outputs of the already quantized blocks.",
        ),
    ] = DEFAULT.sequential,
    correct_drift: Annotated[
        bool | None,
        typer.Option(
            "--correct-drift/--ignore-drift",
            help="Quantize for the inputs of the compressed model, toward the original outputs; "
            "default: yes, unless --levels, --grid, --sequential or --hessian-cache is given.",
        ),
    ] = DEFAULT.correct_drift,
    seed: options.Seed = DEFAULT.seed,
    limit_columns: Annotated[
        int,
        typer.Option(
            help="Report the theoretical limit of matrices with at most this many columns; 0: of "
            "none."
        ),
    ] = DEFAULT.limit_columns,
    strict: Annotated[
        bool, typer.Option("--strict", help="Treat events of the report (warnings) as errors.")
    ] = DEFAULT.strict,
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
) -> None:
    """Compress MODEL into a directory for load_compressed, info, eval and decompress."""
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
    from cerwu_gpu.api import compress as run  # after the settings: torch takes seconds
    from cerwu_gpu.compression.report_files import report_paths

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
