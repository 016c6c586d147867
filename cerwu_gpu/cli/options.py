"""Options that several commands share; the defaults are each command's own."""

from typing import Annotated

import typer

from cerwu_gpu import config

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub name, model directory or .gguf file.")
]
Calibration = Annotated[str, typer.Option(help="Hub dataset (or wikitext2), text file, or self.")]
Samples = Annotated[int, typer.Option(help="Calibration sequences.")]
SequenceLength = Annotated[int, typer.Option(help="Tokens per calibration sequence.")]
CalibrationBatch = Annotated[int, typer.Option(help="Calibration sequences in work at a time.")]
Passes = Annotated[int, typer.Option(help="Passes over each matrix.")]
Damping = Annotated[
    float, typer.Option(help="Multiple of a typical diagonal entry that is added to H.")
]
DampingBy = Annotated[
    config.DampingBy, typer.Option(help="What is typical; the paper takes the mean.")
]
Include = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="Weight names to compress; repeatable.")
]
Exclude = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="Weight names to leave alone; repeatable.")
]
MaxWindows = Annotated[
    int | None, typer.Option(help="Only so many windows; default: the whole text.")
]
Seed = Annotated[int, typer.Option(help="Seed of what is sampled.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default: a GPU where there is one.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the model's own Python code.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
