"""Sizes and shares as people write them."""

import pytest

from cerwu_gpu.cli.quantities import parse_share, parse_size
from cerwu_gpu.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("60MB", 60_000_000),
        ("60 mib", 62_914_560),
        ("1.5GB", 1_500_000_000),
        ("12", 12),
        (".5kB", 500),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "3 XB", "1e3"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 60MB"):
        parse_size(text)


def test_shares() -> None:
    assert parse_share("2%") == parse_share(" 0.02") == 0.02
    with pytest.raises(ConfigError, match="such as 2%"):
        parse_share("two percent")
