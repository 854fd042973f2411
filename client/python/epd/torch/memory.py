"""Where a tensor's memory lies, as the daemon knows it. Internal.

PyTorch sub-allocates: many tensors share one cudaMalloc allocation, and an address is used again and again. So the whole
allocation is registered, once, and every tensor in it is a place in that buffer. The driver numbers allocations; a number that
has changed means that the memory was given back and another allocation lies at the address, and the old registration is never
used again. A registration ends with the last plan that is bound to it.
"""

from __future__ import annotations

import collections
import math
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .. import group as epd_group
from ..buffer import Buffer, Location
from ..device import DeviceBuffer, MemoryRange
from ..errors import InvalidArgument, InvalidDtype, NoMemory, OutOfRange, Quota, Unsupported
from ..words import Backend, DType

DTYPES: dict[torch.dtype, DType] = {
    torch.float32: DType.F32,
    torch.bfloat16: DType.BF16,
    torch.float16: DType.F16,
    torch.int32: DType.I32,
    torch.int64: DType.I64,
}


def epd_dtype(dtype: torch.dtype, what: str) -> DType:
    """The epd word for a torch dtype. Raises :class:`epd.InvalidDtype`."""
    found = DTYPES.get(dtype)
    if found is None:
        raise InvalidDtype(f"{what}: {dtype}, want one of {', '.join(str(known) for known in DTYPES)}")
    return found


