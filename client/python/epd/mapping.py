"""A second mapping of a buffer's memory, for numpy. Internal.

libepd unmaps a buffer when it is released, when its group is left and when its client is closed, and an array that outlived
that would point nowhere. So arrays look at the same pages through a mapping of this process's own, which goes when the last
of them does.
"""

from __future__ import annotations

import ctypes as c
import functools
import mmap
import os

from .errors import System

_MREMAP_MAYMOVE = 1
_MAP_FAILED = c.c_void_p(-1).value


@functools.cache
def _libc() -> c.CDLL:
    libc = c.CDLL(None, use_errno=True)
    libc.mremap.restype = c.c_void_p
    libc.mremap.argtypes = [c.c_void_p, c.c_size_t, c.c_size_t, c.c_int]
    libc.munmap.restype = c.c_int
    libc.munmap.argtypes = [c.c_void_p, c.c_size_t]
    return libc


def map_again(address: int, n_bytes: int) -> tuple[int, int, int]:
    """Maps the shared pages around [address, address + n_bytes) a second time.

    Returns where the first byte of the range now is too, and what to give :func:`unmap`: start and length.
    """
    before = address % mmap.PAGESIZE
    length = before + n_bytes
    # A size of 0 means: leave the old mapping where it is and make a second one of the same shared pages.
    start = _libc().mremap(address - before, 0, length, _MREMAP_MAYMOVE)
    if start is None or start == _MAP_FAILED:
        raise System(f"buffer of {n_bytes} bytes: mremap: {os.strerror(c.get_errno())}")
    return start + before, start, length


def unmap(start: int, length: int) -> None:
    """Ends a mapping of :func:`map_again`."""
    _libc().munmap(start, length)
