"""The MoE layer as a module."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..words import Activation, Saved
from .context import Weights
from .group import Group
from .layer import Layer

if hasattr(torch.library, "custom_op"):
    from .compile import compiled, number_of


def _is_compiling() -> bool:
    return hasattr(torch, "compiler") and torch.compiler.is_compiling()


def _compile_number(layer: Layer) -> int:
    """0 where this PyTorch cannot make operators, and so cannot compile the layer."""
    if not hasattr(torch.library, "custom_op"):
        return 0
    return number_of(layer)


class MoE(nn.Module):
    """The experts of an MoE layer, spread over the ranks of a group; routing is the caller's.

    Parameters of this rank's L experts: w1 [L, 2F, H] (gate half first) and w2 [L, H, F], with bias also b1 [L, 2F] and
    b2 [L, H]. Where a parameter has a ``main_grad`` tensor (f32, bf16 or f16, of its shape), backward adds to that and leaves
    ``grad`` alone; all of them have it or none. The other arguments are those of :class:`epd.torch.Layer`::

        group = epd.torch.join("layer", n_experts=64, top_k=8, hidden=2048, ffn=768, max_tokens=4096)
        moe = epd.torch.MoE(group)
        out = moe(x, topk_idx, topk_weights)
    """

    def __init__(
        self,
        group: Group,
        *,
        bias: bool = False,
        activation: str | Activation = Activation.SWIGLU,
        saved: str | Saved = Saved.CONTEXT,
        n_contexts: int = 0,
        delay_wgrad: bool = False,
    ) -> None:
        super().__init__()
        n_local, hidden, ffn = group.n_local_experts, group.sizes.hidden, group.sizes.ffn
        if ffn == 0:
            raise ValueError("group ffn: 0, want the width of the experts for an MoE layer")
        self.layer = Layer(group, activation=activation, saved=saved, n_contexts=n_contexts, delay_wgrad=delay_wgrad)
        self._number = _compile_number(self.layer)
        self._known: Weights | None = None
        self.w1 = nn.Parameter(group.empty((n_local, 2 * ffn, hidden)))
        self.w2 = nn.Parameter(group.empty((n_local, hidden, ffn)))
        self.b1 = nn.Parameter(group.empty((n_local, 2 * ffn))) if bias else None
        self.b2 = nn.Parameter(group.empty((n_local, hidden))) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / fan-in, zero biases."""
        with torch.no_grad():
            for weight in (self.w1, self.w2):
                weight.normal_(0, 1 / math.sqrt(weight.shape[2]))
            for bias in (self.b1, self.b2):
                if bias is not None:
                    bias.zero_()

    @property
    def group(self) -> Group:
        """The group it runs in."""
        return self.layer.group

    def forward(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
        grad_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See :meth:`epd.torch.Layer.__call__`. In torch.compile it is an operator, without the two buffers."""
        if _is_compiling():
            if out is not None or grad_input is not None:
                raise ValueError("out, grad_input: not inside torch.compile, want None")
            parameters = [p for p in (self.w1, self.w2, self.b1, self.b2) if p is not None]
            counts = [1, 1, int(self.b1 is not None), int(self.b2 is not None)]
            return compiled(self._number, x, topk_idx, topk_weights, parameters, counts)
        return self.layer(x, topk_idx, topk_weights, self._weights(), out=out, grad_input=grad_input)

    def backward_dw(self) -> None:
        """See :meth:`epd.torch.Layer.backward_dw`."""
        self.layer.backward_dw()

    def check(self, wait: bool = True) -> None:
        """See :meth:`epd.torch.Layer.check`."""
        self.layer.check(wait)

    def _weights(self) -> Weights:
        """Of the parameters as they are now: made anew where one was replaced."""
        known, own = self._known, self._parameters.get
        if (
            known is None
            or known.w1[0] is not own("w1")
            or known.w2[0] is not own("w2")
            or known.b1 is not own("b1")
            or known.b2 is not own("b2")
        ):
            known = self._known = Weights((self.w1,), (self.w2,), self.b1, self.b2)
        return known


def moe(
    layer: Layer,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor | None,
    w1: torch.Tensor | list[torch.Tensor],
    w2: torch.Tensor | list[torch.Tensor],
    *,
    b1: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    grad_input: torch.Tensor | None = None,
) -> torch.Tensor:
    """The MoE layer as a function of weights that the caller keeps: one tensor [L, ...] each, or lists of L tensors."""

    def parts(weight: torch.Tensor | list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return (weight,) if isinstance(weight, torch.Tensor) else tuple(weight)

    return layer(x, topk_idx, topk_weights, Weights(parts(w1), parts(w2), b1, b2), out=out, grad_input=grad_input)
