"""The contract of buffers that the caller provides: every violation is a ValueError that names the property. Internal."""

from __future__ import annotations

import torch


def buffer(tensor: torch.Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Checks an output buffer: a 2-D contiguous tensor of exactly this shape, dtype and device that needs no gradient."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: {type(tensor).__name__}, want a tensor")
    if tensor.dim() != 2:
        raise ValueError(f"{name}: {tensor.dim()} dimensions, want 2-D [{shape[0]}, {shape[1]}]")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, want exactly {tuple(shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: dtype {tensor.dtype}, want {dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: device {tensor.device}, want {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: strides {tuple(tensor.stride())}, want contiguous")
    if tensor.requires_grad:
        raise ValueError(f"{name}: requires grad, want a buffer without (no grad)")


def tokens(x: torch.Tensor, name: str, width: int, max_rows: int, dtype: torch.dtype, device: torch.device) -> None:
    """Checks an input of one row per token."""
    if x.dim() != 2 or x.shape[1] != width:
        raise ValueError(f"{name}: shape {tuple(x.shape)}, want [n_tokens, {width}]")
    if x.shape[0] > max_rows:
        raise ValueError(f"{name}: {x.shape[0]} tokens, the group takes at most {max_rows}")
    if x.dtype != dtype:
        raise ValueError(f"{name}: dtype {x.dtype}, want {dtype} of the group")
    if x.device != device:
        raise ValueError(f"{name}: device {x.device}, want {device}")


def routing(topk_idx: torch.Tensor, topk_weights: torch.Tensor | None, n_tokens: int, top_k: int, device: torch.device) -> None:
    """Checks the routing of n_tokens tokens."""
    for name, tensor in (("topk_idx", topk_idx), ("topk_weights", topk_weights)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: device {tensor.device}, want {device}")
    if topk_idx.shape != (n_tokens, top_k):
        raise ValueError(f"topk_idx: shape {tuple(topk_idx.shape)}, want ({n_tokens}, {top_k})")
    if topk_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"topk_idx: dtype {topk_idx.dtype}, want torch.int32 or torch.int64")
    if topk_weights is not None and topk_weights.shape != (n_tokens, top_k):
        raise ValueError(f"topk_weights: shape {tuple(topk_weights.shape)}, want ({n_tokens}, {top_k})")
    if topk_weights is not None and not topk_weights.dtype.is_floating_point:
        raise ValueError(f"topk_weights: dtype {topk_weights.dtype}, want a floating-point one")
