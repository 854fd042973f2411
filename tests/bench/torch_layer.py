"""One MoE layer through epd.torch beside all_to_all_single + torch._grouped_mm and DeepEP + torch._grouped_mm, in the same run.

    EPD_SOCKET=... PYTHONPATH=client/python torchrun --nproc-per-node 4 tests/bench/torch_layer.py [--cases dsv3,mixtral]

One JSON line per case and implementation: milliseconds of the slowest rank (median and p99 of the iterations, CUDA events) of
forward without grad and of forward + backward, microseconds of the client's host for a forward (one after the other, and the
first of them alone) and for a forward + backward, with the shares of letting the last gradients go, of forward and of backward
in it and what PyTorch's autograd takes for a function that only allocates the same results, and the GPU memory that the case
took, all processes of the GPU together.
All have the same weights and inputs: "difference" is that of the output and of the gradient of x to epd's, relative to its rms,
and more than MAX_DIFFERENCE fails the run. DeepEP is left out, with a word, where it cannot be imported.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable

import epd
import epd.torch
import torch
import torch.distributed as dist
from torch_peers import DeepEPMoE, PlainMoE, deepep_buffer, deepep_missing

# tokens per rank, hidden, ffn, experts, top-k
CASES = {
    "dsv3": (4096, 7168, 2048, 256, 8),
    "qwen235b": (4096, 4096, 1536, 128, 8),
    "qwen30b": (8192, 2048, 768, 128, 8),
    "mixtral": (4096, 4096, 14336, 8, 2),
    "decode128": (128, 7168, 2048, 256, 8),
}
MIB = 1 << 20
MAX_DIFFERENCE = 0.05


class Allocates(torch.autograd.Function):
    """A layer that only makes its results: what is left is PyTorch's own."""

    @staticmethod
    def forward(ctx, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.tensors = tensors
        return torch.empty_like(tensors[0])

    @staticmethod
    def backward(ctx, dout: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.tensors)


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
        self.results: list[torch.Tensor] = []  # of the first implementation: output, gradient of x

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

    def nothing(self, module: torch.nn.Module) -> None:
        """As :meth:`both`, by a layer that computes nothing."""
        self.x.grad = self.weights.grad = None
        module.zero_grad(set_to_none=True)
        Allocates.apply(self.x, self.weights, *module.parameters()).backward(self.dout)

    def shares(self, module: torch.nn.Module) -> tuple[float, float, float]:
        """As :meth:`both`: the host's microseconds of letting the last gradients go, of forward and of backward."""
        begin = time.perf_counter()
        self.x.grad = self.weights.grad = None
        module.zero_grad(set_to_none=True)
        let_go = time.perf_counter()
        out = module(self.x, self.idx, self.weights)
        forward = time.perf_counter()
        out.backward(self.dout)
        backward = time.perf_counter()
        return (let_go - begin) * 1e6, (forward - let_go) * 1e6, (backward - forward) * 1e6

    def difference(self, module: torch.nn.Module) -> float:
        """Of one step to that of the first implementation asked for, the largest of the ranks."""
        results = [self.both(module).detach(), self.x.grad]
        self.results = self.results or results
        pairs = zip(results, self.results, strict=True)
        shares = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs]
        return max(slowest([share if math.isfinite(share) else 1e30 for share in shares]))


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


def host_shares(case: Case, module: torch.nn.Module, n: int) -> list[float]:
    """Of :meth:`Case.shares` in bursts of four, the medians of the slowest rank."""
    found = []
    for _ in range(n):
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        found += [case.shares(module) for _ in range(4)]
    torch.cuda.synchronize()
    return slowest([statistics.median(share) for share in zip(*found, strict=True)])


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def settled_bytes() -> int:
    """Memory in use before a case."""
    gc.collect()
    torch.cuda.empty_cache()
    dist.barrier()
    torch.cuda.synchronize()
    return used_bytes()


def measure(case: Case, label: str, make: Callable[[], torch.nn.Module], n: int, before: int) -> dict[str, object]:
    """One implementation on one case; before: :func:`settled_bytes` without anything of it."""
    torch.cuda.reset_peak_memory_stats()
    module = make()
    case.fill(module)
    difference, n_host = case.difference(module), max(5, n // 4)
    if not difference <= MAX_DIFFERENCE:
        raise SystemExit(f"{case.name}: {label} differs from epd by {difference:.3f}, want at most {MAX_DIFFERENCE}")
    forward, forward_p99 = timed(lambda: case.forward(module), 5, n)
    host_first, host = (host_us(lambda: case.forward(module), n_host, burst) for burst in (1, 16))
    both, both_p99 = timed(lambda: case.both(module), 5, n)
    host_both = host_us(lambda: case.both(module), n_host, 4)
    host_nothing = host_us(lambda: case.nothing(module), n_host, 4)
    shares = host_shares(case, module, n_host)
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
        "host_shares_us": [round(share, 1) for share in shares],
        "host_autograd_us": round(host_nothing, 1),
        "gpu_memory_mib": round(max(slowest([float(used_bytes() - before)])) / MIB),
        "client_peak_mib": round(torch.cuda.max_memory_allocated() / MIB),
        "difference": round(difference, 4),
    }
    if isinstance(module, epd.torch.MoE):
        module.check()
    return line


def run_case(name: str, args: argparse.Namespace, client: epd.Client, device: torch.device) -> None:
    case, world = Case(name, device), dist.get_world_size()
    n_local = case.n_experts // world
    rows = 0 if args.capacity == 0 else int(args.capacity * case.tokens * case.top_k)
    before = settled_bytes()
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
        say(measure(case, "epd", lambda: epd.torch.MoE(group), args.iterations, before))
        group.barrier()
    if args.alone:
        return
    sizes = n_local, case.hidden, case.ffn, device
    say(measure(case, "all_to_all + _grouped_mm", lambda: PlainMoE(*sizes), args.iterations, settled_bytes()))
    missing = deepep_missing()
    if missing:
        say({"bench": "torch_layer", "case": name, "impl": "deepep + _grouped_mm", "left_out": missing})
        return
    make = lambda: DeepEPMoE(deepep_buffer(case.hidden), *sizes)  # noqa: E731
    say(measure(case, "deepep + _grouped_mm", make, args.iterations, settled_bytes()))


def say(line: dict[str, object]) -> None:
    if dist.get_rank() == 0:
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
