"""The MoE layer inside torch.compile: two custom operators with fake implementations and autograd.

torch.compile sees a forward that returns the output and a token, and a backward that takes the token: the number of the saved
context, in a tensor whose storage holds the context's lease. Buffers of the caller, main_grad and delayed weight gradients are
for the eager layer; where they are asked for, this raises.
"""

from __future__ import annotations

import ctypes as c
import itertools
import weakref
from typing import Any

import torch

from .. import dlpack
from ..words import DType
from .context import Lease, Weights
from .layer import Layer, main_gradients, spread, wanted_gradients

_layers: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)
_leases: weakref.WeakValueDictionary[int, Lease] = weakref.WeakValueDictionary()


def number_of(layer: Layer) -> int:
    """The number under which operators find the layer, which is not kept."""
    number = next(_numbers)
    _layers[number] = layer
    return number


def _token(lease: Lease) -> torch.Tensor:
    number = c.c_int64(next(_numbers))
    _leases[number.value] = lease
    owner = (lease, number)
    return torch.from_dlpack(dlpack.export(owner, c.addressof(number), (1, 0), DType.I64, (1,)))


def _weights(parameters: list[torch.Tensor], counts: list[int]) -> Weights:
    """counts: parts of w1, parts of w2, whether there is b1, whether there is b2."""
    rest = iter(parameters)
    w1, w2 = (tuple(next(rest) for _ in range(n)) for n in counts[:2])
    b1, b2 = (next(rest) if there else None for there in counts[2:])
    return Weights(w1, w2, b1, b2)


def _forward(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    parameters: list[torch.Tensor],
    counts: list[int],
    layer: int,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    found = _layers[layer]
    weights = _weights(parameters, counts)
    found._check(x, topk_idx, topk_weights, None, None)
    found.bind(weights)
    if not keep:
        return found.infer(x, topk_idx, topk_weights, None), torch.zeros(1, dtype=torch.int64)
    if found.delay_wgrad or main_gradients(weights, wanted_gradients(weights)) is not None:
        raise NotImplementedError("epd: main_grad and delay_wgrad are not for compiled layers; call them eagerly")
    out, lease = found.forward(x, topk_idx, topk_weights, None)
    return out, _token(lease)


def _backward(
    dout: torch.Tensor,
    token: torch.Tensor,
    topk_weights: torch.Tensor,
    parameters: list[torch.Tensor],
    counts: list[int],
    layer: int,
) -> list[torch.Tensor]:
    """dx, d_weights, and the gradients of all parameters."""
    found, weights = _layers[layer], _weights(parameters, counts)
    trained = Weights(
        *(tuple(t.detach().requires_grad_() for t in part) for part in (weights.w1, weights.w2)),
        *(None if bias is None else bias.detach().requires_grad_() for bias in (weights.b1, weights.b2)),
    )
    dx, d_weights, grads = found.backward(_leases[int(token)], dout, trained, True, None)
    assert dx is not None and d_weights is not None
    return [dx, d_weights, *[gradient for gradient in spread(grads, trained) if gradient is not None]]


_SCHEMA = "(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor[] parameters, int[] counts, int layer, bool keep)"
moe_forward: Any = torch.library.custom_op(
    "epd::moe_forward", _forward, mutates_args=(), schema=f"{_SCHEMA} -> (Tensor, Tensor)"
)
moe_backward: Any = torch.library.custom_op(
    "epd::moe_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor dout, Tensor token, Tensor topk_weights, Tensor[] parameters, int[] counts, int layer) -> Tensor[]",
)


@moe_forward.register_fake  # type: ignore[untyped-decorator]
def _(x: Any, topk_idx: Any, topk_weights: Any, parameters: Any, counts: Any, layer: Any, keep: Any) -> Any:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty(1, dtype=torch.int64)


@moe_backward.register_fake  # type: ignore[untyped-decorator]
def _(dout: Any, token: Any, topk_weights: Any, parameters: Any, counts: Any, layer: Any) -> Any:
    dx = torch.empty_like(dout, memory_format=torch.contiguous_format)
    return [dx, topk_weights.new_empty(topk_weights.shape, dtype=torch.float32), *[torch.empty_like(p) for p in parameters]]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, _, topk_weights, parameters, ctx.counts, ctx.layer, _ = inputs
    ctx.save_for_backward(output[1], topk_weights, *parameters)


def _autograd(ctx: Any, dout: torch.Tensor, _: Any) -> tuple[Any, ...]:
    token, topk_weights, *parameters = ctx.saved_tensors
    dx, d_weights, *grads = moe_backward(dout, token, topk_weights, parameters, ctx.counts, ctx.layer)
    return dx, None, d_weights.to(topk_weights.dtype), grads, None, None, None


moe_forward.register_autograd(_autograd, setup_context=_setup)


def compiled(
    layer: int,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor | None,
    parameters: list[torch.Tensor],
    counts: list[int],
) -> torch.Tensor:
    """The layer as torch.compile traces it."""
    tokens = x.reshape(-1, x.shape[-1])
    weights = torch.ones(topk_idx.shape, device=x.device) if topk_weights is None else topk_weights
    keep = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad or any(p.requires_grad for p in parameters))
    return moe_forward(tokens, topk_idx, weights, parameters, counts, layer, keep)[0].reshape(x.shape)
