"""Memory: what running out of it looks like, and the C allocator made to keep what is freed."""

import ctypes
import logging

import torch

log = logging.getLogger(__name__)
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let freed memory wait for the next pass instead of going back to the system; return whether the allocator can.

    A pass frees buffers of many megabytes, and the next pass takes them again. By default glibc maps each anew, and
    the system clears every page of it first. All threads share one arena: another has no room for such buffers. The
    process keeps the memory of its largest pass; mallopt(3).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        log.info("this C library has no mallopt: memory goes back to the system after every pass")
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER) and mallopt(M_ARENA_MAX, 1))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory does not suffice, on the processor or on a device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
