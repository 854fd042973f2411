"""The package against client/epd.h: every number, every field, every function."""

from __future__ import annotations

import ctypes as c

import epd
import header
import pytest
from epd import library, structs

ENUMS = {
    "epd_status": (epd.Status, "EPD_"),
    "epd_dtype": (epd.DType, "EPD_"),
    "epd_op": (epd.Op, "EPD_OP_"),
    "epd_role": (epd.Role, "EPD_ROLE_"),
    "epd_gemm_layout": (epd.GemmLayout, "EPD_GEMM_"),
    "epd_activation": (epd.Activation, "EPD_"),
    "epd_overflow": (epd.Overflow, "EPD_OVERFLOW_"),
    "epd_saved": (epd.Saved, "EPD_SAVED_"),
    "epd_crossing": (epd.Crossing, "EPD_CROSSING_"),
    "epd_backend_kind": (epd.Backend, "EPD_BACKEND_"),
    "epd_phase": (epd.Phase, "EPD_PHASE_"),
}
# The package has no use for it: a buffer's kind follows from the call that makes it.
LEFT_OUT = {"epd_memory_kind"}


def test_every_enum_of_the_header_is_in_the_package():
    assert set(ENUMS) | LEFT_OUT == set(header.enums())


@pytest.mark.parametrize("name", ENUMS)
def test_enum_has_the_members_and_numbers_of_the_header(name):
    kind, prefix = ENUMS[name]
    want = {}
    for member, number in header.enums()[name].items():
        if member.endswith("_UNSPECIFIED"):
            want["UNSPECIFIED"] = number
        elif not member.endswith("_COUNT"):
            want[member.removeprefix(prefix)] = number
    assert {member.name: member.value for member in kind} == want


def test_every_status_but_ok_has_an_exception():
    assert set(epd.Error.of_status) == {status for status in epd.Status if status != epd.Status.OK}


def of_header(kind: str, length: int):
    """The ctypes type of a field as the header declares it."""
    kind = kind.replace("const ", "").strip()
    if kind.startswith("enum "):
        return c.c_int
    if kind.endswith("*"):
        target = kind.rstrip("* ")
        if target in ("char", "uint8_t"):
            return c.c_char_p
        body = getattr(structs, target.removeprefix("struct "), None)
        return c.POINTER(body) if body else c.c_void_p
    plain = getattr(structs, kind.removeprefix("struct "), None) if kind.startswith("struct ") else header.SCALARS[kind]
    return plain * length if length else plain


@pytest.mark.parametrize("name", header.structs())
def test_struct_has_the_fields_of_the_header(name):
    want = [(field, of_header(kind, length)) for kind, field, length in header.structs()[name]]
    assert getattr(structs, name)._fields_ == want


@pytest.mark.parametrize("name", library.PROTOTYPES)
def test_function_is_declared_as_in_the_header(name):
    result, arguments = header.functions()[name]
    given_result, given_arguments = library.PROTOTYPES[name]
    assert len(given_arguments) == len(arguments)
    for kind, given in zip(arguments, given_arguments, strict=True):
        bare = kind.replace("const ", "").strip()
        if bare.endswith("**"):
            assert given is c.POINTER(c.c_void_p)
        elif bare.endswith("*"):
            body = getattr(structs, bare.rstrip("* ").removeprefix("struct "), None)
            assert given is (c.POINTER(body) if body else c.c_void_p)
        else:
            assert given is of_header(bare, 0)
    if result.endswith("*"):
        assert given_result is (c.c_char_p if "char" in result else c.c_void_p)
    else:
        assert given_result is of_header(result, 0)


def test_words_are_taken_as_members_and_as_names():
    from epd.words import word_of

    assert word_of(epd.Op, "moe_forward", "op") is word_of(epd.Op, epd.Op.MOE_FORWARD, "op") is epd.Op.MOE_FORWARD
    with pytest.raises(epd.InvalidArgument, match="activation: 'silu', want one of swiglu, geglu, relu2"):
        word_of(epd.Activation, "silu", "activation")
