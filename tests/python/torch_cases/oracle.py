"""The MoE layer in plain PyTorch with fp32 math, and how close epd has to come to it."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

# Of whole layers: largest deviation relative to the root mean square of what is compared, in bf16 beside one eps of the value
# itself (elements of 15 rms occur, whose rounding alone is 0.1 rms); and 1 - cosine-like similarity.
TOLERANCE = {torch.float32: (2e-5, 1e-9), torch.float16: (2**-7, 1e-5), torch.bfloat16: (2**-4, 1e-4)}


def gate(kind: str, g: torch.Tensor) -> torch.Tensor:
    if kind == "swiglu":
        return F.silu(g)
    return F.relu(g) ** 2 if kind == "relu2" else F.gelu(g, approximate="tanh")


@dataclasses.dataclass
class Inputs:
    """What all ranks bring, made of one seed on every rank alike. Lists are by rank; weights are of all experts."""

    x: list[torch.Tensor]
    idx: list[torch.Tensor]
    weights: list[torch.Tensor]
    dout: list[torch.Tensor]
    w1: torch.Tensor
    w2: torch.Tensor
    b1: torch.Tensor | None
    b2: torch.Tensor | None


def make(
    seed: int,
    tokens: list[int],
    n_experts: int,
    top_k: int,
    hidden: int,
    ffn: int,
    dtype: torch.dtype,
    device: torch.device,
    bias: bool = False,
    unrouted: float = 0.1,
) -> Inputs:
    """Random inputs; a share of the routing entries is -1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)

    idx, weights = [], []
    for n in tokens:
        chosen = torch.rand(n, n_experts, generator=generator).argsort(dim=1)[:, :top_k]
        chosen[torch.rand(n, top_k, generator=generator) < unrouted] = -1
        idx.append(chosen.to(device))
        weights.append(torch.rand(n, top_k, generator=generator).to(device))
    return Inputs(
        [normal(n, hidden) for n in tokens],
        idx,
        weights,
        [normal(n, hidden) for n in tokens],
        normal(n_experts, 2 * ffn, hidden, scale=hidden**-0.5),
        normal(n_experts, hidden, ffn, scale=ffn**-0.5),
        normal(n_experts, 2 * ffn, scale=0.1) if bias else None,
        normal(n_experts, hidden, scale=0.1) if bias else None,
    )


@dataclasses.dataclass
class Result:
    out: torch.Tensor
    dx: torch.Tensor
    d_weights: torch.Tensor
    dw1: torch.Tensor
    dw2: torch.Tensor
    db1: torch.Tensor | None
    db2: torch.Tensor | None


def run(inputs: Inputs, rank: int, kind: str = "swiglu") -> Result:
    """Output and token gradients of the rank, weight gradients of its experts over the tokens of all ranks; fp32."""
    counts = [len(x) for x in inputs.x]
    x = torch.cat(inputs.x).float().detach().requires_grad_()
    weights = torch.cat(inputs.weights).float().requires_grad_()
    idx = torch.cat(inputs.idx)
    params = [
        None if p is None else p.detach().float().clone().requires_grad_() for p in (inputs.w1, inputs.w2, inputs.b1, inputs.b2)
    ]
    w1, w2, b1, b2 = params
    out = torch.zeros_like(x)
    for e in range(len(w1)):
        t, k = torch.nonzero(idx == e, as_tuple=True)
        g, up = (x[t] @ w1[e].T + (0 if b1 is None else b1[e])).chunk(2, dim=1)
        y = (gate(kind, g) * up) @ w2[e].T + (0 if b2 is None else b2[e])
        out = out.index_add(0, t, weights[t, k, None] * y)
    out.backward(torch.cat(inputs.dout).float())
    first = sum(counts[:rank])
    mine = slice(first, first + counts[rank])
    n_local = len(w1) // len(counts)
    experts = slice(rank * n_local, (rank + 1) * n_local)
    grads = [None if p is None else p.grad[experts] for p in params]
    return Result(out.detach()[mine], x.grad[mine], weights.grad[mine], *grads)


def close(name: str, got: torch.Tensor | None, want: torch.Tensor | None, dtype: torch.dtype) -> None:
    """Asserts that got is want up to the tolerance of the dtype."""
    if want is None:
        assert got is None, f"{name}: something, want None"
        return
    assert got is not None, f"{name}: None"
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    if want.numel() == 0:
        return
    largest, angle = TOLERANCE[dtype]
    got, want = got.detach().double(), want.double()
    assert torch.isfinite(got).all(), f"{name}: not finite"
    rms = want.pow(2).mean().sqrt().item()
    rounding = torch.finfo(dtype).eps if dtype is torch.bfloat16 else 0.0
    excess = (got - want).abs() - rounding * want.abs()
    worst = excess.max().item()
    assert worst <= largest * max(rms, 1e-30), (
        f"{name}: off by {worst:.3g} beside rounding, rms {rms:.3g}, allowed {largest * rms:.3g}"
    )
    power = (got.pow(2).sum() + want.pow(2).sum()).item()
    if power > 0:
        difference = 1 - 2 * (got * want).sum().item() / power
        assert difference <= angle, f"{name}: difference {difference:.3g}, allowed {angle:.3g}"
