"""cerwu-gpu compare: draw compressed directories side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cerwu_gpu.container.output import check_apart
from cerwu_gpu.errors import ConfigError, OutputError
from cerwu_gpu.files import local_path, read_json, resolved, write_text

if TYPE_CHECKING:
    from cerwu_gpu.report_page.comparison import Compared

EVALUATION = "eval.json"
"""End of the name of the evaluation beside a directory."""
REPORT = "report.json"
"""End of the name of the report beside a directory."""
PAGE_START = 4096
"""Number of characters in which a page of ours is recognised."""


def compare(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIRECTORY...",
            help="Compressed directories, with DIRECTORY.report.json beside them, and "
            "DIRECTORY.eval.json if they were evaluated.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="HTML page to write; replaces only its like.")
    ],
) -> None:
    """Draw the sizes, qualities, bits and losses of DIRECTORIES on one HTML page.

    Their qualities are those of `cerwu-gpu eval DIRECTORY --json > DIRECTORY.eval.json`.
    """
    from cerwu_gpu.report_page.comparison import comparison, is_comparison

    output = resolved(output)
    check_apart({"the page": output}, {f"{path}": path for path in directories})
    if output.is_dir() or (output.exists() and not is_comparison(_beginning(output))):
        raise OutputError(f"{output} is no such page and would be replaced: choose another place.")
    write_text(output, comparison([_compared(local_path(path)) for path in directories]))
    typer.echo(f"page: {output}")


def _compared(directory: Path) -> "Compared":
    """Return a directory's report, and its evaluation if there is one.

    Raises:
        ConfigError: the report is missing or malformed, or the evaluation is.
    """
    from cerwu_gpu.report_page.comparison import Compared

    place = directory.resolve()
    report = _read(place.with_name(f"{place.name}.{REPORT}"))
    if report is None:
        raise ConfigError(f"{directory}.{REPORT} is missing: cerwu-gpu compress writes it.")
    wanted = {"layers", "directory_bytes", "original_bytes", "bits_per_weight"}
    if not report.keys() >= wanted:
        raise ConfigError(f"{directory}.{REPORT} is no report of cerwu_gpu: get it again.")
    return Compared(place.name, report, _read(place.with_name(f"{place.name}.{EVALUATION}")))


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file; None where there is none.

    Raises:
        ConfigError: it is malformed.
    """
    if not path.exists():
        return None
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: make it again.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object: make it again.")
    return content


def _beginning(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(PAGE_START)
    except (OSError, ValueError):
        return ""
