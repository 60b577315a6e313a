"""Memory behaviour of the process that trains."""

from __future__ import annotations

import contextlib
import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE = 2**31 - 1


def reuse_large_blocks() -> bool:
    """Let glibc keep freed tensors for the next batch; returns whether that was possible.

    Blocks above 32 MiB are mapped from the system and given back when freed. Activations of a batch of 2048 requests
    are that large, and touching fresh pages again in every layer cost a third of an epoch on the CPU where it was
    measured.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)) & bool(libc.mallopt(_M_TRIM_THRESHOLD, _LARGE))
    return False
