"""Memory that nothing uses any more, given back to the system."""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Free what refers to itself (modules, graphs, sessions), and what the allocator keeps of it.

    glibc keeps freed blocks of up to 32 MiB for later; after an export that is gigabytes. C
    libraries without ``malloc_trim`` decide for themselves.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
