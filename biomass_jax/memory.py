"""What the C library does with memory that is freed; glibc only, nothing elsewhere."""

import ctypes
import sys
from typing import Any

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_MOST = 2**31 - 1


def keep_freed() -> bool:
    """Keep freed memory for the next time; to be called before JAX computes anything and threads are started.

    A program that XLA has compiled for the CPU takes its intermediate arrays' memory at each call, 1.5 GB for a
    training step of Swin-B, and glibc gives blocks as large back to the system at once: every page is mapped and zeroed
    anew, a tenth of the time. One arena for all threads, because the others can't grow beyond 64 MB.

    Returns:
        Whether the C library took it.
    """
    libc = _glibc()
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MOST))
    return libc is not None and all(libc.mallopt(name, value) == 1 for name, value in settings)


def give_back() -> None:
    """Give free memory back to the system, between two uses of which the first one's doesn't suit the second."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
