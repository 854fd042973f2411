"""One MoE layer through epd.torch beside all_to_all_single + torch._grouped_mm, in the same run.

    EPD_SOCKET=... PYTHONPATH=client/python torchrun --nproc-per-node 4 tests/bench/torch_layer.py [--cases dsv3,mixtral]

One JSON line per case and implementation: milliseconds of the slowest rank (median and p99 of the iterations, CUDA events) of
forward without grad and of forward + backward, microseconds of the client's host for a forward (one after the other, and the
first of them alone) and for a forward + backward, and the GPU memory that the case took, all processes of the GPU together.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import epd
import epd.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F

# tokens per rank, hidden, ffn, experts, top-k
CASES = {
    "dsv3": (4096, 7168, 2048, 256, 8),
    "qwen235b": (4096, 4096, 1536, 128, 8),
    "qwen30b": (8192, 2048, 768, 128, 8),
    "mixtral": (4096, 4096, 14336, 8, 2),
    "decode128": (128, 7168, 2048, 256, 8),
}
MIB = 1 << 20


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


class PlainMoE(torch.nn.Module):
    """The same layer of PyTorch's own parts: sort, all_to_all_single, torch._grouped_mm; one host sync for the splits."""

    def __init__(self, n_local: int, hidden: int, ffn: int, device: torch.device) -> None:
        super().__init__()
        self.w1 = torch.nn.Parameter(torch.empty(n_local, 2 * ffn, hidden, dtype=torch.bfloat16, device=device))
        self.w2 = torch.nn.Parameter(torch.empty(n_local, hidden, ffn, dtype=torch.bfloat16, device=device))

    def forward(self, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        world, n_local, top_k = dist.get_world_size(), len(self.w1), idx.shape[1]
        order = idx.flatten().argsort(stable=True)
        counts = torch.bincount(idx.flatten(), minlength=world * n_local)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts)
        splits = torch.stack([counts.view(world, -1).sum(1), theirs.view(world, -1).sum(1)]).tolist()
        rows = Exchange.apply(x[order // top_k], *splits)
        expert = torch.arange(n_local, device=x.device).repeat(world).repeat_interleave(theirs)
        by_expert = expert.argsort(stable=True)
        ends = theirs.view(world, n_local).sum(0).cumsum(0).int()
        gate, up = torch._grouped_mm(rows[by_expert], self.w1.transpose(1, 2), offs=ends).chunk(2, dim=1)
        y = torch._grouped_mm(F.silu(gate) * up, self.w2.transpose(1, 2), offs=ends)
        back = torch.empty_like(y).index_copy(0, by_expert, y)
        y = Exchange.apply(back, splits[1], splits[0])
        scaled = y * weights.flatten()[order, None].to(y.dtype)
        return torch.zeros_like(x).index_add(0, order // top_k, scaled)


class Case:
    """Inputs and timing of one case."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.tokens, self.hidden, self.ffn, self.n_experts, self.top_k = CASES[name]
        generator = torch.Generator(device).manual_seed(dist.get_rank())
        self.x = torch.randn(self.tokens, self.hidden, generator=generator, device=device).bfloat16().requires_grad_()
        scores = torch.rand(self.tokens, self.n_experts, generator=generator, device=device)
        values, self.idx = scores.topk(self.top_k)
        self.weights = (values / values.sum(1, keepdim=True)).requires_grad_()
        self.dout = torch.randn(self.tokens, self.hidden, generator=generator, device=device).bfloat16()

    def fill(self, module: torch.nn.Module) -> None:
        generator = torch.Generator(self.x.device).manual_seed(100 + dist.get_rank())
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(0, parameter.shape[2] ** -0.5, generator=generator)

    def forward(self, module: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return module(self.x, self.idx, self.weights)

    def both(self, module: torch.nn.Module) -> torch.Tensor:
        self.x.grad = self.weights.grad = None
        module.zero_grad(set_to_none=True)
        out = module(self.x, self.idx, self.weights)
        out.backward(self.dout)
        return out


def slowest(times: list[float]) -> list[float]:
    """Of every iteration the time of its slowest rank."""
    gathered = torch.tensor(times, device="cuda")
    dist.all_reduce(gathered, dist.ReduceOp.MAX)
    return gathered.tolist()


def timed(run: Callable[[], object], warmup: int, n: int) -> tuple[float, float]:
    """Median and p99 in ms over n iterations, of the slowest rank."""
    for _ in range(warmup):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
    for begin, end in events:
        dist.barrier()
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    times = sorted(slowest([begin.elapsed_time(end) for begin, end in events]))
    return statistics.median(times), times[min(n - 1, int(0.99 * n))]


def host_us(run: Callable[[], object], n: int, burst: int) -> float:
    """The host's time of a call, of burst calls one after the other with nothing before them; median of n, slowest rank."""
    times = []
    for _ in range(n):
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(burst):
            run()
        times.append((time.perf_counter() - begin) * 1e6 / burst)
    torch.cuda.synchronize()
    return max(slowest([statistics.median(times)]))


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def measure(case: Case, label: str, make: Callable[[], torch.nn.Module], n: int) -> dict[str, object]:
    """One implementation on one case."""
    gc.collect()
    torch.cuda.empty_cache()
    dist.barrier()
    torch.cuda.synchronize()
    before = used_bytes()
    torch.cuda.reset_peak_memory_stats()
    module = make()
    case.fill(module)
    forward, forward_p99 = timed(lambda: case.forward(module), 5, n)
    host_first, host = (host_us(lambda: case.forward(module), n, burst) for burst in (1, 16))
    both, both_p99 = timed(lambda: case.both(module), 5, n)
    host_both = host_us(lambda: case.both(module), n, 4)
    line = {
        "bench": "torch_layer",
        "case": case.name,
        "ranks": dist.get_world_size(),
        "impl": label,
        "forward_ms": round(forward, 3),
        "forward_p99_ms": round(forward_p99, 3),
        "forward_backward_ms": round(both, 3),
        "forward_backward_p99_ms": round(both_p99, 3),
        "host_forward_us": round(host, 1),
        "host_forward_first_us": round(host_first, 1),
        "host_forward_backward_us": round(host_both, 1),
        "gpu_memory_mib": round(max(slowest([float(used_bytes() - before)])) / MIB),
        "client_peak_mib": round(torch.cuda.max_memory_allocated() / MIB),
    }
    if isinstance(module, epd.torch.MoE):
        module.check()
    return line


def run_case(name: str, args: argparse.Namespace, client: epd.Client, device: torch.device) -> None:
    case, world = Case(name, device), dist.get_world_size()
    n_local = case.n_experts // world
    rows = 0 if args.capacity == 0 else int(args.capacity * case.tokens * case.top_k)
    group = epd.torch.join(
        f"bench-{name}",
        n_experts=case.n_experts,
        top_k=case.top_k,
        hidden=case.hidden,
        ffn=case.ffn,
        max_tokens=case.tokens,
        capacity_rows=rows,
        client=client,
        device=device,
    )
    with group:
        lines = [measure(case, "epd", lambda: epd.torch.MoE(group), args.iterations)]
        group.barrier()
    if not args.alone:
        make = lambda: PlainMoE(n_local, case.hidden, case.ffn, device)  # noqa: E731
        lines.append(measure(case, "all_to_all + _grouped_mm", make, args.iterations))
    if dist.get_rank() == 0:
        for line in lines:
            print(json.dumps(line), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="dsv3,qwen235b,qwen30b,mixtral")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--capacity", type=float, default=1.25, help="rows a rank has room for, of T K; 0: all that could come")
    parser.add_argument("--alone", action="store_true", help="only epd")
    args = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    with epd.connect() as client:
        for name in args.cases.split(","):
            run_case(name, args, client, device)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
