"""glibc's malloc, told what to do with what a rank frees: give it back while loading, keep it between steps.

Loading copies a matrix into another order and frees the first, which would leave holes in the heap. In a step it is the
other way round: by default large blocks go back to the kernel as they are freed, so each step takes its activations
from there anew, and the kernel clears them page by page.
"""

from __future__ import annotations

import ctypes
import logging

_log = logging.getLogger(__name__)

# Of malloc.h: above the first a block is a mapping of its own, given back once freed; above the second the heap's
# free end is given back.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_KEPT_BYTES = 1 << 30
# malloc's own defaults, which it raises by itself unless they are set.
_GIVEN_BACK_BYTES = 128 << 10


def keep_freed_memory() -> bool:
    """Sets both limits to 1 GiB for the whole process; False, and no change, where malloc has no such setting."""
    return _set_limits(_KEPT_BYTES)


def give_freed_memory_back() -> bool:
    """Sets both limits to 128 KiB for the whole process; False, and no change, where malloc has no such setting."""
    return _set_limits(_GIVEN_BACK_BYTES)


def _set_limits(num_bytes: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not all(mallopt(name, num_bytes) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)):
        _log.info("this malloc cannot be told when to keep freed memory")
        return False
    return True
