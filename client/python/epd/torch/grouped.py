"""Grouped linear layers: one matrix product per group of rows, the groups' sizes read on the device."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..words import Activation, GemmLayout, Op, word_of
from . import check
from .group import Group

Splits = torch.Tensor | Sequence[int]


def splits_of(m_splits: Splits, n_groups: int, n_rows: int, group: Group) -> torch.Tensor:
    """m_splits as a tensor on the device. A list is checked here, and costs a copy that the host waits for."""
    device = group.device
    if isinstance(m_splits, torch.Tensor):
        if m_splits.dtype != torch.int64 or tuple(m_splits.shape) != (n_groups,) or m_splits.device != device:
            raise ValueError(
                f"m_splits: {m_splits.dtype} {tuple(m_splits.shape)} on {m_splits.device}, want torch.int64 ({n_groups},) "
                f"on {device}"
            )
        return m_splits.contiguous()
    if len(m_splits) != n_groups or min(m_splits, default=0) < 0 or sum(m_splits) > n_rows:
        raise ValueError(f"m_splits: {list(m_splits)}, want {n_groups} numbers of 0 or more, at most {n_rows} rows in all")
    return group.empty((n_groups,), torch.int64).copy_(torch.tensor(list(m_splits)))


def check_offsets(offsets: torch.Tensor, n_groups: int, device: torch.device) -> None:
    """Checks the first rows of groups."""
    if offsets.dtype != torch.int64 or tuple(offsets.shape) != (n_groups + 1,) or offsets.device != device:
        raise ValueError(
            f"offsets: {offsets.dtype} {tuple(offsets.shape)} on {offsets.device}, want torch.int64 ({n_groups + 1},) "
            f"on {device}"
        )


class GroupedLinear(nn.Module):
    """``out_e = x_e weight_e^T (+ bias_e)`` for each of n_groups groups of rows of x, one after the other.

    weight: one parameter [n_groups, out_features, in_features], or with per_group a list of n_groups [out_features,
    in_features]; bias [n_groups, out_features]. in_features and out_features are multiples of 8 on GPUs. Any group of the
    device serves: the products are local to this rank. With main_grad on the parameters backward adds to that; with
    delay_wgrad it leaves weight gradients to :meth:`backward_dw`.
    """

    def __init__(
        self,
        group: Group,
        n_groups: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        per_group: bool = False,
        delay_wgrad: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.group, self.n_groups = group, n_groups
        self.in_features, self.out_features = in_features, out_features
        self.delay_wgrad = delay_wgrad
        self.dtype = group.sizes.dtype if dtype is None else dtype
        shape = (out_features, in_features)
        self.weights: nn.ParameterList | None = None
        self.weight: nn.Parameter | None = None
        if per_group:
            self.weights = nn.ParameterList([nn.Parameter(self._empty(shape)) for _ in range(n_groups)])
        else:
            self.weight = nn.Parameter(self._empty((n_groups, *shape)))
        self.bias = nn.Parameter(self._empty((n_groups, out_features))) if bias else None
        self._delayed: deque[tuple[_Call, torch.Tensor, torch.Tensor, torch.Tensor]] = deque()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / in_features, zero bias."""
        with torch.no_grad():
            for weight in self.weight_parts():
                weight.normal_(0, 1 / math.sqrt(self.in_features))
            if self.bias is not None:
                self.bias.zero_()

    def weight_parts(self) -> tuple[torch.Tensor, ...]:
        """The weight as a tuple of one, or of one per group."""
        return (self.weight,) if self.weight is not None else tuple(self.weights or ())

    def forward(
        self,
        x: torch.Tensor,
        m_splits: Splits,
        *,
        offsets: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        dgrad_out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [M, in_features]; m_splits [n_groups] i64 on the device, rows of each group, or a list, at the cost of a sync.

        offsets [n_groups + 1] i64 on the device: first row of each group; without it one group follows the other. Rows between
        and after the groups are padding: they are neither read nor written, in out [M, out_features], in the gradient
        dgrad_out [M, in_features], and in the tensors made here in their places, where they hold nothing of use.
        out, dgrad_out: buffers for the result and for the gradient of x; ValueError where they are not what is wanted. The
        result is then the buffer itself, and written in place: the product needs no copy.
        """
        device = self.group.device
        check.tokens(x, "x", self.in_features, max(len(x), 0) if x.dim() else 0, self.dtype, device)
        splits = splits_of(m_splits, self.n_groups, x.shape[0], self.group)
        if out is not None:
            check.buffer(out, "out", (x.shape[0], self.out_features), self.dtype, device)
        if dgrad_out is not None:
            check.buffer(dgrad_out, "dgrad_out", (x.shape[0], self.in_features), self.dtype, device)
        if offsets is not None:
            check_offsets(offsets, self.n_groups, device)
        call = _Call(self, self.weight_parts(), self.bias, offsets, out, dgrad_out)
        parameters = call.weights + ((self.bias,) if self.bias is not None else ())
        return _Linear.apply(call, x.contiguous(), splits, *parameters)

    def backward_dw(self) -> None:
        """The weight gradients of the oldest backward that has left them: into main_grad where weights have it, else grad."""
        if not self._delayed:
            raise RuntimeError("epd: backward_dw: no backward has left its weight gradients")
        call, dy, x, splits = self._delayed.popleft()
        grads = call.weight_gradients(dy, x, splits)
        parameters = (*call.weights, call.bias) if call.bias is not None else call.weights
        for parameter, gradient in zip(parameters, grads, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        return self.group.empty(shape, self.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """One call of a layer."""

    layer: GroupedLinear
    weights: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None
    offsets: torch.Tensor | None
    out: torch.Tensor | None
    dgrad_out: torch.Tensor | None

    def launch(self, layout: GemmLayout, accumulate: bool = False, **operands: Any) -> None:
        options = {"layout": layout, "accumulate": accumulate}
        self.layer.group.local.launch(Op.GROUPED_GEMM, options, offsets=self.offsets, **operands)

    @property
    def operand(self) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return self.weights if self.layer.weight is None else self.weights[0]

    def forward(self, x: torch.Tensor, splits: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        y = layer.group.empty((len(x), layer.out_features), layer.dtype) if self.out is None else self.out.detach()
        if len(x):
            self.launch(GemmLayout.TN, a=x, b=self.operand, c=y, m_splits=splits, bias=self.bias)
        return y

    def dgrad(self, dy: torch.Tensor, splits: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        dx = layer.group.empty((len(dy), layer.in_features), layer.dtype) if self.dgrad_out is None else self.dgrad_out.detach()
        if len(dy):
            self.launch(GemmLayout.NN, a=dy, b=self.operand, c=dx, m_splits=splits)
        return dx

    def weight_gradients(self, dy: torch.Tensor, x: torch.Tensor, splits: torch.Tensor) -> list[torch.Tensor | None]:
        """Of the weights and the bias, None where they were added to main_grad or are not wanted."""
        trained = [*self.weights, *([self.bias] if self.bias is not None else [])]
        wants_w, wants_b = self.weights[0].requires_grad, self.bias is not None and self.bias.requires_grad
        nothing: list[torch.Tensor | None] = [None] * len(trained)
        if not wants_w and not wants_b:
            return nothing
        main = [getattr(p, "main_grad", None) for p in trained if p.requires_grad]
        if any(grad is not None for grad in main) and any(grad is None for grad in main):
            raise ValueError("main_grad: some of the layer's trained weights have it and some have not, want all or none")
        fused = main[0] is not None
        empty = self.layer.group.empty
        dw = tuple(w.main_grad if fused and wants_w else empty(w.shape, w.dtype) for w in self.weights)
        db = None
        if wants_b and self.bias is not None:
            db = self.bias.main_grad if fused else empty(self.bias.shape, self.bias.dtype)
        if len(x):
            self.launch(
                GemmLayout.NT,
                fused,
                a=dy,
                b=x,
                c=dw if self.layer.weight is None else dw[0],
                m_splits=splits,
                dbias=db,
            )
        elif not fused:
            for gradient in (*dw, *([db] if db is not None else [])):
                gradient.zero_()
        if fused:
            return nothing
        found: list[torch.Tensor | None] = list(dw) if wants_w else [None] * len(dw)
        return found + ([db] if self.bias is not None else [])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, call: _Call, x: torch.Tensor, splits: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.call = call
        ctx.save_for_backward(x, splits)
        return call.forward(x, splits)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        call, (x, splits) = ctx.call, ctx.saved_tensors
        dy = _in_memory(call.layer.group, dy)
        dx = call.dgrad(dy, splits) if ctx.needs_input_grad[1] else None
        n_parameters = len(call.weights) + (call.bias is not None)
        if call.layer.delay_wgrad:
            call.layer._delayed.append((call, dy, x, splits))
            return (None, dx, None, *[None] * n_parameters)
        return (None, dx, None, *call.weight_gradients(dy, x, splits))


def _in_memory(group: Group, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that autograd made, contiguous, and on the host backend in memory of the daemon."""
    if group.device.type == "cuda":
        return tensor.contiguous()
    return group.empty(tensor.shape, tensor.dtype).copy_(tensor)


def activate(
    group: Group,
    preact: torch.Tensor,
    m_splits: torch.Tensor,
    row_weights: torch.Tensor | None = None,
    kind: str | Activation = Activation.SWIGLU,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """``f(gate) * up`` of preact [M, 2F], gate half first, times row_weights [M] f32 where given: [M, F], with autograd.

    m_splits and offsets as in :class:`GroupedLinear`.
    """
    word = word_of(Activation, kind, "activation").name.lower()
    if preact.dim() != 2 or preact.shape[1] % 2 or not preact.is_contiguous():
        raise ValueError(f"preact: shape {tuple(preact.shape)}, want contiguous [M, 2F]")
    if row_weights is not None and (row_weights.dtype != torch.float32 or tuple(row_weights.shape) != (len(preact),)):
        raise ValueError(f"row_weights: {row_weights.dtype} {tuple(row_weights.shape)}, want torch.float32 ({len(preact)},)")
    return _Activate.apply(group, preact, m_splits, offsets, row_weights, word)


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        group: Group,
        preact: torch.Tensor,
        splits: torch.Tensor,
        offsets: torch.Tensor | None,
        row_weights: torch.Tensor | None,
        kind: str,
    ) -> torch.Tensor:
        ctx.group, ctx.kind = group, kind
        ctx.save_for_backward(preact, splits, offsets, row_weights)
        act = group.empty((len(preact), preact.shape[1] // 2), preact.dtype)
        if len(preact):
            group.local.launch(
                Op.ACTIVATION,
                {"activation": kind},
                preact=preact,
                act=act,
                m_splits=splits,
                offsets=offsets,
                recv_weights=row_weights,
            )
        return act

    @staticmethod
    def backward(ctx: Any, d_act: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        preact, splits, offsets, row_weights = ctx.saved_tensors
        d_act = _in_memory(ctx.group, d_act)
        d_preact = ctx.group.empty(preact.shape, preact.dtype)
        d_weights = None if row_weights is None else ctx.group.empty(row_weights.shape, torch.float32).zero_()
        if len(preact):
            ctx.group.local.launch(
                Op.ACTIVATION_BWD,
                {"activation": ctx.kind},
                preact=preact,
                d_act=d_act,
                d_preact=d_preact,
                m_splits=splits,
                offsets=offsets,
                recv_weights=row_weights,
                d_recv_weights=d_weights,
            )
        return None, d_preact, None, None, d_weights, None


class GroupedMLP(nn.Module):
    """The experts of one rank: fc1 to [M, 2 ffn], a gated activation, fc2 back; both :class:`GroupedLinear`.

    For the rows that :class:`epd.torch.Dispatcher` receives. The arguments are those of GroupedLinear.
    """

    def __init__(
        self,
        group: Group,
        n_groups: int,
        hidden: int,
        ffn: int,
        *,
        bias: bool = False,
        per_group: bool = False,
        delay_wgrad: bool = False,
        activation: str | Activation = Activation.SWIGLU,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": bias, "per_group": per_group, "delay_wgrad": delay_wgrad, "dtype": dtype}
        self.fc1 = GroupedLinear(group, n_groups, hidden, 2 * ffn, **options)
        self.fc2 = GroupedLinear(group, n_groups, ffn, hidden, **options)
        self.activation = word_of(Activation, activation, "activation")

    def forward(
        self,
        x: torch.Tensor,
        m_splits: Splits,
        row_weights: torch.Tensor | None = None,
        *,
        offsets: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        dgrad_out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [M, hidden], m_splits, offsets and the buffers as in GroupedLinear; row_weights [M] f32 multiply rows of fc2."""
        group = self.fc1.group
        splits = splits_of(m_splits, self.fc1.n_groups, x.shape[0], group)
        if out is not None:  # before anything runs
            check.buffer(out, "out", (x.shape[0], self.fc2.out_features), self.fc2.dtype, group.device)
        hidden = self.fc1(x, splits, offsets=offsets, dgrad_out=dgrad_out)
        act = activate(group, hidden, splits, row_weights, self.activation, offsets)
        return self.fc2(act, splits, offsets=offsets, out=out)

    def backward_dw(self) -> None:
        """The delayed weight gradients of the oldest backward of both layers."""
        self.fc2.backward_dw()
        self.fc1.backward_dw()
