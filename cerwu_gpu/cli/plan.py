"""cerwu-gpu plan: predict memory, traffic, work and size of a compression from config.json."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cerwu_gpu import quantities
from cerwu_gpu.cli import options
from cerwu_gpu.cli.output import listing, print_json, size
from cerwu_gpu.config import Bits, all_settings, from_settings
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.quantities import parse_size

if TYPE_CHECKING:
    from cerwu_gpu.hf.plan import Plan

USUAL_BITS = 3.0
"""Bits per weight where none are given."""
NOT_MEASURED = "not measured"
USUAL_REMEDY = "leave the widest matrices as they are (--exclude), or run on CPUs (--device cpu)"
REMEDIES = {
    "activations": "give less calibration text (--samples), or more processes",
    "all blocks": "name a calibration text (--calibration), so that the model stays on disk",
    "head, embedding and norms": "keep the head (--keep-head), or run on CPUs (--device cpu)",
}
"""Part of the memory -> what makes it smaller, where that is not USUAL_REMEDY."""


@options.closed
@options.with_settings(all_settings(), before="gpus")
def plan(
    context: typer.Context,
    model: options.Model,
    gpus: Annotated[int, typer.Option(help="Processes, one for a GPU, of each machine.")] = 1,
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    gpu_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of a GPU, to compare with: 80GB."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON only.")] = False,
    **settings: Any,
) -> None:
    """Predict what compressing MODEL takes, from its config.json alone; nothing is read or run."""
    for name, value in (("gpus", gpus), ("nodes", nodes)):
        if value < 1:
            raise ConfigError(f"{name} is {value}: give at least 1.")
    room = None if gpu_memory is None else parse_size(gpu_memory, "gpu_memory")
    config = from_settings(**options.given_settings(options.typed(context, settings)))
    bits = config.target.bits if isinstance(config.target, Bits) else USUAL_BITS
    from cerwu_gpu.hf.plan import outline
    from cerwu_gpu.hf.plan import plan as predicted

    known = outline(model, config)
    result = predicted(known, config, ranks=gpus * nodes, bits=bits)
    remedy = None if room is None or result.peak <= room else shortfall(result, room)
    if json:
        seconds = dict.fromkeys(result.operations)
        fit = None if room is None else remedy is None
        further: dict[str, Any] = {"peak": result.peak, "fits": fit, "remedy": remedy}
        further |= {"bits": bits, "seconds": seconds}
        print_json({**asdict(result), **further})
        return
    fits = "" if room is None else f", {'fits' if remedy is None else 'does not fit'}"
    rows = [
        ("quantized weights", f"{known.weights:,}"),
        ("processes", f"{result.ranks:,}"),
        (f"file at {bits:g} bits", size(result.file_bytes)),
        ("memory of a process", f"{size(result.peak)}{fits}"),
        *((f"  {part}", size(count)) for part, count in result.memory.items()),
        ("read by a process, at most", size(max(result.read))),
        ("sent by a process, at most", size(max(result.sent))),
        ("received by a process, at most", size(max(result.received))),
        *((f"operations: {stage}", f"{x:.2e}") for stage, x in result.operations.items()),
        ("seconds", f"{NOT_MEASURED}: no committed benchmark has unit costs of a GPU"),
    ]
    typer.echo(listing(rows))
    if remedy is not None:
        typer.echo(f"\n{remedy}")


def shortfall(result: "Plan", room: int) -> str:
    """Return a sentence for a plan that needs more than `room` bytes: what takes most of them, and
    what to do about it."""
    part = max(result.memory, key=lambda name: result.memory[name])
    return (
        f"A process needs {quantities.size(result.peak)} of {quantities.size(room)}, most of it "
        f"for {part} ({quantities.size(result.memory[part])}): {REMEDIES.get(part, USUAL_REMEDY)}."
    )
