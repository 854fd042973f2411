"""epd for PyTorch: MoE layers, grouped linear layers and token dispatch of an expert-parallel group, with autograd.

    group = epd.torch.join("layer0", n_experts=64, top_k=8, hidden=2048, ffn=768, max_tokens=4096)
    moe = epd.torch.MoE(group)
    out = moe(x, topk_idx, topk_weights)      # on the current stream; backward through autograd

Every rank of a group makes the same calls in the same order. Nothing waits for the GPU: a step that failed, such as one whose
peer was killed, raises its :class:`epd.Error` from a later call, or from ``moe.check()``.
"""

from .context import Weights
from .dispatcher import Dispatched, Dispatcher
from .graph import CUDAGraph
from .group import Group, Sizes, join
from .grouped import GroupedLinear, GroupedMLP, activate
from .layer import Layer
from .moe import MoE, moe

__all__ = [
    "CUDAGraph",
    "Dispatched",
    "Dispatcher",
    "Group",
    "GroupedLinear",
    "GroupedMLP",
    "Layer",
    "MoE",
    "Sizes",
    "Weights",
    "activate",
    "join",
    "moe",
]
