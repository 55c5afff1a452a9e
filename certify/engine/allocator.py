"""The C library's allocator on a processor: it should keep the memory that the next batch needs again."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK = 32 << 20  # glibc takes no larger block from its heap
_KEPT = 256 << 20


def keep_freed_memory(kept: int = _KEPT) -> bool:
    """Let glibc keep so many bytes of freed memory, and take blocks of up to 32 MiB from it.

    By default it hands memory back to the system after every layer and faults every page in again for the next: a
    perceptron's votes take up to twice as long (``benchmarks/log.md``). Settings of the user's own (``MALLOC_...``)
    stay, and so does every other allocator. 64 MiB is what glibc's own adaptation arrives at.

    Returns:
        Whether it was done.
    """
    mallopt = _mallopt()
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_M_TRIM_THRESHOLD, kept))


@functools.cache
def _mallopt() -> Callable[[int, int], int] | None:
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return None
    try:
        found: Callable[[int, int], int] = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return None
    return found
