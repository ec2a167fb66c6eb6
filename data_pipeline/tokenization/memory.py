"""What this process holds, and giving back what it has freed."""

import ctypes
import os
from pathlib import Path

STATUS = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Return the memory this process occupies; 0 where the system does not tell."""
    try:
        return int(STATUS.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0


def release_freed_memory() -> None:
    """Give back to the system what was freed; glibc alone would keep it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
