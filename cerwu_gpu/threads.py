"""Threads on the CPU: workers with one thread each, and torch's own threads kept to large products.

OpenMP's threads wait for each other at the end of every operation: with another process running,
small operations take a hundred times as long on two threads as on one.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from threading import Lock
from typing import TypeVar

import torch
from torch import set_num_threads  # vLLM puts a warning in its place in torch, on CPUs

T = TypeVar("T")

CPU = torch.device("cpu")

_WORKERS: ContextVar[int | None] = ContextVar("workers", default=None)
"""Number of workers inside of `one_thread`; None outside."""


class _Threads:
    """Torch's number of threads while someone is inside of `one_thread`.

    It is the process's: a thread that first uses torch then takes over the one.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._number = 0

    def enter(self) -> int:
        """Take one thread; return the number before anyone did."""
        with self._lock:
            if self._inside == 0:
                self._number = torch.get_num_threads()
            self._inside += 1
            set_num_threads(1)
            return self._number

    def leave(self) -> None:
        """Take as many again."""
        with self._lock:
            self._inside -= 1
            set_num_threads(self._number)


_THREADS = _Threads()


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread; `run` still takes as many workers as torch had threads.

    LAPACK's factors round by the number of threads, so that results do not depend on it either.
    """
    if _WORKERS.get() is not None:  # in a worker, or inside already
        yield
        return
    token = _WORKERS.set(_THREADS.enter())
    try:
        yield
    finally:
        _THREADS.leave()
        _WORKERS.reset(token)


def worker_count() -> int:
    """Return how many workers `run` takes: torch's number of threads, outside of `one_thread`."""
    return _WORKERS.get() or torch.get_num_threads()


def run(tasks: Iterable[Callable[[], T]], device: torch.device = CPU) -> list[T]:
    """Run the tasks on workers of one thread each and return their results in order.

    The first exception in the order of the tasks is raised when all of them have ended. A single
    task, and tasks of another device than the CPU, run here, one after the other.
    """
    tasks = list(tasks)
    if device.type != "cpu" or len(tasks) <= 1:
        return [task() for task in tasks]
    with one_thread():
        count = min(worker_count(), len(tasks))
        if count == 1:
            return [task() for task in tasks]
        begin = partial(_begin_worker, worker_count() // count)
        inference = torch.is_inference_mode_enabled()
        with ThreadPoolExecutor(count, "cerwu", begin) as pool:
            futures = [pool.submit(_in_mode, task, inference) for task in tasks]
            try:
                wait(futures)
            except BaseException:  # as of Ctrl-C: drop tasks that have not begun
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in futures]


def _begin_worker(workers: int) -> None:
    """Prepare the thread of a worker, which may have workers of its own if cores are left."""
    set_num_threads(1)
    _WORKERS.set(workers)


def _in_mode(task: Callable[[], T], inference: bool) -> T:
    """Run a task in inference mode or not, as its caller is, whose tensors it writes to."""
    with torch.inference_mode(inference):
        return task()
