"""Saved contexts of an MoE layer: one forward plan each, with the plans that go back from it.

A moe_forward plan keeps what one backward needs, so every forward whose backward has not run yet needs a plan of its own:
1F1B pipelining has several in flight. Contexts are made when they are first needed and used again afterwards, the one with
the lowest number first: creating and launching plans is collective, so every rank must come to the same choice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable

import torch

from ..plan import Plan
from ..words import Saved
from .group import Group
from .staging import Staging

# Weight-gradient plans that a context keeps: gradients come at a few addresses, in turns.
MAX_WGRAD_PLANS = 8

Tensors = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """The experts of this rank. w1, w2: one tensor [L, ...] each, or L tensors without the leading dimension."""

    w1: Tensors
    w2: Tensors
    b1: torch.Tensor | None = None
    b2: torch.Tensor | None = None

    @functools.cached_property
    def all(self) -> Tensors:
        """w1, w2 and the biases that there are, one after the other."""
        return self.w1 + self.w2 + tuple(bias for bias in (self.b1, self.b2) if bias is not None)

    def addresses(self) -> tuple[int, ...]:
        """Where they lie: plans are bound to that."""
        return tuple([tensor.data_ptr() for tensor in self.all])


@dataclasses.dataclass(eq=False)  # not frozen: one is made in each backward
class Gradients:
    """Where weight gradients go: like :class:`Weights`, empty or None what is not wanted."""

    dw1: Tensors = ()
    dw2: Tensors = ()
    db1: torch.Tensor | None = None
    db2: torch.Tensor | None = None
    accumulate: bool = False

    @functools.cached_property
    def all(self) -> Tensors:
        """dw1, dw2 and the gradients of biases that there are, one after the other."""
        return self.dw1 + self.dw2 + tuple(bias for bias in (self.db1, self.db2) if bias is not None)

    def key(self) -> tuple[object, ...]:
        """Equal for equal places and modes."""
        biases = tuple(None if bias is None else bias.data_ptr() for bias in (self.db1, self.db2))
        return (self.accumulate, *(tuple(t.data_ptr() for t in part) for part in (self.dw1, self.dw2)), *biases)


class Recipe:
    """What the plans of a layer are made of."""

    def __init__(self, group: Group, activation: str, saved: Saved) -> None:
        self.group = group
        self.activation = activation
        self.saved = saved

    def located(self, **tensors: torch.Tensor | Tensors | None) -> dict[str, object]:
        """Tensors as plans take them; a tuple of one is that tensor, of several the parts of one, of none is left out."""
        found: dict[str, object] = {}
        self.group.activate()
        for name, given in tensors.items():
            if isinstance(given, torch.Tensor):
                found[name] = self.group.memory.locate(given, name)
            elif given:
                parts = [self.group.memory.locate(part, f"{name}[{i}]") for i, part in enumerate(given)]
                found[name] = parts[0] if len(parts) == 1 and given[0].dim() == 3 else parts
        return found

    def forward(self, staging: Staging, weights: Weights, saved: Saved) -> Plan:
        """A moe_forward plan from and to the staging. Collective."""
        tensors = self.located(
            x=staging.tokens_in,
            topk_idx=staging.topk_idx,
            topk_weights=staging.topk_weights,
            out=staging.tokens_out,
            w1=weights.w1,
            w2=weights.w2,
            b1=weights.b1,
            b2=weights.b2,
        )
        return self.group.plain.moe_forward(activation=self.activation, saved=saved, **tensors)  # type: ignore[arg-type]

    def backward(self, forward: Plan, staging: Staging, into: Gradients | None, wants_dx: bool) -> Plan:
        """A moe_backward plan; into: where weight gradients go, None to leave them to a moe_wgrad plan. Collective."""
        grads = into or Gradients()
        tensors = self.located(
            dout=staging.tokens_in,
            dx=staging.tokens_out if wants_dx else None,
            d_weights=staging.d_weights,
            dw1=grads.dw1,
            dw2=grads.dw2,
            db1=grads.db1,
            db2=grads.db2,
        )
        return self.group.plain.moe_backward(
            forward,
            accumulate=grads.accumulate,
            delay_wgrad=into is None,
            **tensors,  # type: ignore[arg-type]
        )


class Context:
    """One forward plan and the plans that go back from it. In use from its forward until its last gradient."""

    def __init__(self, recipe: Recipe, weights: Weights) -> None:
        self._recipe = recipe
        self._weights = weights  # kept: the plans are bound to them
        shared = recipe.group.staging
        # With recompute, backward reads the forward's own tokens again, so these are not shared.
        own = recipe.saved == Saved.RECOMPUTE
        self.inputs = Staging(recipe.group.memory, recipe.group.sizes) if own else shared
        self.forward = recipe.forward(self.inputs, weights, recipe.saved)
        self.n_tokens = -1
        self.in_use = False
        self.reserved = False  # by a CUDA graph, for good
        self._backward: dict[object, tuple[Plan, Gradients | None]] = {}  # with what the keys are the addresses of
        self._wgrad: OrderedDict[object, tuple[Plan, dict[str, object]]] = OrderedDict()

    def set_tokens(self, n_tokens: int) -> None:
        """Tokens of the following forward and backward."""
        if n_tokens != self.n_tokens:
            self.forward.set_tokens(n_tokens)
            for plan, _ in self._backward.values():
                plan.set_tokens(n_tokens)
            self.n_tokens = n_tokens

    def backward(self, into: Gradients | None, wants_dx: bool) -> Plan:
        """The backward plan of this kind. Collective when it is first asked for."""
        key = (wants_dx, None if into is None else into.key())
        found = self._backward.get(key)
        if found is None:
            plan = self._recipe.backward(self.forward, self._recipe.group.staging, into, wants_dx)
            plan.set_tokens(self.n_tokens)
            found = self._backward[key] = plan, into
        return found[0]

    def wgrad(self, backward: Plan, into: Gradients) -> Plan:
        """The local plan of the weight gradients that a backward has left. The oldest of too many goes.

        Gradients are fresh tensors, so the places are looked up each time: an address alone may be that of memory which was
        given back to the driver since.
        """
        group = self._recipe.group
        group.activate()
        marks = tuple([group.memory.mark(tensor) for tensor in into.all])
        key = (id(backward), into.accumulate, len(into.dw1), len(into.dw2), into.db1 is None, into.db2 is None, marks)
        found = self._wgrad.get(key)
        if found is None:
            places = self._recipe.located(dw1=into.dw1, dw2=into.dw2, db1=into.db1, db2=into.db2)
            plan = group.plain.moe_wgrad(backward, accumulate=into.accumulate, **places)  # type: ignore[arg-type]
            found = self._wgrad[key] = plan, places
            if len(self._wgrad) > MAX_WGRAD_PLANS and not self.reserved:
                self._wgrad.popitem(last=False)
        self._wgrad.move_to_end(key)
        return found[0]

    def plans(self) -> list[Plan]:
        """All of them."""
        return [self.forward, *(plan for plan, _ in (*self._backward.values(), *self._wgrad.values()))]


class Lease:
    """The use of a context by one forward, until its gradients are there or nobody can ask for them any more."""

    def __init__(self, context: Context, release: Callable[[Context], None]) -> None:
        self._context: Context | None = context
        self._release = release

    def context(self) -> Context:
        """Raises RuntimeError if the backward has run already: it uses up what the forward saved."""
        if self._context is None:
            raise RuntimeError("epd: the saved context of this forward is used up; run the forward again before its backward")
        return self._context

    def end(self) -> None:
        """Gives the context back. Harmless the second time."""
        context, self._context = self._context, None
        if context is not None:
            self._release(context)

    def __del__(self) -> None:
        self.end()


class Pool:
    """The contexts of a layer."""

    def __init__(self, make: Callable[[], Context]) -> None:
        self._make = make
        self._contexts: list[Context] = []

    def lease(self) -> Lease:
        """A context that is free, the one with the lowest number; a new one if there is none (collective)."""
        context = next((c for c in self._contexts if not c.in_use and not c.reserved), None)
        if context is None:
            context = self._make()
            self._contexts.append(context)
        context.in_use = True
        return Lease(context, self._free)

    def fill(self, n: int) -> None:
        """Makes contexts until there are n. Collective."""
        while len(self._contexts) < n:
            self._contexts.append(self._make())

    def plans(self) -> list[Plan]:
        """Those of all contexts."""
        return [plan for context in self._contexts for plan in context.plans()]

    def __len__(self) -> int:
        return len(self._contexts)

    @staticmethod
    def _free(context: Context) -> None:
        context.in_use = False
