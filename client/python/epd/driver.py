"""What the package itself asks the NVIDIA driver: which GPU is which. Internal."""

from __future__ import annotations

import ctypes as c
import functools
import uuid

from .errors import Cuda, InvalidDevice, Unsupported


@functools.cache
def _driver() -> c.CDLL:
    try:
        return c.CDLL("libcuda.so.1")
    except OSError as error:
        raise Unsupported(f"no NVIDIA driver: {error}") from None


def _check(result: int, what: str) -> None:
    if result != 0:
        raise Cuda(f"{what}: CUDA error {result}")


def uuid_of(ordinal: int) -> uuid.UUID:
    """The UUID of the GPU that this process sees under the number."""
    driver, handle, found = _driver(), c.c_int(), (c.c_uint8 * 16)()
    _check(driver.cuInit(0), "cuInit")
    _check(driver.cuDeviceGet(c.byref(handle), ordinal), f"GPU {ordinal}")
    _check(driver.cuDeviceGetUuid_v2(c.byref(found), handle), "cuDeviceGetUuid")
    return uuid.UUID(bytes=bytes(found))


def ordinal_of(device: uuid.UUID) -> int:
    """The number under which this process sees the GPU. Raises :class:`epd.InvalidDevice` if it does not see it."""
    driver, count = _driver(), c.c_int()
    _check(driver.cuInit(0), "cuInit")
    _check(driver.cuDeviceGetCount(c.byref(count)), "cuDeviceGetCount")
    seen = [uuid_of(ordinal) for ordinal in range(count.value)]
    if device not in seen:
        raise InvalidDevice(f"GPU {device} of the group is not visible to this process, which sees {[str(u) for u in seen]}")
    return seen.index(device)
