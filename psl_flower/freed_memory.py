"""Memory that a step has freed stays with the process, for the next step.

Note [Freed memory]: glibc gives large blocks back to the system as soon as they are free. The next step asks for the
same ones again, and the system clears every page of them when it is first written to: 500 to 4,000 pages a step of the
default model, up to a tenth of the processor's time. Processes that make steps all day keep them instead.
"""

from __future__ import annotations

import ctypes

# Parameters of mallopt, as malloc.h numbers them.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3

_LARGEST_KEPT = 32 * 2**20  # bytes of a block; glibc takes no more
_MOST_KEPT = 256 * 2**20  # bytes at the end of the heap
_PAD = 64 * 2**20  # bytes of address space, of which only what is used is memory; less, and threads' heaps are dropped


def keep_freed_memory() -> bool:
    """Have this process keep memory that it frees, up to some hundred MB; return whether its allocator can."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc: macOS, Alpine, Windows
        return False
    wanted = {_MMAP_THRESHOLD: _LARGEST_KEPT, _TRIM_THRESHOLD: _MOST_KEPT, _TOP_PAD: _PAD}
    return all(mallopt(name, size) == 1 for name, size in wanted.items())
