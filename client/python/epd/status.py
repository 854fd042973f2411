"""The results of epd's calls, by their stable numbers."""

from __future__ import annotations

import enum


class Status(enum.IntEnum):
    """``enum epd_status`` of ``epd.h`` without the prefix."""

    OK = 0
    INVALID_ARGUMENT = 1
    INVALID_SHAPE = 2
    INVALID_DTYPE = 3
    INVALID_DEVICE = 4
    INVALID_ALIGNMENT = 5
    OUT_OF_RANGE = 6
    UNKNOWN_ID = 7
    FOREIGN_ID = 8
    STALE_EPOCH = 9
    IN_USE = 10
    BUSY = 11
    QUOTA = 12
    NO_MEMORY = 13
    UNSUPPORTED = 14
    GROUP_MISMATCH = 15
    PLAN_MISMATCH = 16
    SEQ_MISMATCH = 17
    TIMEOUT = 18
    PEER_LOST = 19
    EVICTED = 20
    RESTARTED = 21
    DRAINING = 22
    DISCONNECTED = 23
    PROTOCOL = 24
    VERSION_MISMATCH = 25
    PERMISSION = 26
    CAPACITY_OVERFLOW = 27
    BAD_ROUTING = 28
    BAD_SPLITS = 29
    SYSTEM = 30
    CUDA = 31
    NCCL = 32
    INTERNAL = 33
