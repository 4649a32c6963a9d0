"""Memory of a step. XLA's CPU backend takes the buffers of every step from malloc and frees them after it."""

import ctypes
import os
import sys

TUNABLE = "GLIBC_TUNABLES"


def restart_with_huge_pages() -> None:
    """Starts this Python process anew, once, with the C library told to ask for huge pages.

    The first touch of each page of a step's buffers is a page fault, and a huge page is 512 of them in one. ResNet-20,
    batch 128, two cores: 490 images/s without, 690 with. The C library reads the setting only when a process starts;
    one that the user has made is left alone. For scripts, before any other work; does nothing where the library is not
    glibc.
    """
    glibc = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
    if glibc and TUNABLE not in os.environ:
        os.environ[TUNABLE] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
