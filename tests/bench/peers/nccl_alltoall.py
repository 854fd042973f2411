"""Expert parallelism as plain torch has it: sort by expert, all_to_all_single over NCCL, one row per (token, expert) pair.

The counts travel first, and the host reads them to size the exchange: that wait is part of the method.
"""

import torch
import torch.distributed as dist


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, n_out, n_in):
        ctx.sizes = n_in, n_out
        out = rows.new_empty(sum(n_in), rows.shape[1])
        dist.all_to_all_single(out, rows, n_in, n_out)
        return out

    @staticmethod
    def backward(ctx, grad):
        n_out, n_in = ctx.sizes
        back = grad.new_empty(sum(n_in), grad.shape[1])
        dist.all_to_all_single(back, grad.contiguous(), n_in, n_out)
        return back, None, None


class AllToAll:
    name = "nccl_alltoall"

    def __init__(self, case, world_size):
        self.case, self.world_size = case, world_size
        self.n_local = case.experts // world_size

    def dispatch(self, x, idx):
        """Rows by local expert, counts [L] on the device, and what combine needs."""
        flat = idx.flatten()
        order = flat.argsort(stable=True)
        n_sent = torch.bincount(flat, minlength=self.case.experts).view(self.world_size, self.n_local)
        n_received = torch.empty_like(n_sent)
        dist.all_to_all_single(n_received, n_sent)
        sizes = torch.stack([n_sent.sum(1), n_received.sum(1)]).tolist()  # the host waits here
        rows = _Exchange.apply(x[order // self.case.top_k], sizes[0], sizes[1])
        # Rows came by (source, expert); the experts want (expert, source).
        expert = torch.arange(self.n_local, device="cuda").repeat(self.world_size)
        by_expert = expert.repeat_interleave(n_received.flatten(), output_size=sum(sizes[1])).argsort(stable=True)
        return rows[by_expert], n_received.sum(0), (order, by_expert, sizes)

    def combine(self, y, handle, weights):
        order, by_expert, sizes = handle
        rows = torch.empty_like(y).index_copy(0, by_expert, y)
        back = _Exchange.apply(rows, sizes[1], sizes[0])
        pairs = torch.empty_like(back).index_copy(0, order, back)
        pairs = pairs.view(self.case.tokens, self.case.top_k, self.case.hidden)
        if weights is None:
            return pairs.sum(1)
        return (pairs * weights.to(pairs.dtype).unsqueeze(-1)).sum(1)
