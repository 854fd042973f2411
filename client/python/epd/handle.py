"""Lifetimes of native objects. Internal.

The native objects are a tree: a client has groups, a group has buffers and plans, and ending one ends what is below it.
A :class:`Handle` is one of them. A call uses the object inside ``with handle as pointer``; :meth:`Handle.end` lets no new
call in, waits for those inside and then ends the object, so that no thread ever has a pointer to what another one freed.
Locks are taken from a child to its parent's counter, never while waiting the other way, so ends cannot wait for each other.

The Python owner of a handle may be collected at any point of any thread, also between a failed call and the reading of its
sentence, or while this thread holds a lock of this module. So a collected owner's handle is only put on a list
(:meth:`Calls.retire`), which is worked off where the thread is in no call.
"""

from __future__ import annotations

import collections
import contextlib
import os
import threading
from collections.abc import Callable

from .errors import Closed, Error


class _Depth(threading.local):
    """How many calls this thread is in."""

    value = 0


class Calls:
    """The calls of one client's objects: how deep each thread is in them, and the handles to end afterwards."""

    def __init__(self) -> None:
        self.depth = _Depth()
        self.retired: collections.deque[Handle] = collections.deque()
        self._pid = os.getpid()

    def enter(self) -> None:
        self.depth.value += 1

    def leave(self) -> None:
        self.depth.value -= 1
        if self.retired and self.depth.value == 0:
            self.end_retired()

    def retire(self, handle: Handle) -> None:
        """Ends a handle whose owner is gone, now or after the call in which this thread is."""
        if os.getpid() != self._pid:
            return  # after fork() the native objects are the parent's
        self.retired.append(handle)
        if self.depth.value == 0:
            self.end_retired()

    def end_retired(self) -> None:
        """Of a thread that is in no call."""
        self.depth.value = 1
        try:
            while self.retired:
                with contextlib.suppress(Error):  # what the daemon refuses to give up ends with its group
                    self.retired.popleft().end()
        except IndexError:  # another thread took the last one
            pass
        finally:
            self.depth.value = 0


class Handle:
    """A native object in use by any number of calls, ended once."""

    def __init__(
        self,
        calls: Calls,
        pointer: int,
        what: str,
        release: Callable[[int], None],
        parent: Handle | None = None,
    ) -> None:
        self.calls = calls
        self.what = what
        self._depth, self._retired = calls.depth, calls.retired
        self._pointer: int | None = pointer
        self._release = release
        self._parent = parent
        self._children: set[Handle] = set()
        self._users = 0
        self._lock = threading.Lock()
        self._state = threading.Condition(self._lock)  # of those who wait for the users
        if parent is not None:
            parent._children.add(self)  # the caller is in a call of the parent, which therefore is not ended meanwhile

    @property
    def ended(self) -> bool:
        """True from the beginning of its end on."""
        return self._pointer is None

    def _use(self) -> int | None:
        with self._lock:
            if self._pointer is not None:
                self._users += 1
            return self._pointer

    def _unuse(self) -> None:
        with self._lock:
            self._users -= 1
            if self._pointer is None:
                self._state.notify_all()

    # Every launch comes through these two: what Calls and _use, _unuse do, without calling them.
    def __enter__(self) -> int:
        self._depth.value += 1
        with self._lock:
            pointer = self._pointer
            if pointer is not None:
                self._users += 1
                return pointer
        self.calls.leave()
        raise Closed(f"{self.what}: used after its end")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._pointer is None:
                self._state.notify_all()
        depth = self._depth
        depth.value -= 1
        if self._retired and depth.value == 0:
            self.calls.end_retired()

    def _close(self) -> int | None:
        """Lets nobody in and waits until all are out. The pointer to end, once; None to everybody else."""
        with self._state:
            pointer, self._pointer = self._pointer, None
            while self._users > 0:
                self._state.wait()
        for child in list(self._children):
            child._close()
        self._children.clear()
        return pointer

    def end(self) -> None:
        """Ends the object and everything below it; does nothing the second time. If that is refused, it stays as it was."""
        self.calls.enter()
        try:
            if self._parent is None:
                self._end()
            elif self._parent._use() is not None:  # the parent cannot go while this one is being ended
                try:
                    self._end()
                finally:
                    self._parent._unuse()
        finally:
            self.calls.leave()

    def _end(self) -> None:
        pointer = self._close()
        if pointer is None:
            return
        try:
            self._release(pointer)
        except Error:
            self._pointer = pointer
            raise
        if self._parent is not None:
            self._parent._children.discard(self)
