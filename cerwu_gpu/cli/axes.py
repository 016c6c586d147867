"""Options for the axes of a sweep, read off `Axes`: comma-separated lists."""

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
"""Words for False and True of axes of truth values."""


def with_axes(
    before: str, defaults: Axes | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command an option for each axis.

    Args:
        before: parameter of the command in front of which the options are listed. Its keyword
            parameters get the values as they were typed; `take_axes` parses them.
        defaults: values of lists that are not given.
    """
    usual = defaults or Axes()
    return with_parameters([_parameter(axis, usual) for axis in fields(Axes)], before)


def take_axes(values: dict[str, Any]) -> Axes:
    """Return the axes of typed values, which are taken out of `values`.

    Raises:
        ConfigError: a value is none of its axis.
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
    """Return the words that an axis takes; none where it takes numbers."""
    kind = get_args(axis.type)[0]
    if kind is bool:
        return CHOICES[_name(axis)]
    return get_args(kind) if get_origin(kind) is Literal else ()


def _joined(axis: Field[Any], values: Sequence[Any]) -> str:
    if isinstance(values[0], bool):
        return ",".join(CHOICES[_name(axis)][value] for value in values)
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _parsed(axis: Field[Any], text: str) -> tuple[Any, ...]:
    """Return the values of a list.

    Raises:
        ConfigError: one of them is none of the axis.
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
