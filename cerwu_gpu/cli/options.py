"""Options that several commands share; the defaults are each command's own."""

from typing import Annotated

import typer

from cerwu_gpu import config

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub model id, model directory or .gguf file.")
]
Calibration = Annotated[
    str,
    typer.Option(
        help="Calibration data: wikitext2, a Hub dataset id, a text file, or self (text sampled "
        "from the model)."
    ),
]
Samples = Annotated[int, typer.Option(help="Number of calibration sequences.")]
SequenceLength = Annotated[int, typer.Option(help="Tokens per calibration sequence.")]
CalibrationBatch = Annotated[int, typer.Option(help="Calibration sequences per forward pass.")]
Passes = Annotated[int, typer.Option(help="Number of quantization passes over each matrix.")]
Damping = Annotated[
    float,
    typer.Option(
        help="Damping added to the Hessian's diagonal, relative to the statistic of --damping-by."
    ),
]
DampingBy = Annotated[
    config.DampingBy,
    typer.Option(
        help="Statistic of the diagonal that damping is relative to; the paper uses the mean."
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Compress only weights whose name matches; repeatable."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB",
        help="Do not compress weights whose name matches; overrides --include; repeatable.",
    ),
]
MaxWindows = Annotated[
    int | None, typer.Option(help="Maximum number of windows; default: the whole text.")
]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Device = Annotated[
    str | None, typer.Option(help="Device: cpu, cuda, cuda:1, ...; default: a GPU if available.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Allow Python code from the model repository to run."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Hide progress bars and log messages.")]
