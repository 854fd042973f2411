"""One MoE layer: forward and backward through plans, and their place in autograd."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from ..plan import Plan
from ..words import Activation, Saved, word_of
from . import check
from .context import Context, Gradients, Lease, Pool, Recipe, Weights
from .group import Group
from .inference import InferencePlans
from .stream import first_failure


class Layer:
    """Runs the experts of a group: ``out[t] = sum over k of w[t, k] expert(topk_idx[t, k])(x[t])``.

    The part of :class:`epd.torch.MoE` that has no parameters, for those who keep their own::

        layer = Layer(group)
        out = layer(x, topk_idx, topk_weights, Weights((w1,), (w2,)))

    activation: "swiglu", "geglu" or "relu2". saved: "context" keeps received tokens and pre-activations until backward,
    "recompute" only the routing and the tokens. n_contexts: forward passes whose backward may be outstanding; more are made
    when they are needed, but not while a graph is captured. delay_wgrad: backward leaves weight gradients to
    :meth:`backward_dw`.

    Every rank of the group calls its layers in the same order. Weight tensors must stay where they are: when their addresses
    change, the plans are made again, which is collective.
    """

    def __init__(
        self,
        group: Group,
        *,
        activation: str | Activation = Activation.SWIGLU,
        saved: str | Saved = Saved.CONTEXT,
        n_contexts: int = 0,
        delay_wgrad: bool = False,
    ) -> None:
        kind = word_of(Saved, saved, "saved")
        if kind == Saved.NONE:
            raise ValueError("saved: none, want context or recompute; under torch.no_grad nothing is saved")
        self.group = group
        self.delay_wgrad = delay_wgrad
        self._recipe = Recipe(group, word_of(Activation, activation, "activation").name.lower(), kind)
        self._n_contexts = n_contexts
        self._weights: Weights | None = None
        self._addresses: tuple[int, ...] = ()
        self._pool = Pool(self._make_context)
        self._inference = InferencePlans(self._make_inference)
        self._delayed: deque[tuple[Lease, Plan, Weights]] = deque()

    def __call__(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        weights: Weights,
        *,
        out: torch.Tensor | None = None,
        grad_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [..., H] in the group's dtype; topk_idx [T, K] i32 or i64, -1 = not routed; topk_weights [T, K], None: ones.

        out, grad_input: buffers [T, H] for the result and for the gradient of x, contiguous and without grad; the result is
        then the buffer itself. Raises ValueError where they, or the inputs, are not what is wanted, and the subclasses of
        :class:`epd.Error`; those of a step that failed are raised by a later call, as the stream is not waited for.
        """
        tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])  # a view would be a node of autograd's
        self._check(tokens, topk_idx, topk_weights, out, grad_input)
        self.bind(weights)
        parameters = weights.all
        needs_grad = torch.is_grad_enabled() and (
            x.requires_grad
            or (topk_weights is not None and topk_weights.requires_grad)
            or any(parameter.requires_grad for parameter in parameters)
        )
        if not needs_grad:
            result = self.infer(tokens, topk_idx, topk_weights, out)
        else:
            request = Request(self, weights, out, grad_input)
            result = _Moe.apply(request, tokens, topk_idx, topk_weights, *parameters)
        return result if x.dim() == 2 else result.reshape(x.shape)

    def bind(self, weights: Weights) -> None:
        """Makes the layer run with these weights; nothing where it does so already, else collective."""
        addresses = weights.addresses()
        self._weights = weights
        if addresses != self._addresses:
            self._pool, self._inference = Pool(self._make_context), InferencePlans(self._make_inference)
            self._addresses = addresses
            self._pool.fill(self._n_contexts)

    def infer(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        """Forward that saves nothing."""
        stream, graph = self.group.follow()
        plan = self._inference.plan(x.shape[0], graph)
        return self._step_forward(plan, stream, self.group.staging, x, topk_idx, topk_weights, out)

    def forward(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor | None, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, Lease]:
        """Forward that keeps what its backward needs, and the lease of that."""
        lease = self._pool.lease()
        context = lease.context()
        stream, graph = self.group.follow()
        context.reserved |= graph is not None
        context.set_tokens(x.shape[0])
        return self._step_forward(context.forward, stream, context.inputs, x, topk_idx, topk_weights, out), lease

    def backward(
        self,
        lease: Lease,
        dout: torch.Tensor,
        weights: Weights,
        wants_dx: bool,
        grad_input: torch.Tensor | None,
        wants_d_weights: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Gradients | None]:
        """dx, d_weights [T, K] f32 and fresh weight gradients, where these are not added to main_grad or delayed."""
        context = lease.context()
        wanted = wanted_gradients(weights)
        into = None if self.delay_wgrad else main_gradients(weights, wanted)
        if not any(wanted):
            into = Gradients()
        plan = context.backward(into, wants_dx)
        stream, _ = self.group.follow()
        dx, d_weights = self._step_backward(plan, stream, dout, wants_dx, grad_input, wants_d_weights)
        if into is not None:
            lease.end()
            return dx, d_weights, None
        if self.delay_wgrad:
            self._delayed.append((lease, plan, weights))
            return dx, d_weights, None
        return dx, d_weights, self._fresh_gradients(lease, plan, stream, weights, wanted)

    def backward_dw(self) -> None:
        """The weight gradients of the oldest backward that has left them: into main_grad where weights have it, else grad."""
        if not self._delayed:
            raise RuntimeError("epd: backward_dw: no backward has left its weight gradients")
        lease, plan, weights = self._delayed.popleft()
        wanted = wanted_gradients(weights)
        into = main_gradients(weights, wanted)
        stream, _ = self.group.follow()
        if into is not None:
            self.group.launch(lease.context().wgrad(plan, into))
            lease.end()
            return
        grads = self._fresh_gradients(lease, plan, stream, weights, wanted)
        for parameter, gradient in zip(weights.all, spread(grads, weights), strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def check(self, wait: bool = True) -> None:
        """Raises the first failure of this layer's steps that was not raised yet; with wait, after all have ended."""
        failure = first_failure(self._pool.plans() + self._inference.all(), wait)
        if failure is not None:
            raise failure

    @property
    def n_contexts(self) -> int:
        """Saved contexts that exist now."""
        return len(self._pool)

    def _make_context(self) -> Context:
        assert self._weights is not None
        return Context(self._recipe, self._weights)

    def _make_inference(self) -> Plan:
        assert self._weights is not None
        return self._recipe.forward(self.group.staging, self._weights, Saved.NONE)

    def _step_forward(
        self,
        plan: Plan,
        stream: int | None,
        staging: Any,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        """One step on the stream, which follows the group's last. None: on the current one, maybe captured; PyTorch copies."""
        n_tokens = x.shape[0]
        # An alias, for autograd makes its result a part of the graph, and the caller's buffer must not become one.
        result = _empty_like(x) if out is None else out.detach()
        if stream is None or topk_weights is None:
            return self._copy_and_launch(plan, staging.views(n_tokens), x, topk_idx, topk_weights, result)
        tokens, idx, probs = _plain(x, x.dtype), _plain(topk_idx, torch.int64), _plain(topk_weights, torch.float32)
        copies = staging.forward_copies.array(n_tokens, tokens.data_ptr(), idx.data_ptr(), probs.data_ptr(), result.data_ptr())
        plan.step(stream, copies, 3, 1)
        return result if out is None else _written(result)

    def _copy_and_launch(
        self,
        plan: Plan,
        views: tuple[torch.Tensor, ...],
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        result: torch.Tensor,
    ) -> torch.Tensor:
        tokens_in, tokens_out, idx, probs, _ = views
        if x.data_ptr() != tokens_in.data_ptr():
            tokens_in.copy_(x)
        idx.copy_(topk_idx)
        probs.fill_(1) if topk_weights is None else probs.copy_(topk_weights)
        self.group.launch(plan)
        return result.copy_(tokens_out)

    def _step_backward(
        self,
        plan: Plan,
        stream: int | None,
        dout: torch.Tensor,
        wants_dx: bool,
        grad_input: torch.Tensor | None,
        wants_d_weights: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """dx and d_weights of one step; stream as in _step_forward."""
        staging, n_tokens = self.group.staging, dout.shape[0]
        d_weights = dx = None
        if wants_d_weights:
            d_weights = torch.empty((n_tokens, self.group.sizes.top_k), dtype=torch.float32, device=dout.device)
        if wants_dx:
            dx = _empty_like(dout) if grad_input is None else grad_input.detach()
        if stream is None:
            tokens_in, tokens_out, _, _, staged_weights = staging.views(n_tokens)
            tokens_in.copy_(dout)
            self.group.launch(plan)
            return (
                None if dx is None else dx.copy_(tokens_out),
                None if d_weights is None else d_weights.copy_(staged_weights),
            )
        given = _plain(dout, self.group.sizes.dtype)
        copies = staging.backward_copies.array(
            n_tokens,
            given.data_ptr(),
            0 if d_weights is None else d_weights.data_ptr(),
            0 if dx is None else dx.data_ptr(),
        )
        plan.step(stream, copies, 1, 2)
        return dx if dx is None or grad_input is None else _written(dx), d_weights

    def _fresh_gradients(
        self, lease: Lease, plan: Plan, stream: int | None, weights: Weights, wanted: tuple[bool, ...]
    ) -> Gradients:
        """The weight gradients of a backward; stream as in _step_forward."""
        like, (w1, w2, b1, b2) = self.group.memory.empty_like, wanted
        into = Gradients(
            dw1=tuple(like(t) for t in weights.w1) if w1 else (),
            dw2=tuple(like(t) for t in weights.w2) if w2 else (),
            db1=like(weights.b1) if b1 and weights.b1 is not None else None,
            db2=like(weights.b2) if b2 and weights.b2 is not None else None,
        )
        wgrad = lease.context().wgrad(plan, into)
        if stream is None:
            self.group.launch(wgrad)
        else:
            wgrad.step(stream, None, 0, 0)
        lease.end()
        return into

    def _check(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        out: torch.Tensor | None,
        grad_input: torch.Tensor | None,
    ) -> None:
        sizes, device = self.group.sizes, self.group.device
        check.tokens(x, "x", sizes.hidden, sizes.max_tokens, sizes.dtype, device)
        check.routing(topk_idx, topk_weights, x.shape[0], sizes.top_k, device)
        shape = (x.shape[0], sizes.hidden)
        if out is not None:
            check.buffer(out, "out", shape, sizes.dtype, device)
        if grad_input is not None:
            check.buffer(grad_input, "grad_input", shape, sizes.dtype, device)


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """Uninitialised, contiguous, of the shape, dtype and device of another."""
    if tensor.is_contiguous():
        return torch.empty_like(tensor)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _plain(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor so that its bytes can be copied as they are: itself, or a converted copy."""
    if tensor.dtype is dtype and tensor.is_contiguous():
        return tensor
    return tensor.to(dtype).contiguous()


def _written(tensor: torch.Tensor) -> torch.Tensor:
    """Tells autograd that a tensor of the caller was written."""
    torch.autograd.graph.increment_version(tensor)
    return tensor


def wanted_gradients(weights: Weights) -> tuple[bool, bool, bool, bool]:
    """Whether w1, w2, b1 and b2 are trained. The parts of one weight are trained together."""
    return (
        weights.w1[0].requires_grad,
        weights.w2[0].requires_grad,
        weights.b1 is not None and weights.b1.requires_grad,
        weights.b2 is not None and weights.b2.requires_grad,
    )


def main_gradients(weights: Weights, wanted: tuple[bool, ...]) -> Gradients | None:
    """The main_grad tensors of the weights that are trained, to be added to; None if they have none."""

    def of(tensor: torch.Tensor | None, wanted_here: bool) -> torch.Tensor | None:
        return getattr(tensor, "main_grad", None) if wanted_here else None

    firsts = weights.w1[0], weights.w2[0], weights.b1, weights.b2
    have = [hasattr(tensor, "main_grad") for tensor, on in zip(firsts, wanted, strict=True) if on]
    if True not in have:
        return None
    if not all(have):
        raise ValueError("main_grad: some of the layer's trained weights have it and some have not, want all or none")
    return Gradients(
        dw1=tuple(t.main_grad for t in weights.w1) if wanted[0] else (),
        dw2=tuple(t.main_grad for t in weights.w2) if wanted[1] else (),
        db1=of(weights.b1, wanted[2]),
        db2=of(weights.b2, wanted[3]),
        accumulate=True,
    )


def spread(grads: Gradients | None, weights: Weights) -> list[torch.Tensor | None]:
    """Gradients in the order of ``weights.all``."""
    if grads is None:
        return [None] * len(weights.all)
    found: list[torch.Tensor | None] = list(grads.dw1 or [None] * len(weights.w1))
    found += list(grads.dw2 or [None] * len(weights.w2))
    found += [grads.db1] if weights.b1 is not None else []
    return found + ([grads.db2] if weights.b2 is not None else [])


class Request:
    """What one call of a layer carries besides tensors that autograd knows."""

    def __init__(
        self, layer: Layer, weights: Weights, out: torch.Tensor | None = None, grad_input: torch.Tensor | None = None
    ) -> None:
        self.layer = layer
        self.weights = weights
        self.out = out
        self.grad_input = grad_input


class _Moe(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        request: Request,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        out, ctx.lease = request.layer.forward(x, topk_idx, topk_weights, request.out)
        ctx.request = request
        ctx.weights_dtype = None if topk_weights is None else topk_weights.dtype
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        request, needs = ctx.request, ctx.needs_input_grad
        dx, d_weights, grads = request.layer.backward(ctx.lease, dout, request.weights, needs[1], request.grad_input, needs[3])
        if d_weights is not None and d_weights.dtype is not ctx.weights_dtype:
            d_weights = d_weights.to(ctx.weights_dtype)
        return (None, dx, None, d_weights, *spread(grads, request.weights))
