"""Progress of long loops: bars on a terminal, log lines elsewhere, both with the time left."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

from cerwu_gpu.errors import printable
from cerwu_gpu.report import Stage

T = TypeVar("T")

LINE_INTERVAL = 10.0
"""Seconds between log lines of loops with many short iterations."""
_LINE = "{desc} {n_fmt}/{total_fmt}, {elapsed} so far, {remaining} left"


class _Lines(tqdm):  # type: ignore[type-arg]  # tqdm's class takes no parameter at run time
    """A bar that prints a line with the time of day instead of drawing over the last one."""

    @staticmethod
    def status_printer(file: Any) -> Any:
        def print_line(text: str) -> None:
            if text:
                file.write(f"{time.strftime('%H:%M:%S')} {text}\n")
                file.flush()

        return print_line

    def close(self) -> None:
        """Print the last line, unless it is there already or there was no iteration."""
        if not self.disable and self.n and self.n != self.last_print_n:
            self.display()
        self.last_print_t = 0.0  # as if never shown: tqdm then adds nothing of its own
        super().close()


def tracked(
    items: Iterable[T], *, what: str, unit: str, shown: bool, **options: Any
) -> Iterator[T]:
    """Yield `items`, whose length is known, with a bar; arguments are those of `counted`."""
    with counted(None, what=what, unit=unit, shown=shown, iterable=items, **options) as bar:
        yield from bar


def counted(
    total: int | None,
    *,
    what: str,
    unit: str,
    shown: bool,
    interval: float = LINE_INTERVAL,
    **options: Any,
) -> "tqdm[Any]":
    """Return a bar, a context manager; its `update(n)` reports n more iterations of `total`.

    Args:
        what: description, e.g. "blocks".
        unit: name of one iteration, in the singular.
        shown: whether to show it at all.
        interval: minimum seconds between log lines; 0: a line per iteration.
        options: further ones of tqdm.
    """
    kind: Any = tqdm
    if not sys.stderr.isatty():
        kind = _Lines
        options |= {"mininterval": interval, "maxinterval": interval or LINE_INTERVAL}
        # With a delay there is no line before the first iteration.
        options |= {"miniters": 1, "delay": 0.001, "bar_format": _LINE}
    bar: tqdm[Any] = kind(total=total, desc=what, unit=unit, disable=not shown, **options)
    return bar


def note(text: str) -> None:
    """Print a line on stderr, above any bar."""
    tqdm.write(printable(text), file=sys.stderr)


class Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[Stage, float] = {}

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Add the time spent inside the context to `name`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def move(self, seconds: float, source: Stage, target: Stage) -> None:
        """Move seconds from one stage to another."""
        self.seconds[source] = self.seconds.get(source, 0.0) - seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds
