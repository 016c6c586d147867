"""Figures as people read them."""

NONE = "\u2013"
PLURALS = {"matrix": "matrices"}


def size(count: float) -> str:
    """ "63.7 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:,.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def share(value: float) -> str:
    """ "23.7 %"; small ones keep two digits."""
    percent = 100 * value
    if percent == 0 or percent >= 10:
        return f"{percent:.1f} %"
    if percent >= 0.1:
        return f"{percent:.2f} %"
    return f"{percent:.2g} %" if percent >= 0.001 else "< 0.001 %"


def duration(seconds: float) -> str:
    """ "2 min 31 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def count(value: int) -> str:
    """ "134.5 million"; smaller ones in full."""
    for size_of_unit, unit in ((10**9, "billion"), (10**6, "million")):
        if value >= size_of_unit:
            return f"{value / size_of_unit:.1f} {unit}"
    return f"{value:,}"


def bits(value: float | None) -> str:
    """Two decimals, or a dash."""
    return NONE if value is None else f"{value:.2f}"


def plural(number: int, noun: str) -> str:
    """ "1 event", "3 events"."""
    return f"{number:,} {noun if number == 1 else PLURALS.get(noun, noun + 's')}"
