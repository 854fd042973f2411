"""What every peer needs beside the exchange: the experts' grouped GEMMs in torch, and a routing."""

import torch


def make_routing(case, rank, zipf=0.0):
    """[tokens, top_k] int64 distinct experts, and weights that sum to 1."""
    generator = torch.Generator(device="cuda").manual_seed(1000 + rank)
    chances = torch.ones(case.experts, device="cuda")
    if zipf:
        order = torch.randperm(case.experts, generator=torch.Generator().manual_seed(7)).cuda()
        chances[order] = torch.arange(1, case.experts + 1, device="cuda").float() ** -zipf
    # The largest keys of an exponential race are a draw without replacement in proportion to the chances.
    keys = torch.empty(case.tokens, case.experts, device="cuda").exponential_(generator=generator) / chances
    idx = keys.topk(case.top_k, largest=False).indices
    weights = torch.full((case.tokens, case.top_k), 1.0 / case.top_k, device="cuda")
    return idx, weights


def make_weights(case, n_local, requires_grad=False):
    w1 = torch.randn(n_local, 2 * case.ffn, case.hidden, device="cuda", dtype=torch.bfloat16) / 64
    w2 = torch.randn(n_local, case.hidden, case.ffn, device="cuda", dtype=torch.bfloat16) / 64
    return w1.requires_grad_(requires_grad), w2.requires_grad_(requires_grad)


def grouped(x, weight, offsets):
    """Rows [M, K] by expert times weight [L, N, K] transposed; offsets [L] int32 are the ends of the experts' rows."""
    return torch._grouped_mm(x, weight.transpose(-2, -1), offs=offsets)


def swiglu(preact):
    gate, up = preact.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def experts(x, w1, w2, counts):
    """counts [L] rows of each local expert, on the device."""
    offsets = counts.cumsum(0).to(torch.int32)
    return grouped(swiglu(grouped(x, w1, offsets)), w2, offsets)
