"""The structs of ``epd.h`` for ctypes; ``tests/python`` compares every field with the header. Internal."""

from __future__ import annotations

import ctypes as c
from typing import Any


class epd_open_options(c.Structure):
    _fields_ = [
        ("size", c.c_size_t),
        ("socket_path", c.c_char_p),
        ("client_name", c.c_char_p),
        ("timeout_ms", c.c_uint32),
    ]


class epd_device(c.Structure):
    _fields_ = [
        ("uuid", c.c_uint8 * 16),
        ("device_idx", c.c_uint32),
        ("name", c.c_char * 64),
        ("memory_bytes", c.c_uint64),
    ]


class epd_client_info(c.Structure):
    _fields_ = [
        ("size", c.c_size_t),
        ("daemon_version", c.c_char * 64),
        ("protocol_major", c.c_uint32),
        ("protocol_minor", c.c_uint32),
        ("backend", c.c_int),
        ("session_id", c.c_uint64),
        ("boot_id", c.c_uint8 * 16),
        ("epoch", c.c_uint64),
        ("n_devices", c.c_uint32),
        ("devices", epd_device * 16),
    ]


class epd_group_options(c.Structure):
    _fields_ = [
        ("size", c.c_size_t),
        ("name", c.c_char_p),
        ("world_size", c.c_uint32),
        ("rank", c.c_uint32),
        ("device_uuid", c.c_char_p),
        ("n_experts", c.c_uint32),
        ("top_k", c.c_uint32),
        ("hidden", c.c_uint32),
        ("ffn", c.c_uint32),
        ("max_tokens", c.c_uint32),
        ("capacity_rows", c.c_int64),
        ("alignment", c.c_uint32),
        ("dtype", c.c_int),
        ("overflow", c.c_int),
        ("deadline_ms", c.c_uint32),
        ("n_nodes", c.c_uint32),
    ]


class epd_group_info(c.Structure):
    _fields_ = [
        ("size", c.c_size_t),
        ("epoch", c.c_uint64),
        ("world_size", c.c_uint32),
        ("rank", c.c_uint32),
        ("n_local_experts", c.c_uint32),
        ("first_expert", c.c_uint32),
        ("capacity_rows", c.c_int64),
        ("device_idx", c.c_uint32),
        ("device_uuid", c.c_uint8 * 16),
    ]


class epd_memory_range(c.Structure):
    _fields_ = [
        ("size", c.c_size_t),
        ("base", c.c_void_p),
        ("bytes", c.c_uint64),
        ("allocation_id", c.c_uint64),
        ("device_uuid", c.c_uint8 * 16),
        ("is_vmm", c.c_int),
    ]


class epd_tensor(c.Structure):
    _fields_ = [
        ("role", c.c_int),
        ("buffer", c.c_void_p),
        ("offset_bytes", c.c_uint64),
        ("dtype", c.c_int),
        ("n_dims", c.c_uint32),
        ("shape", c.c_int64 * 3),
        ("part_idx", c.c_uint32),
        ("n_parts", c.c_uint32),
    ]


class epd_plan_options(c.Structure):
    _fields_ = [
        ("size", c.c_size_t),
        ("op", c.c_int),
        ("context", c.c_void_p),
        ("layout", c.c_int),
        ("activation", c.c_int),
        ("saved", c.c_int),
        ("accumulate", c.c_int),
        ("delay_wgrad", c.c_int),
        ("n_tensors", c.c_uint32),
        ("tensors", c.POINTER(epd_tensor)),
        ("crossing", c.c_int),
    ]


class epd_copy(c.Structure):
    _fields_ = [
        ("to", c.c_void_p),
        ("from", c.c_void_p),
        ("bytes", c.c_uint64),
    ]


class epd_failure(c.Structure):
    _fields_ = [
        ("size", c.c_size_t),
        ("status", c.c_int),
        ("seq", c.c_uint64),
        ("phase", c.c_int),
        ("rank", c.c_int32),
        ("text", c.c_char * 224),
    ]


class epd_plan_info(c.Structure):
    _fields_ = [
        ("size", c.c_size_t),
        ("plan_id", c.c_uint64),
        ("saved_bytes", c.c_uint64),
        ("launches", c.c_uint64),
        ("failed_launches", c.c_uint64),
    ]


def sized(kind: Any, **fields: Any) -> Any:
    """A versioned struct with its size set, the other fields as given or zero."""
    return kind(size=c.sizeof(kind), **fields)
