"""One exception class per status.

Every error of epd is an :class:`Error`: ``status`` is the :class:`epd.Status`, ``text`` the sentence of the daemon or the
library that says what was given and what is allowed. Where a launched step failed, ``rank`` is the rank to blame, ``phase``
the phase it was in and ``seq`` the number of the launch in its group.

Classes also derive from the builtin a caller would expect: shapes, dtypes and other wrong arguments from ``ValueError``,
:class:`Timeout` from ``TimeoutError``, a lost daemon from ``ConnectionError``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from .status import Status


class Error(Exception):
    """Base of all errors of epd."""

    status: Status = Status.INTERNAL
    of_status: ClassVar[dict[int, type[Error]]] = {}

    def __init_subclass__(cls, status: Status | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if status is not None:
            cls.status = status
            Error.of_status[int(status)] = cls

    def __init__(self, text: str, rank: int | None = None, phase: int | None = None, seq: int | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.rank = rank
        self.phase = phase
        self.seq = seq

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.text, self.rank, self.phase, self.seq)


class InvalidArgument(Error, ValueError, status=Status.INVALID_ARGUMENT):
    """A wrong argument."""


class Closed(InvalidArgument):
    """The object was closed, left, destroyed or released before."""


class InvalidShape(InvalidArgument, status=Status.INVALID_SHAPE):
    """A tensor has the wrong number of dimensions or a wrong one."""


class InvalidDtype(InvalidArgument, status=Status.INVALID_DTYPE):
    """A tensor has the wrong dtype."""


class InvalidDevice(InvalidArgument, status=Status.INVALID_DEVICE):
    """No such device, or a tensor on another device than its rank's."""


class InvalidAlignment(InvalidArgument, status=Status.INVALID_ALIGNMENT):
    """A tensor starts at an unaligned byte, or an alignment is no power of two."""


class OutOfRange(InvalidArgument, status=Status.OUT_OF_RANGE):
    """A range passes the end of its memory."""


class UnknownId(Error, status=Status.UNKNOWN_ID):
    """The daemon does not know the object."""


class ForeignId(Error, status=Status.FOREIGN_ID):
    """The object belongs to another session or group."""


class StaleEpoch(Error, status=Status.STALE_EPOCH):
    """The object is of an older epoch."""


class InUse(Error, status=Status.IN_USE):
    """The object is still used: a buffer by plans, a rank by another process."""


class Busy(Error, status=Status.BUSY):
    """The plan is in flight already."""


class Quota(Error, status=Status.QUOTA):
    """A quota of the session, the user or the device is used up."""


class NoMemory(Error, MemoryError, status=Status.NO_MEMORY):
    """Out of memory."""


class Unsupported(Error, status=Status.UNSUPPORTED):
    """Not supported by this backend or build."""


class GroupMismatch(Error, status=Status.GROUP_MISMATCH):
    """The ranks disagree about the group; the text names the field and both values."""


class PlanMismatch(Error, status=Status.PLAN_MISMATCH):
    """The ranks disagree about the plan."""


class SeqMismatch(Error, status=Status.SEQ_MISMATCH):
    """The ranks launched their plans in different orders."""


class Timeout(Error, TimeoutError, status=Status.TIMEOUT):
    """A deadline passed; the text names who was missing."""


class PeerLost(Error, status=Status.PEER_LOST):
    """A rank of the group is gone; ``rank`` says which, where a step failed of it."""


class Evicted(Error, ConnectionError, status=Status.EVICTED):
    """An operator or a rule of the daemon ended the session."""


class Restarted(Error, ConnectionError, status=Status.RESTARTED):
    """The daemon's worker was restarted: :meth:`epd.Client.reconnect`, then join and allocate again."""


class Draining(Error, ConnectionError, status=Status.DRAINING):
    """The daemon is on its way out and takes nothing new."""


class Disconnected(Error, ConnectionError, status=Status.DISCONNECTED):
    """No daemon, or the connection to it is lost."""


class Protocol(Error, ConnectionError, status=Status.PROTOCOL):
    """One side sent what the protocol does not allow."""


class VersionMismatch(Error, ConnectionError, status=Status.VERSION_MISMATCH):
    """Client and daemon have no protocol version in common."""


class Permission(Error, PermissionError, status=Status.PERMISSION):
    """The daemon does not admit this user."""


class CapacityOverflow(Error, status=Status.CAPACITY_OVERFLOW):
    """More rows were routed to a rank than it has room for; the text has the size needed."""


class BadRouting(Error, ValueError, status=Status.BAD_ROUTING):
    """topk_idx holds an expert that does not exist, or one twice in a token."""


class BadSplits(Error, ValueError, status=Status.BAD_SPLITS):
    """m_splits holds a negative number, or more rows than there are."""


class System(Error, status=Status.SYSTEM):
    """A call to the operating system failed."""


class Cuda(Error, status=Status.CUDA):
    """A CUDA call failed."""


class Nccl(Error, status=Status.NCCL):
    """An NCCL call failed."""


class Internal(Error, status=Status.INTERNAL):
    """An invariant of epd is broken."""


class LibraryNotFound(ImportError):
    """libepd could not be loaded; the text says where it was looked for."""


def error_of(status: int, text: str, rank: int | None = None, phase: int | None = None, seq: int | None = None) -> Error:
    """The exception for a failed call. An unknown number, of a newer library, is an :class:`Internal` that says so."""
    kind = Error.of_status.get(status)
    if kind is None:
        return Internal(f"status {status}: {text}", rank, phase, seq)
    return kind(text, rank, phase, seq)
