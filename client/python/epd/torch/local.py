"""Plans of local ops, by the tensors they are bound to. Internal.

A local plan is made without the other ranks, in one round trip, so layers without staging bind plans to the tensors of the
caller. PyTorch's allocator gives a training loop the same addresses again and again: after a step or two all plans are found.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from ..buffer import Location
from ..plan import Plan
from ..words import Op
from .group import Group
from .memory import CudaMemory

MAX_PLANS = 128  # of one group; the one that was not used for longest goes

Operand = torch.Tensor | tuple[torch.Tensor, ...] | None


class LocalPlans:
    """The local plans of a group."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._plans: OrderedDict[object, tuple[Plan, tuple[Location, ...]]] = OrderedDict()
        if isinstance(group.memory, CudaMemory):
            group.memory.on_new_allocation = self._drop_stale

    def launch(self, op: Op, options: dict[str, Any], **operands: Operand) -> None:
        """One step of the op on the operands, in the order of the current stream."""
        plan = self._find(op, options, operands)
        self._group.launch(plan)
        if self._group.capturing() is None:
            while len(self._plans) > MAX_PLANS:
                self._plans.popitem(last=False)

    def _find(self, op: Op, options: dict[str, Any], operands: dict[str, Operand]) -> Plan:
        self._group.activate()
        mark = self._group.memory.mark
        marks = [
            (name, mark(given) if isinstance(given, torch.Tensor) else tuple([mark(part) for part in given]))
            for name, given in operands.items()
            if given is not None
        ]
        key = (op, tuple(options.items()), tuple(marks))
        found = self._plans.get(key)
        if found is None:
            tensors = self._located(operands)
            plan = self._group.plain.plan(op, **options, **tensors)
            places = tuple(at for given in tensors.values() for at in (given if isinstance(given, list) else [given]))
            # The places keep the registrations, so that the identities in the key stay theirs.
            found = self._plans[key] = plan, places
        self._plans.move_to_end(key)
        return found[0]

    def _located(self, operands: dict[str, Operand]) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for name, given in operands.items():
            if isinstance(given, torch.Tensor):
                tensors[name] = self._group.memory.locate(given, name)
            elif given is not None:
                tensors[name] = [self._group.memory.locate(part, f"{name}[{i}]") for i, part in enumerate(given)]
        return tensors

    def _drop_stale(self) -> None:
        """Lets go of plans whose memory was given back to the driver: until then the daemon keeps it alive."""
        assert isinstance(self._group.memory, CudaMemory)
        gone = {id(buffer) for buffer in self._group.memory.gone()}
        if gone:
            stale = [key for key, (_, places) in self._plans.items() if any(id(at.buffer) in gone for at in places)]
            for key in stale:
                del self._plans[key]
