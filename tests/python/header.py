"""Reads client/epd.h: its enums, structs and functions, for the tests that hold the package and the header together."""

from __future__ import annotations

import ctypes as c
import functools
import os
import pathlib
import re

HEADER = pathlib.Path(os.environ.get("EPD_HEADER", pathlib.Path(__file__).parents[2] / "client" / "epd.h"))

SCALARS = {
    "size_t": c.c_size_t,
    "uint8_t": c.c_uint8,
    "uint32_t": c.c_uint32,
    "int32_t": c.c_int32,
    "uint64_t": c.c_uint64,
    "int64_t": c.c_int64,
    "int": c.c_int,
    "char": c.c_char,
    "void": None,
}


@functools.cache
def text() -> str:
    """The header without its comments."""
    return re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)


def enums() -> dict[str, dict[str, int]]:
    """Members and numbers of every enum."""
    found = {}
    for name, body in re.findall(r"enum (epd_\w+) \{(.*?)\};", text(), flags=re.DOTALL):
        found[name], following = {}, 0
        for member, number in re.findall(r"(EPD_\w+)(?:\s*=\s*(\d+))?", body):
            following = int(number) if number else following
            found[name][member] = following
            following += 1
    return found


def structs() -> dict[str, list[tuple[str, str, int]]]:
    """Fields of every struct with a body: (C type, name, length of an array or 0)."""
    found = {}
    for name, body in re.findall(r"struct (epd_\w+) \{(.*?)\};", text(), flags=re.DOTALL):
        fields = []
        for declaration in filter(None, (" ".join(part.split()) for part in body.split(";"))):
            kind, names = re.fullmatch(r"(.*?[\s*])((?:\w+(?:\[\d+\])?(?:,\s*)?)+)", declaration).groups()
            for field in names.split(","):
                bare, length = re.fullmatch(r"\s*(\w+)(?:\[(\d+)\])?", field).groups()
                fields.append((kind.strip(), bare, int(length or 0)))
        found[name] = fields
    return found


def functions() -> dict[str, tuple[str, list[str]]]:
    """Result type and argument types of every function."""
    found = {}
    pattern = r"EPD_API(?:_VOID)? ([\w\s]+?[\s*]+)(epd_\w+)\(([^)]*)\);"
    for result, name, arguments in re.findall(pattern, text()):
        kinds = [] if arguments.strip() == "void" else [re.sub(r"\w+$", "", a.strip()).strip() for a in arguments.split(",")]
        found[name] = (result.strip(), kinds)
    return found
