"""Device memory that the daemon can reach, on the CUDA backend, and arrays over it."""

from __future__ import annotations

import dataclasses
import math
import uuid
import weakref
from typing import TYPE_CHECKING, Any

from . import dlpack
from .dtype import DTypeLike, dtype_of
from .errors import Closed, InvalidArgument, InvalidDtype, InvalidShape, OutOfRange, Unsupported
from .handle import Handle
from .words import DType

if TYPE_CHECKING:
    from .group import Group

SIZE_OF = {DType.F32: 4, DType.BF16: 2, DType.F16: 2, DType.I32: 4, DType.I64: 8}
# The interface has no bfloat16.
_TYPESTR = {DType.F32: "<f4", DType.F16: "<f2", DType.I32: "<i4", DType.I64: "<i8"}
_OF_TYPESTR = {typestr: dtype for dtype, typestr in _TYPESTR.items()}
_NO_ORDER = -1  # a DLPack stream: the producer is to wait for nothing


@dataclasses.dataclass(frozen=True)
class MemoryRange:
    """The allocation that an address of this process's device memory lies in."""

    base: int
    nbytes: int
    allocation_id: int
    """Unique in this process: another allocation at the same address has another one."""
    device_uuid: uuid.UUID
    is_vmm: bool
    """False: cudaMalloc. True: a VMM mapping, which may be one piece of a larger address range."""


class DeviceBuffer:
    """A range of device memory that the daemon can reach: of its symmetric heap, or this process's own, registered.

    Made by :meth:`epd.Group.alloc_buffer` and :meth:`epd.Group.register_cuda`. Arrays and plans made over a buffer keep it; it
    is given back by :meth:`release`, or when the last of them is gone, or with its group. An array over memory of the daemon
    must not be used after that: unlike host memory it is not mapped here any more.
    """

    def __init__(self, group: Group, handle: Handle, address: int, n_bytes: int, keep: Any = None) -> None:
        self._group = group
        self._handle = handle
        self._keep = keep
        self.address = address
        self.nbytes = n_bytes
        weakref.finalize(self, _retire, handle, group).atexit = False

    def array(self, shape: int | tuple[int, ...], dtype: DTypeLike = DType.F32, offset: int = 0) -> DeviceArray:
        """An array of the shape over the buffer from the byte ``offset`` on; no copy.

        Raises :class:`epd.OutOfRange` if it passes the end, :class:`epd.Closed` after :meth:`release`.
        """
        dims = (shape,) if isinstance(shape, int) else tuple(shape)
        kind = dtype_of(dtype, "array")
        n_bytes = math.prod(dims) * SIZE_OF[kind]
        if self._handle.ended:
            raise Closed(f"{self._handle.what}: used after its end")
        if offset < 0 or offset + n_bytes > self.nbytes or min(dims, default=0) < 0:
            raise OutOfRange(f"array: offset {offset} and {n_bytes} bytes of {dims}, the buffer has {self.nbytes}")
        return DeviceArray(self, offset, kind, dims)

    def release(self) -> None:
        """Gives the buffer back to the daemon now. Raises :class:`epd.InUse`, and leaves it, while a plan is bound to it."""
        self._handle.end()


@dataclasses.dataclass(frozen=True)
class DeviceArray:
    """A C-contiguous array in a :class:`DeviceBuffer`: what plans take, and other libraries through the two protocols."""

    buffer: DeviceBuffer
    offset: int
    dtype: DType
    shape: tuple[int, ...]

    @property
    def address(self) -> int:
        """The first byte, a device pointer."""
        return self.buffer.address + self.offset

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SIZE_OF[self.dtype]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3, without a stream: order with epd's launches is the caller's. Raises AttributeError for bf16."""
        if self.dtype not in _TYPESTR:
            raise AttributeError(f"__cuda_array_interface__ has no {self.dtype.name.lower()}; DLPack has")
        address = self.address if self.nbytes else 0
        return {"version": 3, "shape": self.shape, "typestr": _TYPESTR[self.dtype], "data": (address, False), "strides": None}

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> Any:
        """A capsule for ``from_dlpack`` of other libraries. No synchronisation: order with epd's launches is the caller's."""
        return dlpack.export(self, self.address, self.__dlpack_device__(), self.dtype, self.shape)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.buffer._group.cuda_ordinal


def described(array: Any, what: str) -> tuple[int, DType, tuple[int, ...]]:
    """Address, dtype and shape of a C-contiguous device array of any library, by DLPack or ``__cuda_array_interface__``."""
    if hasattr(array, "__dlpack__"):  # first, for it has bf16, of which the other one of PyTorch raises
        if array.__dlpack_device__()[0] != dlpack.CUDA:
            raise Unsupported(f"{what}: not in the memory of a CUDA device")
        address, dtype, shape, strides = dlpack.read(array.__dlpack__(stream=_NO_ORDER), what)
    elif (interface := getattr(array, "__cuda_array_interface__", None)) is not None:
        found = _OF_TYPESTR.get(interface["typestr"])
        if found is None:
            raise InvalidDtype(f"{what}: {interface['typestr']}, want one of {', '.join(_OF_TYPESTR)}; bf16 goes by DLPack")
        dtype, shape, strides = found, tuple(interface["shape"]), interface.get("strides")
        if strides is not None:
            strides = tuple(stride // SIZE_OF[dtype] for stride in strides)
        address = int(interface["data"][0])
    else:
        raise InvalidArgument(f"{what}: {type(array).__name__} has neither __cuda_array_interface__ nor __dlpack__")
    if strides is not None and strides != contiguous(shape) and math.prod(shape) > 0:
        raise InvalidShape(f"{what}: strides {strides} of shape {shape}, want C-contiguous")
    return address, dtype, shape


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a C-contiguous array."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _retire(handle: Handle, group: Group) -> None:
    handle.calls.retire(handle)
