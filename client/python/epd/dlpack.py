"""DLPack by ctypes: capsules made and read without a compiler. Internal."""

from __future__ import annotations

import ctypes as c
from typing import Any

from .errors import InvalidDtype
from .words import DType

CUDA = 2  # kDLCUDA
_NAME = b"dltensor"
# kDLInt 0, kDLFloat 2, kDLBfloat 4; bits
_CODE = {DType.F32: (2, 32), DType.F16: (2, 16), DType.BF16: (4, 16), DType.I32: (0, 32), DType.I64: (0, 64)}
_OF_CODE = {code: dtype for dtype, code in _CODE.items()}


class _Tensor(c.Structure):
    _fields_ = [
        ("data", c.c_void_p),
        ("device_type", c.c_int32),
        ("device_id", c.c_int32),
        ("ndim", c.c_int32),
        ("code", c.c_uint8),
        ("bits", c.c_uint8),
        ("lanes", c.c_uint16),
        ("shape", c.POINTER(c.c_int64)),
        ("strides", c.POINTER(c.c_int64)),
        ("byte_offset", c.c_uint64),
    ]


class _Managed(c.Structure):
    pass


_Deleter = c.CFUNCTYPE(None, c.POINTER(_Managed))
_Managed._fields_ = [("tensor", _Tensor), ("context", c.c_void_p), ("deleter", _Deleter)]

_Destructor = c.CFUNCTYPE(None, c.c_void_p)
_api = c.pythonapi
_new = c.PYFUNCTYPE(c.py_object, c.c_void_p, c.c_char_p, _Destructor)(("PyCapsule_New", _api))
_pointer = c.PYFUNCTYPE(c.c_void_p, c.py_object, c.c_char_p)(("PyCapsule_GetPointer", _api))
# The same for the destructor, which is given a capsule that is being freed: no reference may be taken to it.
_raw_is_valid = c.PYFUNCTYPE(c.c_int, c.c_void_p, c.c_char_p)(("PyCapsule_IsValid", _api))
_raw_pointer = c.PYFUNCTYPE(c.c_void_p, c.c_void_p, c.c_char_p)(("PyCapsule_GetPointer", _api))

# What exported tensors keep alive, until their consumer calls the deleter: address of the struct -> (struct, array, dims).
_exported: dict[int, tuple[Any, ...]] = {}


@_Deleter
def _delete(managed: Any) -> None:
    _exported.pop(c.addressof(managed.contents), None)


@_Destructor
def _destroy(capsule: int) -> None:
    """A capsule that nobody consumed takes its tensor with it."""
    if _raw_is_valid(capsule, _NAME):
        _exported.pop(_raw_pointer(capsule, _NAME), None)


def export(owner: Any, address: int, device: tuple[int, int], dtype: DType, shape: tuple[int, ...]) -> Any:
    """A capsule of a C-contiguous tensor; owner lives until its consumer is done with it."""
    code, bits = _CODE[dtype]
    dims = (c.c_int64 * max(len(shape), 1))(*shape)
    managed = _Managed(
        tensor=_Tensor(
            data=address,
            device_type=device[0],
            device_id=device[1],
            ndim=len(shape),
            code=code,
            bits=bits,
            lanes=1,
            shape=dims,
            strides=None,
            byte_offset=0,
        ),
        context=None,
        deleter=_delete,
    )
    _exported[c.addressof(managed)] = (managed, owner, dims)
    return _new(c.addressof(managed), _NAME, _destroy)


def read(capsule: Any, what: str) -> tuple[int, DType, tuple[int, ...], tuple[int, ...] | None]:
    """Address, dtype, shape and strides in elements (None: C-contiguous) of a capsule, which keeps its tensor.

    The tensor is not consumed: the capsule's own destructor ends it, so the memory must be kept by the caller's array.
    """
    tensor = c.cast(_pointer(capsule, _NAME), c.POINTER(_Managed)).contents.tensor
    dtype = _OF_CODE.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
    if dtype is None:
        raise InvalidDtype(f"{what}: DLPack type {tensor.code} of {tensor.bits} bits, want f32, bf16, f16, i32 or i64")
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
    return (tensor.data or 0) + tensor.byte_offset, dtype, shape, strides
