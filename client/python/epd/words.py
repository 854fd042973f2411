"""The words of epd's protocol: statuses, dtypes, ops, roles.

They are those of ``epd.h`` without their prefixes (``EPD_ROLE_RECV_X`` is ``Role.RECV_X``); ``tests/python`` compares every
name and number with the header. Wherever the package takes a word it takes the member or its lower-case name: ``"bf16"``,
``"moe_forward"``.
"""

from __future__ import annotations

import enum
from typing import TypeVar

from .errors import InvalidArgument
from .status import Status

__all__ = ["Activation", "Backend", "Crossing", "DType", "GemmLayout", "Op", "Overflow", "Phase", "Role", "Saved", "Status"]


class DType(enum.IntEnum):
    """Element types of tensors."""

    UNSPECIFIED = 0
    F32 = 1
    BF16 = 2
    F16 = 3
    I32 = 4
    I64 = 5


class Op(enum.IntEnum):
    """What a plan computes."""

    UNSPECIFIED = 0
    BARRIER = 1
    DISPATCH = 2
    COMBINE = 3
    DISPATCH_BWD = 4
    COMBINE_BWD = 5
    GROUPED_GEMM = 6
    ACTIVATION = 7
    ACTIVATION_BWD = 8
    MOE_FORWARD = 9
    MOE_BACKWARD = 10
    MOE_WGRAD = 11


class Role(enum.IntEnum):
    """What a tensor is to a plan; shapes are in the docstrings of the plan constructors of :class:`epd.Group`."""

    UNSPECIFIED = 0
    X = 1
    TOPK_IDX = 2
    TOPK_WEIGHTS = 3
    RECV_X = 4
    RECV_WEIGHTS = 5
    M_SPLITS = 6
    OFFSETS = 7
    Y = 8
    OUT = 9
    DOUT = 10
    DY = 11
    D_WEIGHTS = 12
    D_RECV_X = 13
    D_RECV_WEIGHTS = 14
    DX = 15
    A = 16
    B = 17
    C = 18
    BIAS = 19
    DBIAS = 20
    PREACT = 21
    ACT = 22
    D_ACT = 23
    D_PREACT = 24
    W1 = 25
    B1 = 26
    W2 = 27
    B2 = 28
    DW1 = 29
    DB1 = 30
    DW2 = 31
    DB2 = 32


class GemmLayout(enum.IntEnum):
    """TN: fprop ``Y = X Wt``; NN: dgrad ``dX = dY W``; NT: wgrad ``dW (+)= dYt X``."""

    UNSPECIFIED = 0
    TN = 1
    NN = 2
    NT = 3


class Activation(enum.IntEnum):
    """Gated activations on ``[m, 2F]``: the first half of a row is the gate ``g``, the second ``u``."""

    UNSPECIFIED = 0
    SWIGLU = 1
    GEGLU = 2
    RELU2 = 3


class Overflow(enum.IntEnum):
    """What happens to rows past a rank's capacity."""

    UNSPECIFIED = 0
    ERROR = 1
    DROP = 2


class Saved(enum.IntEnum):
    """What a moe_forward plan keeps for its backward."""

    NONE = 0
    CONTEXT = 1
    RECOMPUTE = 2


class Crossing(enum.IntEnum):
    """How the messages of a plan are sized that cross between nodes."""

    UNSPECIFIED = 0
    EAGER = 1
    """As long as their tokens: hosts learn how many there are."""
    STATIC = 2
    """Always as long as the tokens of its plan need: no host learns a count."""


class Backend(enum.IntEnum):
    """Where the daemon computes."""

    UNSPECIFIED = 0
    HOST = 1
    CUDA = 2


class Phase(enum.IntEnum):
    """The phase of a step in which it failed."""

    NONE = 0
    GATHER = 1
    ROUTE = 2
    DISPATCH = 3
    GEMM = 4
    ACTIVATION = 5
    COMBINE = 6
    WGRAD = 7


Word = TypeVar("Word", bound=enum.IntEnum)


def word_of(kind: type[Word], given: str | int | Word, what: str) -> Word:
    """The member that a caller named. Raises :class:`epd.InvalidArgument` with what is allowed."""
    try:
        return kind[given.upper()] if isinstance(given, str) else kind(given)
    except (KeyError, ValueError):
        allowed = ", ".join(member.name.lower() for member in kind if member.name != "UNSPECIFIED")
        raise InvalidArgument(f"{what}: {given!r}, want one of {allowed}") from None
