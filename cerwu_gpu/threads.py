"""Threads on the CPU: workers with one thread each, and torch's own threads kept to large products.

OpenMP's threads wait for each other at the end of every operation: with another process beside
them, small operations take a hundred times as long on two threads as on one.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TypeVar

import torch

T = TypeVar("T")

CPU = torch.device("cpu")

_WORKERS: ContextVar[int | None] = ContextVar("workers", default=None)
"""Number of workers inside of `one_thread`; None outside."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread; `run` still takes as many workers as torch had threads.

    LAPACK's factors round by the number of threads, so that results do not depend on it either.
    """
    before = torch.get_num_threads()
    token = _WORKERS.set(worker_count())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _WORKERS.reset(token)


def worker_count() -> int:
    """Return how many workers `run` takes: torch's number of threads, outside of `one_thread`."""
    return _WORKERS.get() or torch.get_num_threads()


def run(tasks: Iterable[Callable[[], T]], device: torch.device = CPU) -> list[T]:
    """Run the tasks on workers of one thread each and return their results in order.

    The first exception in the order of the tasks is raised when all of them have ended. Tasks of
    another device than the CPU run one after the other: their work is queued there anyway.
    """
    tasks = list(tasks)
    if device.type != "cpu":
        return [task() for task in tasks]
    count = min(worker_count(), len(tasks))
    with one_thread():
        if count <= 1:
            return [task() for task in tasks]
        begin = partial(_begin_worker, worker_count() // count)
        with ThreadPoolExecutor(count, "cerwu", begin) as pool:
            futures = [pool.submit(task) for task in tasks]
            try:
                wait(futures)
            except BaseException:  # as of Ctrl-C: what has not begun is not wanted any more
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in futures]


def _begin_worker(workers: int) -> None:
    """Prepare the thread of a worker, which may have workers of its own if cores are left."""
    torch.set_num_threads(1)
    _WORKERS.set(workers)
