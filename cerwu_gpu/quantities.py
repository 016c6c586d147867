"""Parse and format quantities for people: 60MB, 2 %, 2 min 31 s."""

import re

from cerwu_gpu.errors import ConfigError

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
"""Bytes per unit of a size, in capitals."""
NONE = "\u2013"
"""Dash for a missing value."""
PLURALS = {"matrix": "matrices"}
"""Plurals that do not end in s."""


def parse_size(text: str, name: str = "max_size") -> int:
    """Parse a number of bytes, the value of option `name`: 60MB is 60,000,000, 60MiB is 62,914,560.

    Raises:
        ConfigError: this is no size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise ConfigError(f"{name} is {text!r}: give a size such as 60MB or 1.5GiB.")
    return int(float(match[1]) * UNITS[match[2].upper()])


def parse_share(text: str) -> float:
    """Parse a share of 1, "2%" or "0.02".

    Raises:
        ConfigError: this is no share.
    """
    number = text.strip()
    try:
        return float(number[:-1]) / 100 if number.endswith("%") else float(number)
    except ValueError:
        raise ConfigError(
            f"max_perplexity_increase is {text!r}: give a share such as 2% or 0.02."
        ) from None


def size(count: float) -> str:
    """Return a number of bytes in words, "63.7 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:,.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def share(value: float | None) -> str:
    """Return a share as a percentage, "23.7 %", small ones with two digits; a dash for None."""
    if value is None:
        return NONE
    percent = 100 * value
    if percent == 0 or percent >= 10:
        return f"{percent:.1f} %"
    if percent >= 0.1:
        return f"{percent:.2f} %"
    return f"{percent:.2g} %" if percent >= 0.001 else "< 0.001 %"


def duration(seconds: float) -> str:
    """Return seconds as "2 min 31 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def count(value: int) -> str:
    """Return a number in words, "134.5 million"; smaller ones in full."""
    for unit, word in ((10**9, "billion"), (10**6, "million")):
        if value >= unit:
            return f"{value / unit:.1f} {word}"
    return f"{value:,}"


def decimals(value: float | None, digits: int) -> str:
    """Return a number with `digits` decimals; a dash for None."""
    return NONE if value is None else f"{value:.{digits}f}"


def plural(number: int, noun: str) -> str:
    """Return a number with its noun, "1 event" or "3 events"."""
    return f"{number:,} {noun if number == 1 else PLURALS.get(noun, noun + 's')}"
