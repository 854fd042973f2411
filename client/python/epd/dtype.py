"""Element types between epd and numpy.

numpy has no bfloat16: a bf16 tensor is a ``uint16`` array that holds its bits, and so is every ``uint16`` array to a plan.
:func:`to_bf16` and :func:`from_bf16` convert. An array of ``ml_dtypes.bfloat16``, of users who have that package, is taken
as it is (``array.view(ml_dtypes.bfloat16)`` of a bf16 tensor makes one).
"""

from __future__ import annotations

from typing import Any, Union

import numpy as np
import numpy.typing as npt

from .errors import InvalidDtype
from .words import DType, word_of

DTypeLike = Union[str, DType, "np.dtype[Any]", type]

_NUMPY_OF: dict[DType, np.dtype[Any]] = {
    DType.F32: np.dtype(np.float32),
    DType.BF16: np.dtype(np.uint16),
    DType.F16: np.dtype(np.float16),
    DType.I32: np.dtype(np.int32),
    DType.I64: np.dtype(np.int64),
}
_OF_NAME: dict[str, DType] = {dtype.name: known for known, dtype in _NUMPY_OF.items()}
_OF_NAME["bfloat16"] = DType.BF16  # of ml_dtypes


def dtype_of(given: DTypeLike, what: str) -> DType:
    """The epd dtype of a word (``"bf16"``), a member or a numpy dtype. Raises :class:`epd.InvalidDtype`."""
    if isinstance(given, DType):
        return given
    if isinstance(given, str) and given.upper() in DType.__members__:
        return word_of(DType, given, what)
    try:
        dtype = np.dtype(given)
    except TypeError:
        raise InvalidDtype(f"{what}: dtype {given!r}, want f32, bf16, f16, i32 or i64") from None
    if dtype.name not in _OF_NAME or not dtype.isnative:
        raise InvalidDtype(f"{what}: dtype {dtype}, want float32, uint16 (the bits of bf16), float16, int32 or int64")
    return _OF_NAME[dtype.name]


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """The dtype of the numpy view of a tensor: ``uint16`` for bf16."""
    return _NUMPY_OF[dtype]


def to_bf16(values: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """The bits of the values as bf16, rounded from float32 to nearest, ties to even. NaN stays NaN. A new uint16 array."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1))).astype(np.uint32)) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x0040)
    return np.where(is_nan, quiet, rounded).astype(np.uint16).reshape(np.shape(values))


def from_bf16(bits: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The float32 values of bf16 bits (uint16, or an array of ml_dtypes.bfloat16). A new array."""
    array = np.ascontiguousarray(bits)
    if array.dtype.name == "bfloat16":
        array = array.view(np.uint16)
    if array.dtype != np.uint16:
        raise InvalidDtype(f"from_bf16: dtype {array.dtype}, want uint16")
    return (array.astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(np.shape(bits))
