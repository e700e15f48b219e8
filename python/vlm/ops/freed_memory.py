"""Memory that a process frees and keeps for itself.

Every update allocates and frees the same large activations. By default the C library gives them back to the system
each time and gets them again as pages that must be zeroed: a million page faults in eight updates of `clip-tiny`.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Tell the GNU C library's allocator to keep freed memory for reuse, torch's tensors included. Returns whether it agreed.

    By default every tensor of 32 MiB or more is mapped anew, and its pages are faulted in when they are first written: a
    third of the time of `linear_decay` over 16384 positions. Process-wide and for good; no value changes, and the resident
    memory then rarely falls. Every training run asks for it. Elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20))
    return all([mallopt(name, value) == 1 for name, value in settings])  # noqa: C419 - every call must happen
