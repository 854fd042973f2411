"""The MoE layer of torch_layer.py as others make it: PyTorch's own parts, and DeepEP's exchange between them.

Both take the weights of epd.torch.MoE, w1 [L, 2F, H] and w2 [L, H, F], and do the rows by torch indexing. Neither fuses the
permutation or SwiGLU, which hand-written kernels around the same exchange would.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F


class Gather(torch.autograd.Function):
    """rows[at]; PyTorch's own indexing sorts in its backward, this adds."""

    @staticmethod
    def forward(ctx, rows, at):
        ctx.save_for_backward(at)
        ctx.n_rows = rows.shape[0]
        return rows[at]

    @staticmethod
    def backward(ctx, grad):
        (at,) = ctx.saved_tensors
        return grad.new_zeros((ctx.n_rows, grad.shape[1])).index_add_(0, at, grad), None


def grouped_experts(rows: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """SwiGLU experts on rows [M, H] by expert; ends [L] int32."""
    gate, up = torch._grouped_mm(rows, w1.transpose(1, 2), offs=ends).chunk(2, dim=1)
    return torch._grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=ends)


class _Experts(torch.nn.Module):
    def __init__(self, n_local: int, hidden: int, ffn: int, device: torch.device) -> None:
        super().__init__()
        self.w1 = torch.nn.Parameter(torch.empty(n_local, 2 * ffn, hidden, dtype=torch.bfloat16, device=device))
        self.w2 = torch.nn.Parameter(torch.empty(n_local, hidden, ffn, dtype=torch.bfloat16, device=device))


class Exchange(torch.autograd.Function):
    """all_to_all_single of rows, and the same the other way round."""

    @staticmethod
    def forward(ctx, rows, sent, received):
        ctx.splits = sent, received
        out = rows.new_empty((sum(received), rows.shape[1]))
        dist.all_to_all_single(out, rows.contiguous(), received, sent)
        return out

    @staticmethod
    def backward(ctx, grad):
        sent, received = ctx.splits
        out = grad.new_empty((sum(sent), grad.shape[1]))
        dist.all_to_all_single(out, grad.contiguous(), sent, received)
        return out, None, None


class PlainMoE(_Experts):
    """Sort, all_to_all_single, torch._grouped_mm; one host sync for the splits."""

    def forward(self, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        world, n_local, top_k = dist.get_world_size(), len(self.w1), idx.shape[1]
        order = idx.flatten().argsort(stable=True)
        counts = torch.bincount(idx.flatten(), minlength=world * n_local)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts)
        splits = torch.stack([counts.view(world, -1).sum(1), theirs.view(world, -1).sum(1)]).tolist()
        rows = Exchange.apply(Gather.apply(x, order // top_k), *splits)
        expert = torch.arange(n_local, device=x.device).repeat(world).repeat_interleave(theirs)
        by_expert = expert.argsort(stable=True)
        ends = theirs.view(world, n_local).sum(0).cumsum(0).int()
        y = grouped_experts(rows[by_expert], self.w1, self.w2, ends)
        back = torch.empty_like(y).index_copy(0, by_expert, y)
        y = Exchange.apply(back, splits[1], splits[0])
        scaled = y * weights.flatten()[order, None].to(y.dtype)
        return torch.zeros_like(x).index_add(0, order // top_k, scaled)


def deepep_missing() -> str | None:
    """Why DeepEP cannot run here; None if it can."""
    try:
        import deep_ep  # noqa: F401
    except ImportError as error:
        return f"cannot be imported: {error}"
    return None


def deepep_buffer(hidden: int):
    """One for all layers of this width."""
    import deep_ep

    world = dist.get_world_size()
    configs = deep_ep.Buffer.get_dispatch_config(world), deep_ep.Buffer.get_combine_config(world)
    return deep_ep.Buffer(dist.group.WORLD, max(config.get_nvl_buffer_size_hint(hidden * 2, world) for config in configs))


class DeepDispatch(torch.autograd.Function):
    """Tokens to the ranks of their experts, once per (token, rank). The backward is a combine."""

    @staticmethod
    def forward(ctx, buffer, x, idx, weights, n_experts, found):
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, n_experts)
        rows, row_idx, row_weights, counts, handle, _ = buffer.dispatch(
            x,
            topk_idx=idx,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        ctx.buffer, ctx.handle = buffer, handle
        ctx.mark_non_differentiable(row_idx)
        found["counts"], found["handle"] = counts, handle
        return rows, row_idx, row_weights

    @staticmethod
    def backward(ctx, d_rows, _, d_row_weights):
        dx, d_weights, _ = ctx.buffer.combine(d_rows.contiguous(), ctx.handle, topk_weights=d_row_weights.contiguous())
        return None, dx, None, d_weights, None, None


class DeepCombine(torch.autograd.Function):
    """The sums of the rows back to their tokens. The backward is a dispatch along the same way."""

    @staticmethod
    def forward(ctx, buffer, rows, handle):
        ctx.buffer, ctx.handle = buffer, handle
        return buffer.combine(rows, handle)[0]

    @staticmethod
    def backward(ctx, dout):
        return None, ctx.buffer.dispatch(dout.contiguous(), handle=ctx.handle)[0], None


class DeepEPMoE(_Experts):
    """DeepEP's intranode kernels (1.2), and torch._grouped_mm; the host waits for the counts."""

    def __init__(self, buffer, n_local: int, hidden: int, ffn: int, device: torch.device) -> None:
        super().__init__(n_local, hidden, ffn, device)
        self.buffer = buffer

    def forward(self, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        n_local, top_k, found = len(self.w1), idx.shape[1], {}
        n_experts = n_local * dist.get_world_size()
        rows, row_idx, row_weights = DeepDispatch.apply(self.buffer, x, idx, weights, n_experts, found)
        local = row_idx.flatten()
        order = torch.where(local < 0, n_local, local).argsort(stable=True)[: sum(found["counts"])]
        ends = torch.tensor(found["counts"], device=x.device).cumsum(0).int()
        y = grouped_experts(Gather.apply(rows, order // top_k), self.w1, self.w2, ends)
        scaled = y * row_weights.flatten()[order, None].to(y.dtype)
        sums = torch.zeros_like(rows).index_add(0, order // top_k, scaled)
        return DeepCombine.apply(self.buffer, sums, found["handle"])
