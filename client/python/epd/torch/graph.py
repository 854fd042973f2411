"""CUDA graphs with epd's launches in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..plan import Plan
from . import stream

if TYPE_CHECKING:
    from .group import Group

_Base: Any = torch.cuda.CUDAGraph if torch.cuda.is_available() else object


class CUDAGraph(_Base):
    """A ``torch.cuda.CUDAGraph`` whose replays the daemon knows of::

        graph = epd.torch.CUDAGraph()
        with torch.cuda.graph(graph):
            out = moe(x, topk_idx, topk_weights)
        graph.replay()

    A captured launch is two flag operations on the stream; ``replay`` announces it to the daemon and then replays.
    :meth:`arm` announces many replays ahead, which then cost the host nothing but their own launch. Saved contexts that were
    used in a capture belong to the graph from then on. The routing may differ between replays, the number of tokens of a
    rank may not. Run a step before the capture: plans are made when they are first needed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if _Base is object:
            raise RuntimeError("epd.torch.CUDAGraph: this PyTorch has no CUDA device")
        super().__init__()
        self._plans: list[Plan] = []
        self._armed = 0
        self.last_streams: dict[Group, torch.cuda.Stream] = {}
        """The last stream of each group in the capture. Internal."""

    def __new__(cls, *args: Any, **kwargs: Any) -> CUDAGraph:
        made: CUDAGraph = super().__new__(cls, *args, **kwargs)
        return made

    def add(self, plan: Plan) -> None:
        """A launch was captured. Internal."""
        self._plans.append(plan)

    @property
    def plans(self) -> list[Plan]:
        """The plans whose launches are in the graph, in their order."""
        return list(self._plans)

    def capture_begin(self, *args: Any, **kwargs: Any) -> None:
        """As in the base class."""
        self._plans.clear()
        self.last_streams.clear()
        super().capture_begin(*args, **kwargs)
        stream.begin_capture(self)

    def capture_end(self) -> None:
        """As in the base class."""
        stream.end_capture(self)
        super().capture_end()

    def arm(self, n_replays: int) -> None:
        """Announces replays ahead of them. They must all follow, before any other step of their groups."""
        if len(self._plans) == 1:
            self._plans[0].arm(n_replays)
        else:
            for _ in range(n_replays):  # steps come in the order of the launches
                for plan in self._plans:
                    plan.arm(1)
        self._armed += n_replays

    def replay(self) -> None:
        """As in the base class; announced first, unless :meth:`arm` did."""
        for plan in self._plans:
            plan.check()
        for group in self.last_streams:
            group.follow()
        if self._armed == 0:
            self.arm(1)
        self._armed -= 1
        super().replay()
