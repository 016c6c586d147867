"""Print results: plain tables, sizes with their unit, strict JSON."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import typer

from cerwu_gpu import quantities
from cerwu_gpu.errors import CerwuError, printable, reason, shortage
from cerwu_gpu.report import Report, finite

if TYPE_CHECKING:
    from cerwu_gpu.ranks import Ranks

WRONG_INPUT = 2
"""Exit code of wrong input."""
INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM."""


def set_verbosity(*, quiet: bool) -> None:
    """Show messages and bars on stderr, or only errors; call before transformers is imported."""
    if quiet:
        # For libraries' bars; ours have an argument. transformers uses huggingface_hub's setting.
        os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        return
    logging.basicConfig(format="%(message)s")
    logging.getLogger("cerwu_gpu").setLevel(logging.INFO)


def is_told_by_another_rank() -> bool:
    """Return whether another rank of torchrun shows messages; known before torch is imported."""
    return os.environ.get("RANK", "0") != "0"


@contextmanager
def told_once(ranks: "Ranks") -> Iterator[None]:
    """Leave it to rank 0 to tell of an error that all ranks have; a rank tells before it closes its
    connections, which may take long or end the process where another rank has died."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        refusal = refusal_of(error)
        if ranks.alone or refusal is None:
            raise
        if ranks.first or error is not ranks.shared_error:
            tell(refusal[0])
        raise typer.Exit(refusal[1]) from error


def refusal_of(error: BaseException) -> tuple[str, int] | None:
    """Return the sentence and the exit code for an error that is no defect of the program."""
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted: {error}" if str(error) else "interrupted.", INTERRUPTED
    if isinstance(error, CerwuError):
        return str(error), WRONG_INPUT
    what = shortage(error)
    if what is not None:
        return f"there is not enough {what} ({reason(error)}).", WRONG_INPUT
    if isinstance(error, OSError):
        subject = "the result cannot be written" if error.filename is None else error.filename
        return f"{subject}: {error.strerror or error}.", WRONG_INPUT
    return None


def tell(sentence: str) -> None:
    """Print the sentence of an error on stderr."""
    with suppress(OSError):  # nobody listens
        typer.echo(f"cerwu-gpu: {printable(' '.join(sentence.split()))}", err=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text: the first column aligned left, the other ones right."""
    lines = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])


def listing(rows: Sequence[tuple[str, str]]) -> str:
    """Return lines of a name and its value."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {printable(value)}" for name, value in rows)


def size(count: int) -> str:
    """Return a number of bytes, exact and rounded: "79,331,204 bytes (79.3 MB)"."""
    exact = f"{count:,} bytes"
    return exact if count < 1000 else f"{exact} ({quantities.size(count)})"


def number(value: float | None, digits: int = 4) -> str:
    """Return a number to `digits` significant digits; a dash for None."""
    return "-" if value is None else f"{value:.{digits}g}"


def report_rows(report: Report) -> list[tuple[str, str]]:
    """Return the figures of a compression as (name, value) rows, without its events."""
    weights = sum(rows * columns for rows, columns in (layer.shape for layer in report.layers))
    return [
        ("matrices quantized", f"{len(report.layers):,} ({weights:,} weights)"),
        *(
            (f"left: {reason}", f"{count:,}")
            for reason, count in sorted(Counter(report.left.values()).items())
        ),
        ("bits per quantized weight", f"{report.bits_per_weight:.4f}"),
        ("compressed directory", size(report.directory_bytes)),
        ("original", size(report.original_bytes)),
        ("compressed / original", f"{report.directory_bytes / report.original_bytes:.2%}"),
        *_distillation(report),
        *((f"seconds to {stage}", f"{value:.1f}") for stage, value in report.seconds.items()),
        ("seconds in all", f"{sum(report.seconds.values()):.1f}"),
    ]


def _distillation(report: Report) -> list[tuple[str, str]]:
    """Return the rows of a distillation: what it gained, and the bytes of its scales."""
    result = report.distillation
    if result is None:
        return []
    before, after = result["before"], result["after"]
    return [
        ("distillation steps kept", f"{result['steps']:,}"),
        ("held-out KL divergence", f"{before:.4f} -> {after:.4f} nats"),
        ("row scales of distillation", size(int(result["bytes"]))),
    ]


def print_events(events: Sequence[str]) -> None:
    """Print each event on a line."""
    typer.echo(f"\nevents: {len(events) or 'none'}")
    for event in events:
        typer.echo(f"  {printable(event)}")


def print_json(value: object) -> None:
    """Print a value as JSON; nan and inf become null."""
    typer.echo(json.dumps(finite(value), indent=2, allow_nan=False))
