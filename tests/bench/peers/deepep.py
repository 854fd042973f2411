"""DeepEP's intranode kernels (1.2), where the package can be imported. Tokens travel once per (token, rank); the rows by expert
are made by torch indexing afterwards, which only the whole layer pays for: dispatch and combine are DeepEP's alone."""

import torch


def missing():
    """Why it cannot run here; None if it can."""
    try:
        import deep_ep  # noqa: F401
    except ImportError as error:
        return f"cannot be imported: {error}"
    return None


class DeepEP:
    name = "deepep"

    def __init__(self, case, world_size, group):
        import deep_ep

        self.case, self.world_size = case, world_size
        self.n_local = case.experts // world_size
        size = max(
            config.get_nvl_buffer_size_hint(case.hidden * 2, world_size)
            for config in (deep_ep.Buffer.get_dispatch_config(world_size), deep_ep.Buffer.get_combine_config(world_size))
        )
        self.buffer = deep_ep.Buffer(group, size)

    def dispatch(self, x, idx, weights):
        per_rank, _, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(idx, self.case.experts)
        rows, row_idx, row_weights, counts, handle, _ = self.buffer.dispatch(
            x, topk_idx=idx, topk_weights=weights, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert)
        return rows, row_idx, row_weights, counts, handle

    def combine(self, rows, handle):
        return self.buffer.combine(rows, handle)[0]

    def layer(self, x, idx, weights, run_experts):
        rows, row_idx, row_weights, counts, handle = self.dispatch(x, idx, weights)
        flat = row_idx.flatten()
        order = torch.where(flat < 0, self.n_local, flat).argsort(stable=True)[: sum(counts)]
        y = run_experts(rows[order // self.case.top_k], torch.tensor(counts, device="cuda"))
        y = y * row_weights.flatten()[order].unsqueeze(-1).to(y.dtype)
        sums = torch.zeros(rows.shape, device="cuda", dtype=torch.float32)
        sums.index_add_(0, order // self.case.top_k, y.float())
        return self.combine(sums.to(rows.dtype), handle)
