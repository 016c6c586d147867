"""Quantities as people write them: 60MB, 1.5GiB, 2%."""

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


def parse_size(text: str) -> int:
    """Bytes: 60MB is 60,000,000, 60MiB is 62,914,560, a bare number counts bytes.

    Raises:
        ConfigError: this is no size.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS:
        raise ConfigError(f"max_size is {text!r}: give a size such as 60MB or 1.5GiB.")
    return int(float(found[1]) * UNITS[found[2].upper()])


def parse_share(text: str) -> float:
    """2% and 0.02 are the same.

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
