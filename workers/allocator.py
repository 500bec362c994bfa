"""glibc's malloc, told to keep what a rank frees: the next step asks for the same again.

By default it gives large blocks back to the kernel as they are freed. Each step then takes its activations from there
anew, and the kernel clears them page by page.
"""

from __future__ import annotations

import ctypes
import logging

_log = logging.getLogger(__name__)

# Of malloc.h: above the first a block is a mapping of its own, given back once freed; above the second the heap's
# free end is given back.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Sets both limits to 1 GiB for the whole process; False, and no change, where malloc has no such setting."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not all(mallopt(name, _KEPT_BYTES) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)):
        _log.info("this malloc cannot be told to keep freed memory")
        return False
    return True
