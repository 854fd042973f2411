"""This rank's membership in an expert-parallel group."""

from __future__ import annotations

import ctypes as c
import dataclasses
import math
import os
import types
import uuid
import weakref
from typing import TYPE_CHECKING, Any

from . import structs
from .buffer import Buffer
from .device import SIZE_OF, DeviceArray, DeviceBuffer, MemoryRange, described
from .driver import ordinal_of
from .dtype import DTypeLike, dtype_of, numpy_dtype
from .errors import InvalidArgument, InvalidShape
from .handle import Handle
from .library import check
from .ops import ActivationLike, Ops
from .plan import Plan, Recipe, Tensor, create
from .words import Activation, Backend, Crossing, DType, GemmLayout, Op, Saved, word_of

if TYPE_CHECKING:
    from .client import Client

_RANGE_BYTES = c.sizeof(structs.epd_memory_range)


@dataclasses.dataclass(frozen=True)
class GroupInfo:
    """What the daemon decided about a group."""

    epoch: int
    world_size: int
    rank: int
    n_local_experts: int
    """L: experts of this rank."""
    first_expert: int
    """The first of them."""
    capacity_rows: int
    """C: rows that a rank can receive."""
    device_idx: int
    device_uuid: uuid.UUID


class Group(Ops):
    """Made by :meth:`epd.Client.join`. A context manager; leaves at the end of the block.

    Ends with :meth:`leave`, with its client, or when nothing of it is referenced any more. The other ranks' next collective
    launch then raises :class:`epd.PeerLost`.
    """

    def __init__(self, client: Client, handle: Handle, name: str) -> None:
        self._client = client
        self._api = client._api
        self._handle = handle
        self.name = name
        self._cuda_ordinal: int | None = None
        info = structs.sized(structs.epd_group_info)
        with handle as pointer:
            check(self._api, self._api.epd_group_info(pointer, c.byref(info)))
        self.info = GroupInfo(
            epoch=info.epoch,
            world_size=info.world_size,
            rank=info.rank,
            n_local_experts=info.n_local_experts,
            first_expert=info.first_expert,
            capacity_rows=info.capacity_rows,
            device_idx=info.device_idx,
            device_uuid=uuid.UUID(bytes=bytes(info.device_uuid)),
        )
        weakref.finalize(self, _retire, handle, client).atexit = False

    def alloc_buffer(self, n_bytes: int) -> Buffer | DeviceBuffer:
        """Zeroed memory of the daemon on the group's device. Raises :class:`epd.Quota`, :class:`epd.NoMemory`."""
        created = c.c_void_p()
        with self._handle as pointer:
            check(self._api, self._api.epd_buffer_alloc(pointer, n_bytes, c.byref(created)))
            return self._buffer(created)

    def alloc(self, shape: int | tuple[int, ...], dtype: DTypeLike = DType.F32) -> Any:
        """A zeroed array over a new buffer: of numpy on the host backend, where bf16 is a ``uint16`` array of bits
        (:func:`epd.to_bf16`), a :class:`epd.DeviceArray` on CUDA.

        The buffer lives as long as the array, views of it and plans with it. An array without elements is legal: a rank may
        have no tokens.
        """
        dims = (shape,) if isinstance(shape, int) else tuple(shape)
        if min(dims, default=0) < 0:
            raise InvalidShape(f"alloc: shape {dims}, want no negative dimension")
        kind = dtype_of(dtype, "alloc")
        n_bytes = math.prod(dims) * numpy_dtype(kind).itemsize
        return self.alloc_buffer(max(n_bytes, 1)).array(dims, kind)

    def register_memfd(self, fd: int, offset: int = 0, n_bytes: int | None = None) -> Buffer:
        """Makes a range of a memfd of this process a buffer, by default the whole one. Host backend.

        The memfd must be sealed with ``F_SEAL_SHRINK``; the fd stays the caller's and may be closed. Raises
        :class:`epd.OutOfRange`, :class:`epd.InvalidArgument` (no memfd, not sealed), :class:`epd.Unsupported` (CUDA).
        """
        size = _file_size(fd) - offset if n_bytes is None else n_bytes
        created = c.c_void_p()
        with self._handle as pointer:
            check(self._api, self._api.epd_buffer_register_memfd(pointer, fd, offset, size, c.byref(created)))
            made = self._buffer(created)
            assert isinstance(made, Buffer)  # of the host backend
            return made

    def register_cuda(self, address: int, n_bytes: int, keep: Any = None) -> DeviceBuffer:
        """Makes ``[address, address + n_bytes)`` of this process's memory on the group's GPU a buffer. No copy. CUDA backend.

        keep: an object that the buffer holds a reference to, such as the owner of the memory, which must stay allocated as
        long as the buffer. Raises :class:`epd.InvalidDevice` (names both UUIDs), :class:`epd.OutOfRange`,
        :class:`epd.Unsupported` (host backend).
        """
        created = c.c_void_p()
        with self._handle as pointer:
            check(self._api, self._api.epd_buffer_register_cuda(pointer, address, n_bytes, c.byref(created)))
            return self._device_buffer(created, keep)

    def register_array(self, array: Any) -> DeviceArray:
        """A device array of another library, with DLPack or ``__cuda_array_interface__``, for plans. Kept; no copy."""
        address, dtype, shape = described(array, "register_array")
        if 0 in shape:
            raise InvalidShape(f"register_array: shape {shape} has no elements")
        n_bytes = math.prod(shape) * SIZE_OF[dtype]
        return self.register_cuda(address, n_bytes, array).array(shape, dtype)

    def memory_range(self, address: int) -> MemoryRange:
        """The allocation that a device address lies in. Raises :class:`epd.InvalidArgument` if it lies in none."""
        found = structs.sized(structs.epd_memory_range)
        with self._handle as pointer:
            check(self._api, self._api.epd_memory_range(pointer, address, c.byref(found)))
        device = uuid.UUID(bytes=bytes(found.device_uuid))
        return MemoryRange(found.base, found.bytes, found.allocation_id, device, bool(found.is_vmm))

    def allocation_id(self, address: int) -> int | None:
        """The number of the allocation that a device address lies in; no other allocation of this process ever has it. None of
        VMM memory, where the driver's number does not tell. Raises :class:`epd.InvalidArgument` if it lies in none.
        """
        found = structs.epd_memory_range(_RANGE_BYTES)
        with self._handle as pointer:
            status = self._api.epd_memory_range(pointer, address, c.byref(found))
            if status != 0:
                check(self._api, status)
        return None if found.is_vmm else int(found.allocation_id)

    def plan(
        self,
        op: str | Op,
        *,
        context: Plan | None = None,
        layout: str | GemmLayout | None = None,
        activation: ActivationLike | None = None,
        saved: str | Saved = Saved.NONE,
        accumulate: bool = False,
        delay_wgrad: bool = False,
        crossing: str | Crossing = Crossing.UNSPECIFIED,
        **tensors: Tensor | None,
    ) -> Plan:
        """A plan of any op, its tensors by role (None: not bound), e.g. ``group.plan("combine", context=d, y=y, out=out)``.

        The methods named after the ops say which op takes what. Collective for collective ops.
        """
        kind = word_of(Op, op, "op")
        recipe = Recipe(
            op=kind,
            layout=GemmLayout.UNSPECIFIED if layout is None else word_of(GemmLayout, layout, "layout"),
            activation=Activation.UNSPECIFIED if activation is None else word_of(Activation, activation, "activation"),
            saved=word_of(Saved, saved, "saved"),
            accumulate=accumulate,
            delay_wgrad=delay_wgrad,
            crossing=word_of(Crossing, crossing, "crossing"),
            context=context,
            tensors={name: tensor for name, tensor in tensors.items() if tensor is not None},
        )
        return create(self, recipe)

    @property
    def client(self) -> Client:
        """The client it was joined with."""
        return self._client

    @property
    def cuda_ordinal(self) -> int:
        """The number of the group's GPU in this process, as ``cudaSetDevice`` takes it. CUDA backend."""
        if self._cuda_ordinal is None:
            self._cuda_ordinal = ordinal_of(self.info.device_uuid)
        return self._cuda_ordinal

    def leave(self) -> None:
        """Leaves: destroys this rank's plans and gives its buffers back. Harmless the second time."""
        self._handle.end()

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.leave()

    def _buffer(self, created: c.c_void_p) -> Buffer | DeviceBuffer:
        """The owner of a new native buffer, made inside a call of the group."""
        if self._client.info.backend == Backend.CUDA:
            return self._device_buffer(created)
        handle = self._buffer_handle(created)
        return Buffer(self, handle, self._api.epd_buffer_data(created), self._api.epd_buffer_bytes(created))

    def _device_buffer(self, created: c.c_void_p, keep: Any = None) -> DeviceBuffer:
        handle = self._buffer_handle(created)
        return DeviceBuffer(self, handle, self._api.epd_buffer_data(created), self._api.epd_buffer_bytes(created), keep)

    def _buffer_handle(self, created: c.c_void_p) -> Handle:
        api, pointer = self._api, created.value
        assert pointer is not None
        n_bytes = api.epd_buffer_bytes(pointer)
        return Handle(
            self._handle.calls,
            pointer,
            f"buffer of {n_bytes} bytes of group {self.name}",
            lambda ended: check(api, api.epd_buffer_release(ended)),
            self._handle,
        )


def _file_size(fd: int) -> int:
    try:
        return os.fstat(fd).st_size
    except OSError as error:
        raise InvalidArgument(f"register_memfd: fd {fd}: {error.strerror}") from None


def _retire(handle: Handle, client: Client) -> None:
    handle.calls.retire(handle)
