"""Memory that a process frees stays with it, for the next step to use."""

from __future__ import annotations

import contextlib
import ctypes
import functools

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MMAP_LARGEST = 32 << 20
"""The largest threshold that glibc takes."""
KEPT = 1 << 30
"""Free bytes at the top of the heap that go back to the system."""


@functools.cache
def keep_freed_memory() -> None:
    """Tell glibc's malloc not to give freed memory back after every operation.

    By default it does, and the system then clears the same pages again for the next activation: a fifth of a
    training step and a third of an evaluation of a small network on a CPU. Values do not change. Elsewhere than on
    glibc this does nothing. Children of a fork inherit it.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        malloc = ctypes.CDLL(None).mallopt
        malloc(M_MMAP_THRESHOLD, MMAP_LARGEST)
        malloc(M_TRIM_THRESHOLD, KEPT)
