"""The connection to the daemon of this node."""

from __future__ import annotations

import ctypes as c
import dataclasses
import json
import os
import sys
import types
import uuid
import weakref
from typing import Any

from . import structs
from .dtype import DTypeLike, dtype_of
from .errors import InvalidArgument, InvalidDevice
from .group import Group
from .handle import Calls, Handle
from .library import check, load, text_of
from .seconds import milliseconds
from .words import Backend, DType, Overflow, word_of


@dataclasses.dataclass(frozen=True)
class Device:
    """A device of the node."""

    uuid: uuid.UUID
    index: int
    name: str
    memory_bytes: int


@dataclasses.dataclass(frozen=True)
class ClientInfo:
    """What the daemon said about itself and this session."""

    daemon_version: str
    protocol: tuple[int, int]
    """Major and minor."""
    backend: Backend
    session_id: int
    boot_id: bytes
    """Changes when the daemon's worker restarts."""
    epoch: int
    devices: tuple[Device, ...]


DeviceLike = Device | uuid.UUID | int


class Client:
    """Made by :func:`epd.connect`. A context manager; closes at the end of the block.

    May be used from any thread, not from a child after ``fork()``. When the daemon is lost, every call on the client's groups,
    buffers and plans raises :class:`epd.Restarted`, :class:`epd.Disconnected` or what the daemon closed the session with;
    :meth:`reconnect` makes the client usable again, but not them: join, allocate and plan again.
    """

    def __init__(self, socket: str | None, name: str | None, timeout: float | None) -> None:
        self._api = load()
        options = structs.sized(
            structs.epd_open_options,
            socket_path=None if socket is None else os.fsencode(socket),
            client_name=_program_name() if name is None else name.encode(),
            timeout_ms=milliseconds(timeout, "connect timeout"),
        )
        opened = c.c_void_p()
        calls = Calls()
        calls.enter()
        try:
            check(self._api, self._api.epd_open(c.byref(options), c.byref(opened)))
            assert opened.value is not None
            self._handle = Handle(calls, opened.value, "client", self._api.epd_close)
        finally:
            calls.leave()
        weakref.finalize(self, calls.retire, self._handle).atexit = False
        self._info = self._read_info()

    @property
    def library_version(self) -> str:
        """The version of libepd."""
        return text_of(self._api.epd_version())

    @property
    def info(self) -> ClientInfo:
        """The daemon, its devices and this session, as of the last connect."""
        return self._info

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices of the node."""
        return self._info.devices

    @property
    def closed(self) -> bool:
        """True after :meth:`close`."""
        return self._handle.ended

    def stats(self) -> dict[str, Any]:
        """The daemon's statistics: its JSON document, parsed."""
        document = c.c_void_p()
        with self._handle as pointer:
            check(self._api, self._api.epd_stats(pointer, c.byref(document)))
            try:
                parsed: dict[str, Any] = json.loads(c.string_at(document))
            finally:
                self._api.epd_free(document)
        return parsed

    def join(
        self,
        name: str,
        world_size: int | None = None,
        rank: int | None = None,
        *,
        n_experts: int,
        top_k: int,
        hidden: int,
        ffn: int = 0,
        max_tokens: int,
        capacity_rows: int = 0,
        alignment: int = 1,
        dtype: DTypeLike = DType.F32,
        overflow: str | Overflow = Overflow.ERROR,
        deadline: float | None = None,
        device: DeviceLike | None = None,
        n_nodes: int = 1,
    ) -> Group:
        """Joins a group. Collective: returns when all ranks have joined under the name.

        world_size, rank: default to ``$WORLD_SIZE`` and ``$RANK``, as torchrun sets them. n_experts: E, divisible by
        world_size; expert e lives on rank e // (E / world_size). top_k: K. hidden: H. ffn: F, 0 if the group runs no moe op.
        max_tokens: largest T of any rank. capacity_rows: C, 0 = as many as could ever arrive. alignment: every expert's first
        received row is a multiple of it, a power of two. dtype: of tokens and weights, f32 (host backend only), bf16 or f16.
        overflow: "error" or "drop" what passes the capacity. deadline: seconds a step waits for its last rank, None = the
        daemon's default. device: a :class:`Device`, its UUID or its place in :attr:`devices`; by default ``$LOCAL_RANK``
        where that is set, else the rank's place on its node, modulo their number. n_nodes: 1 if all ranks use this daemon, else
        how many nodes of its fabric they are on, at most all, with as many ranks on each: rank r is on the group's node
        r // (world_size / n_nodes). Which nodes of the fabric these are the joins say. Groups that are on other nodes at the
        same time need names of their own.

        Raises :class:`epd.GroupMismatch` (names the field and both values), :class:`epd.Timeout` (names the missing ranks),
        :class:`epd.InUse` (the rank is taken, or the name by a group of other nodes), :class:`epd.InvalidArgument` and its kin,
        :class:`epd.Unsupported` (several nodes of a daemon that is in no fabric), :class:`epd.Quota`.
        """
        options = structs.sized(
            structs.epd_group_options,
            name=name.encode(),
            world_size=_count(_from_environment("world_size", world_size), "world_size"),
            rank=_count(_from_environment("rank", rank), "rank"),
            device_uuid=self._device_uuid(device),
            n_experts=_count(n_experts, "n_experts"),
            top_k=_count(top_k, "top_k"),
            hidden=_count(hidden, "hidden"),
            ffn=_count(ffn, "ffn"),
            max_tokens=_count(max_tokens, "max_tokens"),
            capacity_rows=capacity_rows,
            alignment=_count(alignment, "alignment"),
            dtype=dtype_of(dtype, "join"),
            overflow=word_of(Overflow, overflow, "overflow"),
            deadline_ms=milliseconds(deadline, "deadline"),
            n_nodes=_count(n_nodes, "n_nodes"),
        )
        joined = c.c_void_p()
        with self._handle as pointer:
            check(self._api, self._api.epd_group_join(pointer, c.byref(options), c.byref(joined)))
            assert joined.value is not None
            handle = Handle(self._handle.calls, joined.value, f"group {name}", self._api.epd_group_leave, self._handle)
            return Group(self, handle, name)

    def reconnect(self, timeout: float | None = 10.0) -> None:
        """Connects again after the daemon was lost, waiting for it as :func:`epd.connect` does; nothing if it was not."""
        with self._handle as pointer:
            check(self._api, self._api.epd_reconnect(pointer, milliseconds(timeout, "reconnect timeout")))
        self._info = self._read_info()

    def close(self) -> None:
        """Ends the session with its groups, buffers and plans. Harmless the second time. Waits of other threads end."""
        self._handle.end()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    def _read_info(self) -> ClientInfo:
        info = structs.sized(structs.epd_client_info)
        with self._handle as pointer:
            check(self._api, self._api.epd_client_info(pointer, c.byref(info)))
        devices = tuple(
            Device(uuid.UUID(bytes=bytes(device.uuid)), device.device_idx, text_of(device.name), device.memory_bytes)
            for device in info.devices[: info.n_devices]
        )
        return ClientInfo(
            daemon_version=text_of(info.daemon_version),
            protocol=(info.protocol_major, info.protocol_minor),
            backend=Backend(info.backend),
            session_id=info.session_id,
            boot_id=bytes(info.boot_id),
            epoch=info.epoch,
            devices=devices,
        )

    def _device_uuid(self, device: DeviceLike | None) -> bytes | None:
        """The 16 bytes of the device's UUID; None to let the library choose by the rank."""
        devices = self.devices
        if device is None:
            local_rank = os.environ.get("LOCAL_RANK")
            if local_rank is None:
                return None
            device = devices[_number(local_rank, "LOCAL_RANK") % len(devices)]
        if isinstance(device, int):
            if not 0 <= device < len(devices):
                raise InvalidDevice(f"device: {device}, want 0 to {len(devices) - 1}")
            device = devices[device]
        return device.bytes if isinstance(device, uuid.UUID) else device.uuid.bytes


