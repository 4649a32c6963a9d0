"""Memory between steps. XLA's CPU backend allocates the buffers of a step with malloc and frees them after it."""

import ctypes
import sys

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Tells the C library to keep freed memory instead of handing it back to the system after every step.

    Otherwise each step's first touch of each page is a page fault: ResNet-20, batch 128, one core: 295 images/s, with
    this 446. Changes the whole process, so a script calls it, first thing; does nothing where the library is not glibc.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_MAX, 0)  # no block by mmap: those go back when freed
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # bytes at the top of the heap before any go back
        library.mallopt(_M_ARENA_MAX, 1)  # one heap for all threads, or each keeps its own