class Memory:
    """The tensors of one group. ``empty`` makes tensors that plans take on either backend, ``locate`` finds any."""

    device: torch.device

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor that plans can be bound to."""
        raise NotImplementedError

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """As :meth:`empty`, of the shape and dtype of another one."""
        return self.empty(tuple(tensor.shape), tensor.dtype)

    def abandon(self) -> None:
        """A step may have been left in flight, or the group was left. Nothing to do where memory is not given out again."""

    def place(self, tensor: torch.Tensor, what: str) -> tuple[Buffer | DeviceBuffer, int]:
        """The buffer that the tensor lies in, and the offset of its first byte."""
        raise NotImplementedError

    def mark(self, tensor: torch.Tensor) -> object:
        """What a plan that is bound to the tensor is found by: equal for tensors of the same place, shape and dtype as long as
        the :meth:`place` of one of them is kept. Looks the place up as far as that takes, and registers nothing.
        """
        raise NotImplementedError

    def locate(self, tensor: torch.Tensor, what: str) -> Location:
        """The tensor as plans take it. Raises :class:`epd.InvalidArgument` or :class:`epd.InvalidDtype`."""
        dtype = epd_dtype(tensor.dtype, what)
        if not tensor.is_contiguous():
            raise InvalidArgument(f"{what}: strides {tuple(tensor.stride())} of shape {tuple(tensor.shape)}, want contiguous")
        if tensor.device != self.device:
            raise InvalidArgument(f"{what}: on {tensor.device}, want {self.device}")
        buffer, offset = self.place(tensor, what)
        return Location(buffer, offset, dtype, tuple(tensor.shape))


class _Gone:
    """Buffers whose tensors are gone, with the sizes asked for. No locks: tensors are collected at any point of any thread."""

    def __init__(self) -> None:
        self._buffers: collections.deque[tuple[int, Buffer]] = collections.deque()
        self._is_closed = False

    def put(self, n_bytes: int, buffer: Buffer) -> None:
        self._buffers.append((n_bytes, buffer))
        if self._is_closed:
            self._buffers.clear()

    def take(self) -> list[tuple[int, Buffer]]:
        return [self._buffers.popleft() for _ in range(len(self._buffers))]

    def close(self) -> None:
        """Lets go of what there is, and at once of what is put there later: tensors that live longer refer to this."""
        self._is_closed = True
        self._buffers.clear()


class HostMemory(Memory):
    """Host backend: tensors over memory of the daemon, made by ``empty`` alone.

    A buffer whose tensors are all gone is kept for the next tensor of its size: a training loop asks for the same ones in every
    step, and the plans that are bound to them are found again. A step of the host backend has ended when its call returns, so
    nothing is written there any more; where one was left in flight, :meth:`abandon` is called.
    """

    KEPT_BUFFERS, KEPT_BYTES = 64, 256 << 20  # of tensors that are gone, at most; those that went first go

    def __init__(self, group: epd_group.Group) -> None:
        self.device = torch.device("cpu")
        self._group = group
        self._buffers: weakref.WeakValueDictionary[int, Buffer] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self._kept: list[tuple[int, Buffer]] = []  # with the size asked for
        self._gone = _Gone()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        n_bytes = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
        buffer = self._take(n_bytes)
        array = np.asarray(buffer)[:n_bytes]  # which PyTorch holds as long as anything refers to the memory
        weakref.finalize(array, self._gone.put, n_bytes, buffer).atexit = False
        return torch.from_numpy(array).view(dtype).reshape(shape)

    def abandon(self) -> None:
        """Lets go of what is kept, and of what tensors have now once they are gone: a step may be writing there."""
        with self._lock:
            kept, self._kept = self._kept, []
            gone, self._gone = self._gone, _Gone()
        del kept  # without the lock: buffers are given back
        gone.close()

    def _take(self, n_bytes: int) -> Buffer:
        """A buffer that is kept, or a new one."""
        with self._lock:
            self._kept += self._gone.take()
            found = next((i for i, (size, _) in enumerate(self._kept) if size == n_bytes), None)
            buffer = None if found is None else self._kept.pop(found)[1]
            too_many = self._shrink()
        del too_many
        return self._alloc(n_bytes) if buffer is None else buffer

    def _shrink(self) -> list[tuple[int, Buffer]]:
        """Takes out what is kept beyond the limits. With the lock."""
        first, n_bytes = len(self._kept), 0
        while first > 0 and len(self._kept) - first < self.KEPT_BUFFERS:
            n_bytes += self._kept[first - 1][0]
            if n_bytes > self.KEPT_BYTES:
                break
            first -= 1
        too_many, self._kept = self._kept[:first], self._kept[first:]
        return too_many

    def _alloc(self, n_bytes: int) -> Buffer:
        try:
            buffer = self._group.alloc_buffer(max(n_bytes, 16))
        except (NoMemory, Quota):
            self.abandon()
            buffer = self._group.alloc_buffer(max(n_bytes, 16))
        assert isinstance(buffer, Buffer)
        self._buffers[buffer.address] = buffer
        return buffer

    def mark(self, tensor: torch.Tensor) -> object:
        # While its buffer is kept, nothing else comes to lie there.
        return tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.is_contiguous()

    def place(self, tensor: torch.Tensor, what: str) -> tuple[Buffer | DeviceBuffer, int]:
        address = tensor.data_ptr()
        for base, buffer in list(self._buffers.items()):
            if base <= address < base + buffer.nbytes:
                return buffer, address - base
        raise InvalidArgument(f"{what}: not in memory of the daemon; on the host backend make it by Group.empty")


class CudaMemory(Memory):
    """CUDA backend: any tensor on the group's GPU."""

    def __init__(self, group: epd_group.Group, device: torch.device) -> None:
        self.device = device
        self._group = group
        self._known: weakref.WeakValueDictionary[tuple[int, int], DeviceBuffer] = weakref.WeakValueDictionary()
        self._has_warned = False
        self.on_new_allocation: Callable[[], None] = lambda: None
        """Called before an allocation is registered that was not known: a time to let go of those that are gone."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == self.device and tensor.is_contiguous():
            return torch.empty_like(tensor)
        return self.empty(tuple(tensor.shape), tensor.dtype)

    def mark(self, tensor: torch.Tensor) -> object:
        address = tensor.data_ptr()
        try:
            number = self._group.allocation_id(address)
        except InvalidArgument:
            number = None  # what is wrong with the tensor is said where it is located, with its name
        if number is None:
            return object()
        return address, number, tensor.shape, tensor.dtype, tensor.is_contiguous()

    def place(self, tensor: torch.Tensor, what: str) -> tuple[Buffer | DeviceBuffer, int]:
        address = tensor.data_ptr()
        found = self._group.memory_range(address)
        n_bytes = tensor.numel() * tensor.element_size()
        if found.is_vmm:
            return self._place_vmm(tensor, found, address, n_bytes, what)
        buffer = self._known.get((found.base, found.allocation_id))
        if buffer is None:
            self.on_new_allocation()
            buffer = self._group.register_cuda(found.base, found.nbytes)
            self._known[found.base, found.allocation_id] = buffer
        return buffer, address - found.base

    def _place_vmm(
        self, tensor: torch.Tensor, found: MemoryRange, address: int, n_bytes: int, what: str
    ) -> tuple[DeviceBuffer, int]:
        """A piece of an expandable segment, where the allocator made it shareable and the tensor lies in one piece.

        The allocator may put other memory at an address of such a segment, and the driver has no number that tells; so the
        registration keeps the tensor, its address is not used again, and every step makes plans for new ones.
        """
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"epd: {what} is in an expandable segment, whose tensors are registered one by one: each step makes plans anew "
                "and keeps memory; unset expandable_segments in PYTORCH_CUDA_ALLOC_CONF",
                RuntimeWarning,
                stacklevel=2,
            )
        if address + n_bytes > found.base + found.nbytes:
            raise OutOfRange(
                f"{what}: spans several pieces of an expandable segment; unset expandable_segments in PYTORCH_CUDA_ALLOC_CONF"
            )
        try:
            buffer = self._group.register_cuda(address, n_bytes, tensor)
        except Exception as error:
            raise Unsupported(
                f"{what}: memory of an expandable segment cannot be shared ({error}); unset expandable_segments in "
                "PYTORCH_CUDA_ALLOC_CONF"
            ) from error
        return buffer, 0

    def is_current(self, key: tuple[int, int]) -> bool:
        """Whether the allocation of (base, id) still exists."""
        try:
            return self._group.memory_range(key[0]).allocation_id == key[1]
        except InvalidArgument:
            return False

    def gone(self) -> list[DeviceBuffer]:
        """Registrations whose allocation was given back to the driver."""
        return [buffer for key, buffer in list(self._known.items()) if not self.is_current(key)]


def memory_of(group: epd_group.Group, device: torch.device) -> Memory:
    """The memory of a group for tensors on the device."""
    backend: Any = group.client.info.backend
    return CudaMemory(group, device) if backend == Backend.CUDA else HostMemory(group)
