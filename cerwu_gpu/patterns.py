"""Glob patterns that choose parameters by name."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from cerwu_gpu.errors import ConfigError


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches the name, with or without its final ".weight"."""
    stem = name.removesuffix(".weight")
    return any(fnmatchcase(name, p) or fnmatchcase(stem, p) for p in patterns)


def chosen_names(
    candidates: Iterable[str],
    others: Iterable[str],
    include: Sequence[str],
    exclude: Sequence[str],
) -> list[str]:
    """The candidates that `include` matches and `exclude` does not.

    Args:
        candidates: names of parameters that can be compressed.
        others: names of all other parameters, which `exclude` may match as well.

    Raises:
        ConfigError: a pattern matches nothing, or no name is left.
    """
    candidates = list(candidates)
    _check(include, candidates, "include", "weight that can be compressed")
    _check(exclude, [*candidates, *others], "exclude", "parameter of the model")
    chosen = [x for x in candidates if matches(x, include) and not matches(x, exclude)]
    if not chosen:
        raise ConfigError("include and exclude leave no weight to compress: loosen them.")
    return chosen


def _check(patterns: Sequence[str], names: Sequence[str], field: str, what: str) -> None:
    for pattern in patterns:
        if not any(matches(name, (pattern,)) for name in names):
            raise ConfigError(f"{field} pattern {pattern!r} matches no {what}: check its spelling.")
