"""Finds libepd and declares its functions. Internal.

ctypes releases the GIL during every call, so a thread that waits for a step keeps no other thread from running.
"""

from __future__ import annotations

import ctypes as c
import functools
import os
import pathlib
from typing import Any

from . import structs as s
from .errors import LibraryNotFound, error_of

SONAME = "libepd.so.0"

_handle = c.c_void_p
_new = c.POINTER(c.c_void_p)

# name: (result, arguments)
PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "epd_error_text": (c.c_char_p, []),
    "epd_version": (c.c_char_p, []),
    "epd_open": (c.c_int, [c.POINTER(s.epd_open_options), _new]),
    "epd_close": (None, [_handle]),
    "epd_reconnect": (c.c_int, [_handle, c.c_uint32]),
    "epd_client_info": (c.c_int, [_handle, c.POINTER(s.epd_client_info)]),
    "epd_stats": (c.c_int, [_handle, c.POINTER(c.c_void_p)]),
    "epd_free": (None, [c.c_void_p]),
    "epd_group_join": (c.c_int, [_handle, c.POINTER(s.epd_group_options), _new]),
    "epd_group_leave": (None, [_handle]),
    "epd_group_info": (c.c_int, [_handle, c.POINTER(s.epd_group_info)]),
    "epd_buffer_alloc": (c.c_int, [_handle, c.c_uint64, _new]),
    "epd_buffer_register_memfd": (c.c_int, [_handle, c.c_int, c.c_uint64, c.c_uint64, _new]),
    "epd_buffer_register_cuda": (c.c_int, [_handle, c.c_void_p, c.c_uint64, _new]),
    "epd_memory_range": (c.c_int, [_handle, c.c_void_p, c.POINTER(s.epd_memory_range)]),
    "epd_buffer_data": (c.c_void_p, [_handle]),
    "epd_buffer_bytes": (c.c_uint64, [_handle]),
    "epd_buffer_release": (c.c_int, [_handle]),
    "epd_plan_create": (c.c_int, [_handle, c.POINTER(s.epd_plan_options), _new]),
    "epd_plan_destroy": (None, [_handle]),
    "epd_plan_set_tokens": (c.c_int, [_handle, c.c_uint32]),
    "epd_plan_launch": (c.c_int, [_handle, c.c_void_p]),
    "epd_plan_wait": (c.c_int, [_handle, c.c_uint32]),
    "epd_plan_check": (c.c_int, [_handle]),
    "epd_plan_step": (c.c_int, [_handle, c.c_void_p, c.POINTER(s.epd_copy), c.c_uint32, c.c_uint32]),
    "epd_plan_capture": (c.c_int, [_handle, c.c_void_p]),
    "epd_plan_arm": (c.c_int, [_handle, c.c_uint32]),
    "epd_plan_failure": (c.c_int, [_handle, c.POINTER(s.epd_failure)]),
    "epd_plan_info": (c.c_int, [_handle, c.POINTER(s.epd_plan_info)]),
}


def candidates() -> list[str]:
    """Where libepd is looked for, in this order: ``$EPD_LIBRARY`` alone if set; beside this package; the system loader."""
    named = os.environ.get("EPD_LIBRARY")
    if named:
        return [named]
    return [str(pathlib.Path(__file__).with_name(SONAME)), SONAME]


@functools.cache
def _open(path: str) -> c.CDLL:
    library = c.CDLL(path)
    for name, (result, arguments) in PROTOTYPES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


def load() -> c.CDLL:
    """libepd with its functions declared. Raises :class:`epd.LibraryNotFound`."""
    failures = []
    for path in candidates():
        try:
            return _open(path)
        except OSError as error:
            failures.append(str(error))
        except AttributeError as error:  # another library, or one that is too old
            failures.append(f"{path}: {error}")
    raise LibraryNotFound("libepd cannot be loaded; set EPD_LIBRARY to its file (" + "; ".join(failures) + ")")


def check(api: c.CDLL, status: int) -> None:
    """Raises the exception of a failed call of this thread, with the sentence that libepd keeps for it."""
    if status != 0:
        raise error_of(status, text_of(api.epd_error_text()))


def text_of(given: bytes) -> str:
    """What libepd and the daemon write, for people."""
    return given.decode("utf-8", "replace")
