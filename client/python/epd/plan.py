"""Plans: an op, checked once and bound to tensors, launched any number of times."""

from __future__ import annotations

import contextlib
import ctypes as c
import dataclasses
import time
import types
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from . import structs
from .buffer import Location, locate
from .device import DeviceArray
from .errors import Closed, Error, InvalidArgument, Timeout, error_of
from .handle import Handle
from .library import check, text_of
from .seconds import milliseconds
from .status import Status
from .words import Activation, Crossing, GemmLayout, Op, Phase, Role, Saved

if TYPE_CHECKING:
    from .group import Group

Array = npt.NDArray[Any] | DeviceArray | Location
Tensor = Array | Sequence[Array]  # a sequence: one array per local expert

# A wait is cut into turns of this length, so that an interrupt or the end of the plan is seen while a step takes long.
_TURN_MS = 200


@dataclasses.dataclass(frozen=True)
class PlanInfo:
    """What is known about a plan."""

    plan_id: int
    saved_bytes: int
    """Size of the saved context in the daemon."""
    launches: int
    failed_launches: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a plan is made of, checked as far as it can be here."""

    op: Op
    layout: GemmLayout
    activation: Activation
    saved: Saved
    accumulate: bool
    delay_wgrad: bool
    crossing: Crossing
    context: Plan | None
    tensors: Mapping[str, Tensor]


class Plan:
    """An op bound to tensors. Made by :meth:`epd.Group.plan` and the constructors named after the ops.

    A plan keeps its tensors and its context plan. ``plan()`` runs one step: :meth:`launch`, then :meth:`wait`. Collective
    plans must be made and launched in the same order on every rank of the group. It ends with :meth:`destroy` or when the last
    reference goes, which wait for a launch in flight, or with its group, which does not.
    """

    def __init__(self, group: Group, handle: Handle, recipe: Recipe, locations: Sequence[Location]) -> None:
        self._group = group
        self._api = group._api
        self._handle = handle
        self._recipe = recipe
        self._n_failed = 0  # launches whose failure wait has told
        # The arguments stay until the plan is destroyed: its buffers are released after it, its group left after both.
        kept = (group, recipe.context, [location.buffer for location in locations])
        weakref.finalize(self, _retire, handle, kept).atexit = False

    @property
    def op(self) -> Op:
        """What it computes."""
        return self._recipe.op

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The arrays it is bound to, by role: ``plan.tensors["out"]``."""
        return types.MappingProxyType(dict(self._recipe.tensors))

    @property
    def info(self) -> PlanInfo:
        """Counters of the plan and the size of its saved context."""
        with self._handle as pointer:
            return self._info(pointer)

    def set_tokens(self, n_tokens: int) -> None:
        """Tokens of this rank in the following launches, 0 to T; T, the rows of its tensors, when the plan is made."""
        if not 0 <= n_tokens < 2**32:
            raise InvalidArgument(f"set_tokens: {n_tokens}, want 0 to the rows of the plan's tensors")
        with self._handle as pointer:
            check(self._api, self._api.epd_plan_set_tokens(pointer, n_tokens))

    def launch(self, stream: int | None = None) -> None:
        """Launches one step and returns. The arrays belong to the daemon until :meth:`wait` has returned.

        stream, on the CUDA backend: a ``cudaStream_t`` as a number, None for the default stream. Its earlier work is seen by
        the step, its later work waits for the step; launches may follow each other without a wait between them.

        Raises :class:`epd.Busy` if the last launch was not waited for (host backend), :class:`epd.Disconnected`,
        :class:`epd.Restarted` or :class:`epd.Evicted`; then nothing is in flight. How the step went is told by :meth:`wait`
        and :meth:`check`.
        """
        with self._handle as pointer:
            status = self._api.epd_plan_launch(pointer, stream)
            if status != 0:
                check(self._api, status)

    def step(self, stream: int, copies: Any, n_before: int, n_after: int) -> None:
        """:meth:`check`, copies, :meth:`launch`, copies, in one call. CUDA backend.

        copies: an array of ``epd.structs.epd_copy``, those before the launch first.
        """
        with self._handle as pointer:
            status = self._api.epd_plan_step(pointer, stream, copies, n_before, n_after)
            if status != 0:
                raise self._failure(pointer, error_of(status, text_of(self._api.epd_error_text())))

    def capture(self, stream: int) -> None:
        """Records a launch into the CUDA graph that the stream is capturing; nothing runs and nothing is sent.

        Each replay has to be announced by :meth:`arm`, before it or soon after, in the same order on every rank.
        """
        with self._handle as pointer:
            check(self._api, self._api.epd_plan_capture(pointer, stream))

    def arm(self, n_launches: int = 1) -> None:
        """Announces replays of a captured launch, at most 65536. One datagram for all of them."""
        with self._handle as pointer:
            check(self._api, self._api.epd_plan_arm(pointer, n_launches))

    def check(self) -> None:
        """Raises the first failure of the launches that have ended and were not asked for yet; never waits."""
        with self._handle as pointer:
            status = self._api.epd_plan_check(pointer)
            if status != 0:
                raise self._failure(pointer, error_of(status, text_of(self._api.epd_error_text())))

    def wait(self, timeout: float | None = None) -> None:
        """Waits until the launch has ended; its results are in the arrays then. Other threads run meanwhile.

        Raises what the step failed of (:class:`epd.PeerLost`, :class:`epd.Timeout` of the group's deadline,
        :class:`epd.BadRouting`, ... with ``rank``, ``phase`` and ``seq``). With a timeout in seconds also
        :class:`epd.Timeout` when that passes; the step is in flight still, and may be waited for again. The same after a
        KeyboardInterrupt.
        """
        limit = None if timeout is None else time.monotonic() + milliseconds(timeout, "wait timeout") / 1000
        with self._handle as pointer:
            while not self._wait_turn(pointer, limit):
                pass

    def __call__(self, timeout: float | None = None) -> None:
        """One step: :meth:`launch` and :meth:`wait`."""
        self.launch()
        self.wait(timeout)

    def destroy(self) -> None:
        """Waits for a launch in flight and ends the plan; its buffers may be released then. Harmless the second time.

        As the context of another plan it stays alive in the daemon until that one goes.
        """
        self._handle.end()

    def _info(self, pointer: int) -> PlanInfo:
        info = structs.sized(structs.epd_plan_info)
        check(self._api, self._api.epd_plan_info(pointer, c.byref(info)))
        return PlanInfo(info.plan_id, info.saved_bytes, info.launches, info.failed_launches)

    def _wait_turn(self, pointer: int, limit: float | None) -> bool:
        """Waits at most a turn. True if the launch has ended well, raises if it has not, False if it is in flight."""
        left_ms = _TURN_MS if limit is None else max(1, int((limit - time.monotonic()) * 1000))
        status = self._api.epd_plan_wait(pointer, min(left_ms, _TURN_MS))
        if status == Status.OK:
            return True
        error = error_of(status, text_of(self._api.epd_error_text()))
        if status == Status.TIMEOUT and not self._has_failed(pointer):
            if self._handle.ended:
                raise Closed(f"{self._handle.what}: ended by another thread during the wait")
            if limit is None or time.monotonic() < limit:
                return False
            raise Timeout(f"{self._handle.what}: still in flight after the timeout of the wait")
        raise self._failure(pointer, error)

    def _has_failed(self, pointer: int) -> bool:
        """Whether a launch has failed that was not told yet: then the timeout is the step's and not this turn's."""
        try:
            return self._info(pointer).failed_launches > self._n_failed
        except Error:  # the connection is lost, and the next turn says how
            return False

    def _failure(self, pointer: int, error: Error) -> Error:
        """The error with what the daemon reported about the launch, if it is a launch that failed."""
        failure = structs.sized(structs.epd_failure)
        if self._api.epd_plan_failure(pointer, c.byref(failure)) != Status.OK or failure.status != error.status:
            return error
        with contextlib.suppress(Error):  # of a connection that is lost
            self._n_failed = self._info(pointer).failed_launches
        rank = failure.rank if failure.rank >= 0 else None
        return error_of(failure.status, text_of(failure.text), rank, Phase(failure.phase), failure.seq)


