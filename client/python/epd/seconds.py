"""Times as callers give them, in seconds, and as libepd takes them. Internal."""

from __future__ import annotations

import math

from .errors import InvalidArgument

_MAX_MS = 2**32 - 1


def milliseconds(seconds: float | None, what: str) -> int:
    """Whole milliseconds, rounded up; 0, libepd's word for its default or for no limit, only for None."""
    if seconds is None:
        return 0
    if not 0 <= seconds <= _MAX_MS / 1000:
        raise InvalidArgument(f"{what}: {seconds} s, want 0 to {_MAX_MS // 1000}")
    return max(1, math.ceil(seconds * 1000))
