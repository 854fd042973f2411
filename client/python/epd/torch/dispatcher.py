"""Dispatch and combine on their own, for experts that are computed by others."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .. import dlpack
from ..plan import Plan
from . import check
from .context import Lease, Pool
from .group import Group
from .memory import epd_dtype
from .staging import Staging
from .stream import first_failure


class _Slot:
    """The plans and received rows of one dispatch whose backward may be outstanding."""

    def __init__(self, group: Group, d_recv_x: torch.Tensor) -> None:
        self.group = group
        self.staging: Staging = group.staging
        self.d_recv_x = d_recv_x  # of the dispatcher: it passes through in the order of the stream
        capacity, n_local, sizes = group.info.capacity_rows, group.n_local_experts, group.sizes
        self.recv_x = group.empty((capacity, sizes.hidden))
        self.y = group.empty((capacity, sizes.hidden))
        self.dy: torch.Tensor | None = None
        self.recv_weights = group.empty((capacity,), torch.float32).zero_()
        self.m_splits = group.empty((n_local,), torch.int64)
        self.offsets = group.empty((n_local + 1,), torch.int64)
        self.d_recv_weights = group.empty((capacity,), torch.float32)
        self.n_tokens = -1
        self.in_use = False
        self.reserved = False
        self._plans: dict[str, Plan] = {}

    def plan(self, name: str) -> Plan:
        """One of dispatch, combine, combine_bwd, the last two also _weighted, and dispatch_bwd. Collective at first."""
        plan = self._plans.get(name)
        if plan is None:
            self.group.activate()
            plan = self._plans[name] = getattr(self, f"_make_{name}")()
            if name != "dispatch":
                plan.set_tokens(self.n_tokens)
        return plan

    def set_tokens(self, n_tokens: int) -> None:
        if n_tokens != self.n_tokens:
            for plan in self._plans.values():
                plan.set_tokens(n_tokens)
            self.n_tokens = n_tokens

    def plans(self) -> list[Plan]:
        return list(self._plans.values())

    def _at(self, **tensors: torch.Tensor) -> dict[str, Any]:
        return {name: self.group.memory.locate(tensor, name) for name, tensor in tensors.items()}

    def _make_dispatch(self) -> Plan:
        staging = self.staging
        made = self.group.plain.dispatch(
            **self._at(
                x=staging.tokens_in,
                topk_idx=staging.topk_idx,
                topk_weights=staging.topk_weights,
                recv_x=self.recv_x,
                m_splits=self.m_splits,
                offsets=self.offsets,
                recv_weights=self.recv_weights,
            )
        )
        if self.n_tokens >= 0:
            made.set_tokens(self.n_tokens)
        return made

    def _make_combine(self) -> Plan:
        return self.group.plain.combine(self.plan("dispatch"), **self._at(y=self.y, out=self.staging.tokens_out))

    def _make_combine_weighted(self) -> Plan:
        tensors = self._at(y=self.y, out=self.staging.tokens_out, topk_weights=self.staging.topk_weights)
        return self.group.plain.combine(self.plan("dispatch"), **tensors)

    def _make_combine_bwd(self) -> Plan:
        tensors = self._at(dout=self.staging.tokens_in, dy=self._dy())
        return self.group.plain.combine_bwd(self.plan("dispatch"), **tensors)

    def _make_combine_bwd_weighted(self) -> Plan:
        tensors = self._at(
            dout=self.staging.tokens_in,
            dy=self._dy(),
            y=self.y,
            topk_weights=self.staging.topk_weights,
            d_weights=self.staging.d_weights,
        )
        return self.group.plain.combine_bwd(self.plan("dispatch"), **tensors)

    def _make_dispatch_bwd(self) -> Plan:
        tensors = self._at(
            d_recv_x=self.d_recv_x,
            dx=self.staging.tokens_out,
            d_recv_weights=self.d_recv_weights,
            d_weights=self.staging.d_weights,
        )
        return self.group.plain.dispatch_bwd(self.plan("dispatch"), **tensors)

    def _dy(self) -> torch.Tensor:
        if self.dy is None:
            self.dy = self.group.empty(self.y.shape)
        return self.dy


@dataclasses.dataclass(eq=False)
class Dispatched:
    """What a rank received. Its tensors lie in memory of the dispatcher, which is used again when nothing refers to it.

    recv_x [C, H]: rows by expert, then source rank, then token; rows past those of the experts hold nothing of use.
    recv_weights [C] f32: topk_weights of the rows. m_splits [L] i64: rows of each expert. offsets [L + 1] i64: first row of
    each expert, a multiple of the group's alignment. Both counts are on the device; :meth:`n_rows` waits for them.
    """

    recv_x: torch.Tensor
    recv_weights: torch.Tensor
    m_splits: torch.Tensor
    offsets: torch.Tensor
    topk_weights: torch.Tensor | None
    _lease: Lease

    def expert_output(self) -> torch.Tensor:
        """[C, H] that combine reads: experts that write there, as ``out=`` of a GroupedLinear, spare it a copy."""
        slot: Any = self._lease.context()
        return slot.y

    def padded_splits(self) -> torch.Tensor:
        """Rows of each expert with the padding behind them, which is zero, where the group's alignment is more than 1."""
        slot: Any = self._lease.context()
        return self.m_splits if slot.group.sizes.alignment == 1 else self.offsets.diff()

    def n_rows(self) -> int:
        """Rows in use, padding between experts included. Waits for the GPU."""
        return int(self.offsets[-1].item())


