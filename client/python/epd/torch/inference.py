"""The plans of an MoE layer's forwards that save nothing. Internal.

One does for all eager steps. What a CUDA graph has captured is the graph's alone: its replays are announced with the plan's
number of tokens, which eager steps change.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..plan import Plan

if TYPE_CHECKING:
    from .graph import CUDAGraph


class InferencePlans:
    """Those of one layer with one set of weights."""

    def __init__(self, make: Callable[[], Plan]) -> None:
        self._make = make
        self._eager: Plan | None = None
        self._n_tokens = -1  # of the eager one
        self._captured: weakref.WeakKeyDictionary[CUDAGraph, dict[int, Plan]] = weakref.WeakKeyDictionary()

    def plan(self, n_tokens: int, graph: CUDAGraph | None) -> Plan:
        """The plan for the next step, eager or captured in the graph. Collective where there is none yet."""
        if graph is not None:
            own = self._captured.setdefault(graph, {})
            if n_tokens not in own:
                own[n_tokens], self._eager = self._sized(n_tokens), None
            return own[n_tokens]
        if n_tokens != self._n_tokens or self._eager is None:
            self._eager = self._sized(n_tokens)
        return self._eager

    def all(self) -> list[Plan]:
        """Those that there are."""
        captured = [plan for own in self._captured.values() for plan in own.values()]
        return captured if self._eager is None else [self._eager, *captured]

    def _sized(self, n_tokens: int) -> Plan:
        """The eager plan, or a new one, set to this number of tokens."""
        plan = self._make() if self._eager is None else self._eager
        plan.set_tokens(n_tokens)
        self._n_tokens = n_tokens
        return plan
