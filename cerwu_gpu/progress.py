"""How long it will take: a bar on a terminal, log lines where stderr goes elsewhere.

Every loop that takes seconds shows itself here. Both forms say how much time is left.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

from cerwu_gpu.report import Stage

T = TypeVar("T")

LINES_EVERY = 10.0
"""Seconds between two log lines of loops with many short turns."""
_LINE = "{desc} {n_fmt}/{total_fmt}, {elapsed} so far, {remaining} left"


class _Lines(tqdm):  # type: ignore[type-arg]  # tqdm's class takes no parameter at run time
    """Prints a line with the time of day instead of drawing over the last one."""

    @staticmethod
    def status_printer(file: Any) -> Any:
        def print_line(text: str) -> None:
            if text:
                file.write(f"{time.strftime('%H:%M:%S')} {text}\n")
                file.flush()

        return print_line

    def close(self) -> None:
        """Print the last line, unless it is there already or nothing was done."""
        if not self.disable and self.n and self.n != self.last_print_n:
            self.display()
        self.last_print_t = 0.0  # as if never shown: tqdm then adds nothing of its own
        super().close()


def tracked(
    items: Iterable[T], *, what: str, unit: str, shown: bool, **options: Any
) -> Iterator[T]:
    """Go over `items`, whose length is known, and show how far it is; arguments as `counted`."""
    with counted(None, what=what, unit=unit, shown=shown, iterable=items, **options) as bar:
        yield from bar


def counted(
    total: int | None,
    *,
    what: str,
    unit: str,
    shown: bool,
    every: float = LINES_EVERY,
    **options: Any,
) -> "tqdm[Any]":
    """A context whose `update(n)` says that n more turns of `total` are done.

    Args:
        what: what is being done, e.g. "blocks".
        unit: one turn, in the singular.
        shown: False shows nothing.
        every: at least so many seconds between two log lines; 0: one for each turn.
        options: of tqdm, besides.
    """
    kind: Any = tqdm
    if not sys.stderr.isatty():
        kind = _Lines
        options |= {"mininterval": every, "maxinterval": every or LINES_EVERY, "miniters": 1}
        # The delay keeps it from a line before the first turn.
        options |= {"delay": 0.001, "bar_format": _LINE}
    bar: tqdm[Any] = kind(total=total, desc=what, unit=unit, disable=not shown, **options)
    return bar


def note(text: str) -> None:
    """Print a line on stderr, above any bar."""
    tqdm.write(text, file=sys.stderr)


class Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[Stage, float] = {}

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Add the time spent inside to `name`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def move(self, seconds: float, source: Stage, target: Stage) -> None:
        """Count some of the time spent in stage `source` as that of `target`."""
        self.seconds[source] = self.seconds.get(source, 0.0) - seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds
