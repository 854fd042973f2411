"""Memory that the daemon and this process share."""

from __future__ import annotations

import dataclasses
import math
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .device import DeviceArray, DeviceBuffer
from .dtype import DTypeLike, dtype_of, numpy_dtype
from .errors import Closed, InvalidArgument, InvalidShape, OutOfRange
from .handle import Handle
from .mapping import map_again, unmap
from .words import DType

if TYPE_CHECKING:
    from .group import Group

MAX_DIMS = 3  # of a tensor


class Buffer:
    """A byte range that the daemon can reach, and arrays over it.

    Made by :meth:`epd.Group.alloc_buffer` and :meth:`epd.Group.register_memfd`. Arrays and plans made over a buffer keep it;
    it is given back to the daemon by :meth:`release`, or when the last of them is gone, or with its group. Memory that an
    array looks at stays mapped as long as the array lives, whatever was released or closed: reading it is always safe, but
    after the release nobody writes there any more.
    """

    def __init__(self, group: Group, handle: Handle, address: int, n_bytes: int) -> None:
        self._group = group
        self._handle = handle
        self.nbytes = n_bytes
        self.address, start, length = map_again(address, n_bytes)
        weakref.finalize(self, unmap, start, length).atexit = False
        # The group among the arguments stays until the buffer is given back.
        weakref.finalize(self, _retire, handle, group).atexit = False

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """numpy's protocol: the buffer as bytes. An array made from it has the buffer as its base."""
        return {"version": 3, "shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False)}

    def array(self, shape: tuple[int, ...], dtype: DTypeLike = DType.F32, offset: int = 0) -> npt.NDArray[Any]:
        """A numpy array of the shape over the buffer from the byte ``offset`` on; no copy. bf16 is ``uint16``.

        Raises :class:`epd.OutOfRange` if it passes the end, :class:`epd.Closed` after :meth:`release`.
        """
        kind = numpy_dtype(dtype_of(dtype, "array"))
        n_bytes = math.prod(shape) * kind.itemsize
        if self._handle.ended:
            raise Closed(f"{self._handle.what}: used after its end")
        if offset < 0 or offset + n_bytes > self.nbytes or min(shape, default=0) < 0:
            raise OutOfRange(f"array: offset {offset} and {n_bytes} bytes of {shape}, the buffer has {self.nbytes}")
        return np.asarray(self)[offset : offset + n_bytes].view(kind).reshape(shape)

    def release(self) -> None:
        """Gives the buffer back to the daemon now. Raises :class:`epd.InUse`, and leaves it, while a plan is bound to it."""
        self._handle.end()


def _retire(handle: Handle, group: Group) -> None:
    handle.calls.retire(handle)


@dataclasses.dataclass(frozen=True)
class Location:
    """Where an array lies, as the daemon knows the place."""

    buffer: Buffer | DeviceBuffer
    offset: int
    dtype: DType
    shape: tuple[int, ...]


def locate(array: Any, what: str) -> Location:
    """The buffer, offset, dtype and shape of an array over a buffer, or of a contiguous view of one.

    Raises :class:`epd.InvalidArgument` if it is none, :class:`epd.InvalidShape` or :class:`epd.InvalidDtype`.
    """
    if isinstance(array, Location):
        return array
    if isinstance(array, DeviceArray):
        if not 1 <= len(array.shape) <= MAX_DIMS:
            raise InvalidShape(f"{what}: {len(array.shape)} dimensions, want 1 to {MAX_DIMS}")
        return Location(array.buffer, array.offset if array.nbytes else 0, array.dtype, array.shape)
    if not isinstance(array, np.ndarray):
        raise InvalidArgument(
            f"{what}: {type(array).__name__}, want a numpy array or a DeviceArray: of Group.alloc, Buffer.array, register_array"
        )
    if not array.flags.c_contiguous:
        raise InvalidArgument(f"{what}: strides {array.strides} of shape {array.shape}, want C-contiguous")
    if not 1 <= array.ndim <= MAX_DIMS:
        raise InvalidShape(f"{what}: {array.ndim} dimensions, want 1 to {MAX_DIMS}")
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, Buffer):
        raise InvalidArgument(f"{what}: not in memory of the daemon, want an array made by Group.alloc or Buffer.array")
    offset = array.ctypes.data - base.address
    return Location(base, offset if array.size else 0, dtype_of(array.dtype, what), array.shape)
