"""This process's rank in an expert-parallel group, with what the layers of the group share."""

from __future__ import annotations

import os
import threading
import types
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from .. import client as epd_client
from ..driver import uuid_of
from ..errors import InvalidDevice
from ..group import Group as PlainGroup
from ..group import GroupInfo
from ..plan import Plan
from ..words import Backend, Overflow
from .memory import epd_dtype, memory_of
from .staging import Sizes, Staging
from .stream import Launcher, capturing_graph, raw_stream

if TYPE_CHECKING:
    from .graph import CUDAGraph
    from .local import LocalPlans


class Group:
    """Made by :func:`epd.torch.join`. A context manager; leaves at the end of the block.

    Layers of one group share its staging tensors and run one after the other. Launches follow the current stream; a stream
    other than that of the group's last launch waits for that one first.
    """

    def __init__(self, plain: PlainGroup, sizes: Sizes, device: torch.device, owned: epd_client.Client | None) -> None:
        self.plain = plain
        self.sizes = sizes
        self.device = device
        self._is_cuda = device.type == "cuda"
        self.memory = memory_of(plain, device)
        self._owned = owned
        self._launcher = Launcher(device, self.memory.abandon)
        self._staging: Staging | None = None
        self._barrier: Plan | None = None
        self._thread = threading.local()
        self._local: LocalPlans | None = None
        self._device_index = device.index
        self._last_streams: dict[Group, torch.cuda.Stream] = {}  # this group's alone, as a graph has those of several
        self._last_raw: int | None = None  # the same as a number

    @property
    def info(self) -> GroupInfo:
        """What the daemon decided about the group."""
        return self.plain.info

    @property
    def n_local_experts(self) -> int:
        """L: experts of this rank."""
        return self.plain.info.n_local_experts

    @property
    def staging(self) -> Staging:
        """What the layers share; made at first use."""
        if self._staging is None:
            self._staging = Staging(self.memory, self.sizes)
        return self._staging

    @property
    def local(self) -> LocalPlans:
        """Plans of local ops; made at first use."""
        if self._local is None:
            from .local import LocalPlans

            self._local = LocalPlans(self)
        return self._local

    def capturing(self) -> CUDAGraph | None:
        """The graph that the current stream is capturing."""
        return capturing_graph() if self._is_cuda else None

    def empty(self, shape: Iterable[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        """An uninitialised tensor on the group's device, on the host backend in memory of the daemon."""
        return self.memory.empty(tuple(shape), self.sizes.dtype if dtype is None else dtype)

    def launch(self, plan: Plan) -> None:
        """One step of a plan, in the order of the current stream. Raises how an earlier step of it has failed."""
        self._launcher(plan)

    def follow(self) -> tuple[int | None, CUDAGraph | None]:
        """Lets the current stream wait for the group's last stream, where that is another one: staging is shared.

        While a graph is captured the order of its own streams counts, and its replays come here. Returns the stream as a
        number, None while a graph is captured and on the host backend, and that graph.
        """
        if not self._is_cuda:
            return None, None
        graph, raw = capturing_graph(), raw_stream(self._device_index)
        if graph is not None:
            self._follow(graph.last_streams, raw)
            return None, graph
        if raw != self._last_raw:
            self._follow(self._last_streams, raw)
            self._last_raw = raw
        return raw, None

    def _follow(self, streams: dict[Group, torch.cuda.Stream], raw: int) -> None:
        last = streams.get(self)
        if last is None or last.cuda_stream != raw:
            streams[self] = torch.cuda.current_stream(self.device)
            if last is not None:
                streams[self].wait_stream(last)

    def activate(self) -> None:
        """Makes the GPU's context current on this thread, which may be one of autograd's: addresses are looked up in it."""
        if self._is_cuda and not hasattr(self._thread, "is_active"):
            torch.cuda.mem_get_info(self.device)
            self._thread.is_active = True

    def barrier(self) -> None:
        """Every rank has arrived. Waits on the host."""
        if self._barrier is None:
            self._barrier = self.plain.barrier()
        self._launcher(self._barrier)
        self._barrier.wait()

    def leave(self) -> None:
        """Leaves; ends the client too if :func:`join` made it. Harmless the second time."""
        self.plain.leave()
        self.memory.abandon()
        if self._owned is not None:
            self._owned.close()

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.leave()


def join(
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
    dtype: torch.dtype = torch.bfloat16,
    overflow: str | Overflow = Overflow.ERROR,
    deadline: float | None = None,
    device: torch.device | str | int | None = None,
    n_nodes: int = 1,
    client: epd_client.Client | None = None,
    socket: str | None = None,
) -> Group:
    """Joins a group as :meth:`epd.Client.join` does, for tensors of PyTorch. Collective.

    device: the GPU of this rank, by default ``cuda:$LOCAL_RANK`` where that is set, else the current one; the CPU on the host
    backend. client: a connection to share between groups; by default one of the group's own, to socket, ``$EPD_SOCKET`` or
    the runtime directory. The other arguments and the errors are those of :meth:`epd.Client.join`.
    """
    own = epd_client.connect(socket) if client is None else None
    used = client or own
    assert used is not None
    try:
        chosen = _device(device, used)
        uuid = None if chosen.type == "cpu" else uuid_of(chosen.index)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
            torch.cuda.current_stream(chosen).synchronize()  # makes the context that libepd uses
        plain = used.join(
            name,
            world_size,
            rank,
            n_experts=n_experts,
            top_k=top_k,
            hidden=hidden,
            ffn=ffn,
            max_tokens=max_tokens,
            capacity_rows=capacity_rows,
            alignment=alignment,
            dtype=epd_dtype(dtype, "join"),
            overflow=overflow,
            deadline=deadline,
            device=uuid,
            n_nodes=n_nodes,
        )
    except BaseException:
        if own is not None:
            own.close()
        raise
    return Group(plain, Sizes(n_experts, top_k, hidden, ffn, max_tokens, dtype, alignment), chosen, own)


def _device(given: torch.device | str | int | None, client: epd_client.Client) -> torch.device:
    if client.info.backend != Backend.CUDA:
        if given is not None and torch.device(given).type != "cpu":
            raise InvalidDevice(f"device: {given}, the daemon's host backend has the CPU")
        return torch.device("cpu")
    if given is None:
        local_rank = os.environ.get("LOCAL_RANK")
        return torch.device("cuda", torch.cuda.current_device() if local_rank is None else int(local_rank))
    found = torch.device("cuda", given) if isinstance(given, int) else torch.device(given)
    if found.type != "cuda":
        raise InvalidDevice(f"device: {given}, the daemon's CUDA backend has GPUs")
    return torch.device("cuda", torch.cuda.current_device()) if found.index is None else found
