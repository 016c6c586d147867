"""Memory that is free, given back to the system.

glibc keeps freed tensors of up to 32 MB in its heap. What little a block leaves behind, its
sensitivities say, is cut out of them, the next block's tensors no longer fit into what is left, and
the heap grows with every block, although the tensors in use do not.
"""

import ctypes
import sys
from functools import cache
from typing import Any


def give_back() -> None:
    """Give pages that hold nothing back to the system, where the C library is glibc; others have
    no such function."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    """Return glibc's function of this name, or None."""
    if sys.platform != "linux":
        return None
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None
    trim.argtypes = [ctypes.c_size_t]
    return trim
