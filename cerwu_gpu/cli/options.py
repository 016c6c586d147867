"""Options that several commands share; those of settings are derived from the configuration."""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from os.path import expanduser, isfile  # unlike Path.is_file it takes text too long for a name
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer

from cerwu_gpu.config import Setting, all_settings
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.quantities import parse_share, parse_size

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub model id, model directory or .gguf file.")
]
Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", help="Output directory; must be new or empty unless --overwrite is given."
    ),
]
MaxWindows = Annotated[
    int | None, typer.Option(help="Maximum number of windows; default: the whole text.")
]
Images = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Directory of images, in folders by class, or a Hub dataset id; for image "
        "classifiers.",
    ),
]
MaxImages = Annotated[
    int | None, typer.Option(help="Maximum number of images that are judged; default: all.")
]
Device = Annotated[
    str | None, typer.Option(help="Device: cpu, cuda, cuda:1, ...; default: a GPU if available.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Allow Python code from the model repository to run."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Hide progress bars and log messages.")]


def parse_grid(text: str) -> tuple[float, ...]:
    """Parse the numbers in `text`, or in the file it names, between commas or white space.

    Raises:
        ConfigError: a part of it is not a number, or there is none.
    """
    try:
        path = expanduser(text)
        content = Path(path).read_text(encoding="utf-8") if isfile(path) else text
        return tuple(float(value) for value in re.split(r"[,\s]+", content.strip(", \t\r\n")))
    except ValueError:  # a decoding error is one, too
        raise ConfigError(
            f"grid is {text!r}: give numbers with commas between them, or a file of numbers."
        ) from None


PARSED: dict[str, tuple[str, Callable[[str], Any]]] = {
    "grid": ("VALUES", parse_grid),
    "max_size": ("SIZE", parse_size),
    "max_perplexity_increase": ("SHARE", parse_share),
}
"""Placeholders and parsers of settings that are typed as text."""


def with_settings(
    names: Iterable[str], before: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command an option for each of these settings.

    Args:
        names: of the settings, in order.
        before: parameter of the command in front of which the options are listed. Values are passed
            as typed, as keyword arguments; `given_settings` parses them.
    """
    return with_parameters([_parameter(all_settings()[name]) for name in names], before)


def with_parameters(
    options: Sequence[inspect.Parameter], before: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command further options, in front of one of its own."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        plain = [x for x in signature.parameters.values() if x.kind is not x.VAR_KEYWORD]
        rest = [x for x in signature.parameters.values() if x.kind is x.VAR_KEYWORD]
        place = [x.name for x in plain].index(before)
        parameters = [*plain[:place], *options, *plain[place:]]
        parameters = [x.replace(kind=inspect.Parameter.KEYWORD_ONLY) for x in parameters]

        def run(**values: Any) -> None:
            command(**values)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        # Keyword parameters stay for a further decorator.
        run.__signature__ = signature.replace(parameters=[*parameters, *rest])  # type: ignore[attr-defined]
        run.__annotations__ = {x.name: x.annotation for x in parameters} | {"return": None}
        return run

    return decorate


def closed(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command whose options are complete, without its keyword parameters."""
    signature = inspect.signature(command)
    plain = [x for x in signature.parameters.values() if x.kind is not x.VAR_KEYWORD]
    command.__signature__ = signature.replace(parameters=plain)  # type: ignore[attr-defined]
    return command


def _parameter(setting: Setting) -> inspect.Parameter:
    """Return the option of a setting."""
    kind, default, metavar = _without_none(setting.kind), setting.default, None
    if setting.name in PARSED:
        kind, metavar = str, PARSED[setting.name][0]
    elif get_origin(kind) is tuple:
        kind, metavar, default = list[str], "GLOB", None
    elif get_origin(kind) in (Union, UnionType):  # the sources of a calibration, by name
        kind, metavar, default = list[str], "NAME[:SHARE]", None
    name = f"--{setting.name.replace('_', '-')}"
    declared = (name,) if kind is bool else ()
    option = typer.Option(*declared, help=setting.help, metavar=metavar)
    annotation: Any = kind if default is not None else kind | None
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, option],
    )


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, UnionType):
        rest = [x for x in get_args(kind) if x is not NoneType]
        return rest[0] if len(rest) == 1 else kind
    return kind


def _parsed(name: str, value: Any) -> Any:
    if name not in PARSED:
        return tuple(value) if isinstance(value, list) else value
    return PARSED[name][1](value)


def refuse_beside_images(values: dict[str, tuple[Any, Any]]) -> None:
    """Refuse options of language models beside images.

    Args:
        values: name -> the value that was given, and the default.

    Raises:
        ConfigError: one of them is given.
    """
    for name, (value, default) in values.items():
        if value != default:
            raise ConfigError(f"{name} is for language models: drop it, or drop images.")


def typed(context: typer.Context, values: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the command line gives, without those at their defaults: an effort
    may set these."""
    return {
        name: value
        for name, value in values.items()
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }


def given_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Parse typed settings; None stands for an omitted one.

    Raises:
        ConfigError: a value does not fit its setting.
    """
    return {name: _parsed(name, value) for name, value in values.items() if value is not None}
