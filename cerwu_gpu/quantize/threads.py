"""Factorisations that give the same bits whatever the number of threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """LAPACK's Cholesky and LU factors on the CPU round by the number of threads: take one.

    Matrix products do not, nor do the sums of torch.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
