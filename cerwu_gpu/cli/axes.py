"""Options for the axes of a sweep, derived from `Axes`: comma-separated lists."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from cerwu_gpu.cli.options import with_parameters
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.sweep.points import Axes

CHOICES: dict[str, tuple[str, str]] = {
    "drift": ("ignore", "correct"),
    "head": ("quantize", "keep"),
}
"""Words for False and True on boolean axes."""


def with_axes(
    before: str, defaults: Axes | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command an option for each axis.

    Args:
        before: parameter of the command in front of which the options are listed. Values are passed
            as typed, as keyword arguments; `take_axes` parses them.
        defaults: values of omitted lists.
    """
    usual = defaults or Axes()
    return with_parameters([_parameter(axis, usual) for axis in fields(Axes)], before)


def take_axes(values: dict[str, Any]) -> Axes:
    """Parse the axes among typed values and remove them from `values`.

    Raises:
        ConfigError: a value does not fit its axis.
    """
    given = {}
    for axis in fields(Axes):
        text = values.pop(_name(axis), None)
        if text is not None:
            given[axis.name] = _parsed(axis, text)
    return Axes(**given)


def _parameter(axis: Field[Any], defaults: Axes) -> inspect.Parameter:
    """Return the option of an axis."""
    value = getattr(defaults, axis.name)
    words = _words(axis)
    help = axis.metadata["help"]
    if words and axis.type != tuple[bool, ...]:
        help = f"{help.rstrip('.')}, any of {', '.join(words)}."
    option = typer.Option(metavar="LIST", help=help)
    return inspect.Parameter(
        _name(axis),
        inspect.Parameter.KEYWORD_ONLY,
        default=_joined(axis, value) if value else None,
        annotation=Annotated[str if value else str | None, option],
    )


def _name(axis: Field[Any]) -> str:
    return axis.metadata["name"] or axis.name


def _words(axis: Field[Any]) -> Sequence[str]:
    """Return the words that an axis accepts; none for numbers."""
    kind = get_args(axis.type)[0]
    if kind is bool:
        return CHOICES[_name(axis)]
    return get_args(kind) if get_origin(kind) is Literal else ()


def _joined(axis: Field[Any], values: Sequence[Any]) -> str:
    if isinstance(values[0], bool):
        return ",".join(CHOICES[_name(axis)][value] for value in values)
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _parsed(axis: Field[Any], text: str) -> tuple[Any, ...]:
    """Parse the values of a list.

    Raises:
        ConfigError: one of them does not fit the axis.
    """
    name, words, kind = _name(axis), _words(axis), get_args(axis.type)[0]
    values = [part.strip() for part in text.split(",")]
    if "" in values:
        raise ConfigError(f"{name} is {text!r}: give values with commas between them.")
    for word in values if words else ():
        if word not in words:
            raise ConfigError(f"{name} is {word!r}: choose from {', '.join(words)}.")
    if kind is bool:
        return tuple(word == words[1] for word in values)
    try:
        return tuple(values if words else map(kind, values))
    except ValueError:
        raise ConfigError(f"{name} is {text!r}: give numbers with commas between them.") from None