def connect(socket: str | None = None, name: str | None = None, timeout: float | None = 10.0) -> Client:
    """Connects to the daemon of this node.

    socket: its path; by default ``$EPD_SOCKET``, else ``$XDG_RUNTIME_DIR/epd/epd.sock``, but ``/run/epd/epd.sock`` where only
    that is there.
    name: shown by ``epdctl clients``; by default the script's. timeout: seconds to wait for a daemon that is not there yet.

    Raises :class:`epd.Disconnected` (no daemon within the timeout), :class:`epd.VersionMismatch`, :class:`epd.Quota`,
    :class:`epd.Permission`, :class:`epd.Draining`; :class:`epd.LibraryNotFound` without libepd.
    """
    return Client(socket, name, timeout)


def _program_name() -> bytes | None:
    """The script's name, which says more than the interpreter's; None, the library's default, without one."""
    script = os.path.basename(sys.argv[0]) if sys.argv else ""
    return script.encode("ascii", "replace")[:63] if script.isprintable() and script else None


def _number(text: str, what: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InvalidArgument(f"${what}: {text!r}, want a number") from None


def _from_environment(what: str, given: int | None) -> int:
    if given is not None:
        return given
    variable = what.upper()
    if variable not in os.environ:
        raise InvalidArgument(f"join: {what} is not given and ${variable} is not set")
    return _number(os.environ[variable], variable)


def _count(given: int, what: str) -> int:
    """A number that fits its field; ctypes would cut it."""
    if not 0 <= given < 2**32:
        raise InvalidArgument(f"join {what}: {given}, want 0 to {2**32 - 1}")
    return given
