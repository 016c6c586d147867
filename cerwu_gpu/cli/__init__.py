"""The command `cerwu-gpu`.

Heavy modules are imported inside the commands, so that `--help` and usage errors are immediate.
"""

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cerwu_gpu import __version__
from cerwu_gpu.cli.comparison import compare
from cerwu_gpu.cli.compression import compress
from cerwu_gpu.cli.directories import decompress, info, verify
from cerwu_gpu.cli.evaluation import evaluate
from cerwu_gpu.cli.hub import push
from cerwu_gpu.cli.sweep import sweep
from cerwu_gpu.errors import CerwuError

WRONG_INPUT = 2
INTERRUPTED = 130


class Commands(TyperGroup):
    """Group of commands whose input errors become one sentence on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:  # the class of ctx moved between releases of typer
        try:
            return super().invoke(ctx)
        except CerwuError as error:
            _fail(str(error), WRONG_INPUT)
        except OSError as error:
            if error.filename is None:
                raise
            _fail(f"{error.filename}: {error.strerror}.", WRONG_INPUT)
        except KeyboardInterrupt as interrupt:
            _fail(f"interrupted: {interrupt}" if str(interrupt) else "interrupted.", INTERRUPTED)


def _fail(sentence: str, code: int) -> None:
    typer.echo(f"cerwu-gpu: {' '.join(sentence.split())}", err=True)
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
    app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="cerwu-gpu")
