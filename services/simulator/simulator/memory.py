"""How a process keeps its memory that trains one client after the other."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES = 512 * 1024 * 1024
"""Above any buffer of a training step that is worth keeping, and far below what would be missed if it were."""


def keep_freed_memory() -> None:
    """Have malloc keep what is freed for what is asked for next.

    glibc by itself gives the buffers of a training step back to the system as each client ends, and the next one gets them
    anew, page by page and emptied: thousands of page faults a client. Elsewhere, as on macOS, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