class Dispatcher:
    """Sends tokens to the ranks of their experts and brings the experts' outputs back, both with autograd::

        received = dispatcher.dispatch(x, topk_idx, topk_weights)
        y = experts(received.recv_x, received.m_splits, offsets=received.offsets)
        out = dispatcher.combine(y, received, weighted=True)

    The weights go one of two ways: into combine (weighted=True, its backward makes their gradient), or with the rows, as
    recv_weights for the experts to multiply by (their gradient comes back through dispatch).
    """

    def __init__(self, group: Group, *, n_contexts: int = 0) -> None:
        self.group = group
        self._d_recv_x: torch.Tensor | None = None
        self._pool: Pool = Pool(self._make_slot)  # type: ignore[arg-type]
        self._pool.fill(n_contexts)

    def dispatch(self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor | None = None) -> Dispatched:
        """x [T, H]; topk_idx [T, K] i32 or i64, -1 = not routed; topk_weights [T, K], None: ones. Collective."""
        sizes = self.group.sizes
        check.tokens(x, "x", sizes.hidden, sizes.max_tokens, sizes.dtype, self.group.device)
        check.routing(topk_idx, topk_weights, x.shape[0], sizes.top_k, self.group.device)
        lease = self._pool.lease()
        slot: Any = lease.context()
        slot.reserved |= self.group.capturing() is not None
        recv_x, recv_weights = _Dispatch.apply(lease, x, topk_idx, topk_weights)
        m_splits, offsets = _leased(slot.m_splits, lease), _leased(slot.offsets, lease)
        return Dispatched(recv_x, recv_weights, m_splits, offsets, topk_weights, lease)

    def combine(
        self, y: torch.Tensor, received: Dispatched, *, weighted: bool = False, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``out[t] = sum over k of (w[t, k]) y(t, k)``; y: [C, H], or its first rows as far as they are in use. Collective."""
        slot: Any = received._lease.context()
        sizes = self.group.sizes
        check.tokens(y, "y", sizes.hidden, len(slot.y), sizes.dtype, self.group.device)
        if out is not None:
            check.buffer(out, "out", (slot.n_tokens, sizes.hidden), sizes.dtype, self.group.device)
        return _Combine.apply(received._lease, y, received.topk_weights if weighted else None, weighted, out)

    def _make_slot(self) -> Any:
        if self._d_recv_x is None:
            self._d_recv_x = self.group.empty((self.group.info.capacity_rows, self.group.sizes.hidden))
        return _Slot(self.group, self._d_recv_x)

    def check(self, wait: bool = True) -> None:
        """Raises the first failure of this dispatcher's steps that was not raised yet; with wait, after all have ended."""
        failure = first_failure(self._pool.plans(), wait)
        if failure is not None:
            raise failure


def _leased(tensor: torch.Tensor, lease: Lease) -> torch.Tensor:
    """The tensor with a storage of its own over the same memory, which holds the lease as long as anything refers to it."""
    device = (1, 0) if tensor.device.type == "cpu" else (dlpack.CUDA, tensor.device.index)
    capsule = dlpack.export(lease, tensor.data_ptr(), device, epd_dtype(tensor.dtype, "tensor"), tuple(tensor.shape))
    return torch.from_dlpack(capsule)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, lease: Lease, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        slot: Any = lease.context()
        group = slot.group
        slot.set_tokens(len(x))
        tokens_in, _, idx, probs, _ = slot.staging.views(len(x))
        group.follow()
        tokens_in.copy_(x)
        idx.copy_(topk_idx)
        probs.fill_(1) if topk_weights is None else probs.copy_(topk_weights)
        group.launch(slot.plan("dispatch"))
        ctx.lease = lease
        ctx.weights_dtype = None if topk_weights is None else topk_weights.dtype
        ctx.set_materialize_grads(False)
        return _leased(slot.recv_x, lease), _leased(slot.recv_weights, lease)

    @staticmethod
    def backward(ctx: Any, d_recv_x: Any, d_recv_weights: Any) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        slot: Any = _context_of(ctx)
        group = slot.group
        _, tokens_out, _, _, d_weights = slot.staging.views(slot.n_tokens)
        group.follow()
        for given, place in ((d_recv_x, slot.d_recv_x), (d_recv_weights, slot.d_recv_weights)):
            if given is None:
                place.zero_()
            elif given.data_ptr() != place.data_ptr():
                place[: len(given)].copy_(given)
        group.launch(slot.plan("dispatch_bwd"))
        dx = torch.empty_like(tokens_out).copy_(tokens_out) if ctx.needs_input_grad[1] else None
        dw = d_weights.to(ctx.weights_dtype, copy=True) if ctx.needs_input_grad[3] and d_recv_weights is not None else None
        ctx.lease = None
        return None, dx, None, dw


def _context_of(ctx: Any) -> Any:
    if ctx.lease is None:
        raise RuntimeError("epd: a second backward through the same dispatch or combine: its context is used up")
    return ctx.lease.context()


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, lease: Lease, y: torch.Tensor, topk_weights: torch.Tensor | None, weighted: bool, out: torch.Tensor | None
    ) -> torch.Tensor:
        slot: Any = lease.context()
        group = slot.group
        _, tokens_out, _, probs, _ = slot.staging.views(slot.n_tokens)
        group.follow()
        if y.data_ptr() != slot.y.data_ptr():
            slot.y[: len(y)].copy_(y)
        if weighted:
            probs.fill_(1) if topk_weights is None else probs.copy_(topk_weights)
        group.launch(slot.plan("combine_weighted" if weighted else "combine"))
        ctx.lease, ctx.weighted, ctx.n_rows = lease, weighted, len(y)
        ctx.save_for_backward(topk_weights)
        result = torch.empty_like(tokens_out) if out is None else out.detach()
        return result.copy_(tokens_out)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        slot: Any = _context_of(ctx)
        group, (topk_weights,) = slot.group, ctx.saved_tensors
        tokens_in, _, _, probs, d_weights = slot.staging.views(slot.n_tokens)
        group.follow()
        tokens_in.copy_(dout)
        if not ctx.weighted:
            group.launch(slot.plan("combine_bwd"))
            dw = None
        else:
            probs.fill_(1) if topk_weights is None else probs.copy_(topk_weights)
            group.launch(slot.plan("combine_bwd_weighted"))
            dw = None
            if ctx.needs_input_grad[2]:
                dw = d_weights.to(topk_weights.dtype, copy=True)
        given = _leased(slot.dy, ctx.lease)[: ctx.n_rows]
        ctx.lease = None
        return None, given, dw, None, None
