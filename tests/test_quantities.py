"""Quantities as people write and read them."""

import pytest

from cerwu_gpu import quantities
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.quantities import parse_share, parse_size


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


def test_figures_are_readable() -> None:
    assert [quantities.size(n) for n in (999, 63_749_000, 10**12)] == [
        "999 bytes",
        "63.7 MB",
        "1.0 TB",
    ]
    assert [quantities.share(x) for x in (0, 0.237, 0.0299, 0.00082, 1e-9)] == [
        "0.0 %",
        "23.7 %",
        "2.99 %",
        "0.082 %",
        "< 0.001 %",
    ]
    assert [quantities.duration(s) for s in (3.21, 151, 7384)] == [
        "3.2 s",
        "2 min 31 s",
        "2 h 03 min",
    ]
    assert [quantities.plural(n, "matrix") for n in (1, 2)] == ["1 matrix", "2 matrices"]
    assert [quantities.count(n) for n in (1_234, 134_500_000)] == ["1,234", "134.5 million"]
    assert [quantities.decimals(x, 2) for x in (1.005, 2, None)] == ["1.00", "2.00", "\u2013"]
    assert quantities.share(None) == "\u2013"