def _retire(handle: Handle, kept: tuple[Any, ...]) -> None:
    handle.calls.retire(handle)


def _located(recipe: Recipe) -> list[tuple[Role, int, int, Location]]:
    """Every tensor of the recipe as role, part, number of parts (0, 0: one tensor) and place."""
    found = []
    for name, given in recipe.tensors.items():
        what = f"{recipe.op.name.lower()} {name}"
        try:
            role = Role[name.upper()]
        except KeyError:
            raise InvalidArgument(f"{what}: unknown role") from None
        if isinstance(given, (list, tuple)):
            parts = [(role, i, len(given), locate(part, f"{what}[{i}]")) for i, part in enumerate(given)]
            if not parts:
                raise InvalidArgument(f"{what}: an empty list, want one array per local expert")
            found += parts
        else:
            found.append((role, 0, 0, locate(given, what)))
    return found


def create(group: Group, recipe: Recipe) -> Plan:
    """Makes the plan of a recipe in the daemon."""
    found = _located(recipe)
    tensors = (structs.epd_tensor * len(found))()
    created = c.c_void_p()
    with contextlib.ExitStack() as used:
        group_pointer = used.enter_context(group._handle)
        for tensor, (role, part_idx, n_parts, at) in zip(tensors, found, strict=False):
            tensor.role, tensor.part_idx, tensor.n_parts = role, part_idx, n_parts
            tensor.buffer = used.enter_context(at.buffer._handle)
            tensor.offset_bytes, tensor.dtype, tensor.n_dims = at.offset, at.dtype, len(at.shape)
            tensor.shape[: len(at.shape)] = at.shape
        options = structs.sized(
            structs.epd_plan_options,
            op=recipe.op,
            context=used.enter_context(recipe.context._handle) if recipe.context is not None else None,
            layout=recipe.layout,
            activation=recipe.activation,
            saved=recipe.saved,
            accumulate=recipe.accumulate,
            delay_wgrad=recipe.delay_wgrad,
            crossing=recipe.crossing,
            n_tensors=len(found),
            tensors=tensors,
        )
        api = group._api
        check(api, api.epd_plan_create(group_pointer, c.byref(options), c.byref(created)))
        what = f"plan {recipe.op.name.lower()} of group {group.name}"
        assert created.value is not None
        handle = Handle(group._handle.calls, created.value, what, api.epd_plan_destroy, group._handle)
        return Plan(group, handle, recipe, [at for _, _, _, at in found])
