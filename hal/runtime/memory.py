"""Memory that nothing uses any more, given back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_OWN_MAPPING = 8 << 20
_AS_GLIBC_ENDS = 32 << 20
"""Where the threshold ends that glibc raises by itself; its trim threshold is twice that."""


def give_back() -> None:
    """Free what refers to itself (modules, graphs, sessions), and what the allocator keeps of it.

    glibc keeps freed blocks of up to 32 MiB for later; after an export that is gigabytes. C
    libraries without ``malloc_trim`` decide for themselves.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def given_back_when_freed() -> Iterator[None]:
    """Let blocks of 8 MiB and more go back to the system as soon as they are freed.

    glibc takes blocks of up to 32 MiB from its heap once it has seen such a block freed, and a
    heap that ends in something that lives does not shrink: evaluating a model of 2 GB over 512
    tokens took 3.2 GB, and 0.9 with blocks from 1 MiB given back (which has many page faults, so it
    is 8 MiB here). C libraries without ``mallopt`` decide for themselves.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        yield
        return
    set_option(_M_MMAP_THRESHOLD, _OWN_MAPPING)
    set_option(_M_TRIM_THRESHOLD, 2 * _OWN_MAPPING)
    try:
        yield
    finally:
        set_option(_M_MMAP_THRESHOLD, _AS_GLIBC_ENDS)
        set_option(_M_TRIM_THRESHOLD, 2 * _AS_GLIBC_ENDS)
