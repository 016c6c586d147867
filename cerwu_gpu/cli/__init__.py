"""The command `cerwu-gpu`.

Heavy modules are imported inside the commands, so that `--help` and usage errors are immediate.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cerwu_gpu import __version__
from cerwu_gpu.cli.comparison import compare
from cerwu_gpu.cli.compression import compress
from cerwu_gpu.cli.directories import decompress, info, verify
from cerwu_gpu.cli.evaluation import evaluate
from cerwu_gpu.cli.hub import push
from cerwu_gpu.cli.output import WRONG_INPUT, refusal_of, tell
from cerwu_gpu.cli.plan import plan
from cerwu_gpu.cli.sweep import sweep


class Commands(TyperGroup):
    """Group of commands whose input errors become one sentence on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:  # the class of ctx moved between releases of typer
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            refusal = refusal_of(error)
            if refusal is None:
                raise
            _fail(*refusal)


def _fail(sentence: str, code: int) -> None:
    tell(sentence)
    raise typer.Exit(code)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"cerwu-gpu {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    name="cerwu-gpu",
    help="Compress Hugging Face language models to entropy-coded files, and load them back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("compress")(compress)
app.command("eval")(evaluate)
app.command("info")(info)
app.command("verify")(verify)
app.command("decompress")(decompress)
app.command("sweep")(sweep)
app.command("compare")(compare)
app.command("push")(push)
app.command("plan")(plan)


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Compress Hugging Face language models to entropy-coded files, and load them back."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `arguments` without the program's name, from sys.argv by default."""
    code: Any = 0
    with _terminated_as_interrupted():
        try:
            app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="cerwu-gpu")
        except SystemExit as end:
            code = end.code
        except (Exception, KeyboardInterrupt) as error:  # outside of a command: --help
            refusal = refusal_of(error)
            if refusal is None:
                raise
            with suppress(typer.Exit):
                _fail(*refusal)
            code = refusal[1]
        try:
            sys.stdout.flush()
        except OSError as error:
            code = _fail_to_print(error)
    sys.exit(code)


def _fail_to_print(error: OSError) -> int:
    """Report that stdout takes no more, and return the exit code; what it still holds is dropped,
    so that Python does not try again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    with suppress(typer.Exit):
        _fail(f"the result cannot be printed ({error.strerror}).", WRONG_INPUT)
    return WRONG_INPUT


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C in the context, so that a run keeps its work and tidies up."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows handlers in the main thread only
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
