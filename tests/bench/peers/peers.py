r"""What else can do the work of epd-bench's cases, on the same GPUs: one JSON line per result.

    peers.py --case dsv3,decode128 [--ranks N] [--iters N] [--only torch,nccl_alltoall,deepep] [--ops dispatch,combine] \
        > peers.jsonl

dispatch: tokens to rows. combine: back, the plain sum. grouped_gemm: the first GEMM of a layer over evenly spread rows.
moe_forward and moe_backward: the whole layer. A peer that is not there gets a line that says so, and no number.
"""

import argparse
import json
import os
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cases import CASES
from deepep import DeepEP, missing
from experts import experts, grouped, make_routing, make_weights
from measure import measure, summary
from nccl_alltoall import AllToAll

PEERS = ("nccl_alltoall", "torch", "deepep")
EXPERT_OPS = ("grouped_gemm", "moe_forward", "moe_backward")
OPS = ("dispatch", "combine", "combine_weighted", *EXPERT_OPS)


class Reporter:
    def __init__(self, args, rank):
        self.args, self.rank = args, rank
        self.n_measured = 0

    def line(self, case, peer, op, **rest):
        if self.rank != 0:
            return
        fields = {"peer": peer, "op": op, "case": case.name, "dtype": "bf16", "ranks": self.args.ranks,
                  "zipf": self.args.zipf, "device": torch.cuda.get_device_name(), "torch": torch.__version__,
                  "nccl": ".".join(map(str, torch.cuda.nccl.version())), "time_unix": int(time.time())}
        print(json.dumps({**fields, **rest}), flush=True)

    def measure(self, case, peer, op, run, prepare=None):
        if op not in self.args.ops:
            return
        torch.cuda.reset_peak_memory_stats()
        self.n_measured += 1
        times = measure(run, self.args.iters, self.args.warmup, prepare)
        self.line(case, peer, op, **summary(times), peak_bytes_per_rank=torch.cuda.max_memory_allocated())


def run_alltoall(report, case, x, routing, weights):
    w1, w2 = weights
    idx, scale = routing
    peer = AllToAll(case, dist.get_world_size())
    rows, counts, handle = peer.dispatch(x, idx)
    report.measure(case, peer.name, "dispatch", lambda: peer.dispatch(x, idx))
    report.measure(case, peer.name, "combine", lambda: peer.combine(rows, handle, None))
    report.measure(case, peer.name, "combine_weighted", lambda: peer.combine(rows, handle, scale))
    del rows, counts, handle

    def layer(tokens):
        received, n_rows, back = peer.dispatch(tokens, idx)
        return peer.combine(experts(received, w1, w2, n_rows), back, scale)

    report.measure(case, peer.name + "+torch", "moe_forward", lambda: layer(x))
    if "moe_backward" not in report.args.ops:
        return
    tokens, dout = x.clone().requires_grad_(), torch.randn_like(x)
    w1.requires_grad_(), w2.requires_grad_()

    def forward():
        tokens.grad = w1.grad = w2.grad = None
        return layer(tokens)

    report.measure(case, peer.name + "+torch", "moe_backward", lambda out: out.backward(dout), forward)
    w1.grad = w2.grad = None
    w1.requires_grad_(False), w2.requires_grad_(False)


def run_torch(report, case, w1):
    n_rows, n_local = case.tokens * case.top_k, w1.shape[0]
    rows = torch.randn(n_rows, case.hidden, device="cuda", dtype=torch.bfloat16)
    offsets = torch.tensor([n_rows * (i + 1) // n_local for i in range(n_local)], device="cuda", dtype=torch.int32)
    report.measure(case, "torch", "grouped_gemm", lambda: grouped(rows, w1, offsets))


def run_deepep(report, case, x, routing, weights):
    why = missing()
    if why:
        report.line(case, "deepep", "dispatch", failed=why)
        return
    idx, scale = routing
    peer = DeepEP(case, dist.get_world_size(), dist.group.WORLD)
    rows, _, _, _, handle = peer.dispatch(x, idx, scale)
    report.measure(case, peer.name, "dispatch", lambda: peer.dispatch(x, idx, scale))
    report.measure(case, peer.name, "combine", lambda: peer.combine(rows, handle))
    report.measure(case, peer.name + "+torch", "moe_forward",
                   lambda: peer.layer(x, idx, scale, lambda r, n: experts(r, *weights, n)))


def run_case(args, report, case, rank):
    x = torch.randn(case.tokens, case.hidden, device="cuda", dtype=torch.bfloat16)
    routing = make_routing(case, rank, args.zipf)
    with torch.no_grad():
        weights = make_weights(case, case.experts // args.ranks) if set(args.ops) & set(EXPERT_OPS) else (None, None)
    if "nccl_alltoall" in args.only:
        run_alltoall(report, case, x, routing, weights)
    with torch.no_grad():
        if "torch" in args.only and "grouped_gemm" in args.ops:
            run_torch(report, case, weights[0])
        if "deepep" in args.only:
            run_deepep(report, case, x, routing, weights)
    del weights, x
    torch.cuda.empty_cache()


def rank_main(rank, args):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=args.ranks, device_id=torch.device("cuda", rank))
    report = Reporter(args, rank)
    for name in args.case.split(","):
        run_case(args, report, CASES[name], rank)
    dist.destroy_process_group()
    if report.n_measured == 0:
        raise RuntimeError("no peer could be measured")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="dsv3,qwen235b,qwen30b,mixtral,decode128")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--iters", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--zipf", type=float, default=0.0)
    parser.add_argument("--port", type=int, default=29517)
    parser.add_argument("--only", default=",".join(PEERS))
    parser.add_argument("--ops", default=",".join(OPS))
    args = parser.parse_args()
    args.only, args.ops = args.only.split(","), args.ops.split(",")
    unknown = set(args.only) - set(PEERS) | set(args.case.split(",")) - set(CASES) | set(args.ops) - set(OPS)
    if unknown:
        known = f"peers: {', '.join(PEERS)}; cases: {', '.join(CASES)}; ops: {', '.join(OPS)}"
        parser.error(f"what is {', '.join(sorted(unknown))}? {known}")
    if args.ranks == 0:
        print("SKIP: no GPU", file=sys.stderr)
        return 77
    mp.spawn(rank_main, (args,), nprocs=args.ranks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
