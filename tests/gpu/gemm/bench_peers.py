#!/usr/bin/env python3
"""Grouped GEMM beside its peers in one process: sm90, torch._grouped_mm and a loop of cuBLAS matmuls.

Usage: bench_peers.py FOLDER [rounds [pause in ms]]   (FOLDER holds libgemm_bench.so)
Without a pause the GPU runs at its power limit all the time and every library slows to it; a pause before each call shows
them below it, as kernels between other work run.
Candidates of a case take turns, round by round, so that a GPU that warms up slows all of them alike; the L2 is flushed
before every timed call; medians of CUDA events. One JSON line per case, then a table. Random normal data.
"""

import ctypes
import json
import os
import statistics
import sys
import time

import torch

TN, NN, NT = 1, 2, 3
F32, BF16 = 1, 2
SWIGLU = 1
CEILING = 791.0

SHAPES = [
    ("8x4096", 8, 4096, 4096, 2048),
    ("8x2048", 8, 2048, 7168, 4096),
    ("32x512", 32, 512, 2048, 1536),
    ("32x1024", 32, 1024, 7168, 4096),
    ("64x128", 64, 128, 7168, 4096),
    ("64x512a", 64, 512, 7168, 4096),
    ("64x512b", 64, 512, 2048, 7168),
    ("4x8192", 4, 8192, 4096, 7168),
]


def load(folder):
    library = ctypes.CDLL(os.path.join(folder, "libgemm_bench.so"))
    library.gemm_bench_error.restype = ctypes.c_char_p
    library.gemm_bench_create.restype = ctypes.c_void_p
    library.gemm_bench_create.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_uint32,
                                          ctypes.c_int64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_int, ctypes.c_int]
    library.gemm_bench_launch.argtypes = [ctypes.c_void_p] * 7
    library.gemm_bench_destroy.argtypes = [ctypes.c_void_p]
    return library


class Engine:
    """One plan of ours; call() enqueues it."""

    def __init__(self, library, layout, groups, rows, n, k, dtype_c=BF16, accumulate=0, activation=0, keep=0):
        self.library = library
        self.plan = library.gemm_bench_create(b"sm90", layout, dtype_c, accumulate, groups, rows, n, k, activation, keep)
        if not self.plan:
            raise RuntimeError(library.gemm_bench_error().decode())

    def call(self, splits, a, b, c, act=None):
        stream = torch.cuda.current_stream().cuda_stream
        status = self.library.gemm_bench_launch(self.plan, splits.data_ptr(), a.data_ptr(), b.data_ptr(), c.data_ptr(),
                                                act.data_ptr() if act is not None else None, stream)
        if status:
            raise RuntimeError(self.library.gemm_bench_error().decode())

    def close(self):
        self.library.gemm_bench_destroy(self.plan)


def normal_splits(groups, rows, deviation, generator):
    drawn = torch.randn(groups, generator=generator) * deviation + rows
    splits = drawn.round().long()
    splits[-1] += groups * rows - splits.sum()
    return splits


def zipf_splits(groups, rows, generator):
    share = 1.0 / (torch.randperm(groups, generator=generator) + 1.0)
    splits = (share / share.sum() * groups * rows).round().long()
    splits[splits.argmax()] += groups * rows - splits.sum()
    return splits


def measure(candidates, rounds, flush, pause):
    times = {name: [] for name in candidates}
    for call in candidates.values():
        call()
        call()
    torch.cuda.synchronize()
    for _ in range(rounds):
        for name, call in candidates.items():
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            time.sleep(pause)
            flush.zero_()
            before.record()
            call()
            after.record()
            after.synchronize()
            times[name].append(before.elapsed_time(after))
    return {name: statistics.median(taken) for name, taken in times.items()}


def difference(x, y):
    x, y = x.double().flatten(), y.double().flatten()
    return (1 - 2 * (x @ y) / (x @ x + y @ y)).item()


def run_case(library, case, rounds, flush, pause, generator):
    name, groups, rows, k, n = case
    total = groups * rows
    x = torch.randn(total, k, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(total, n, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(groups, n, k, device="cuda", dtype=torch.bfloat16) * 0.02
    y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(w)
    act = torch.empty(total, n // 2, device="cuda", dtype=torch.bfloat16)
    kinds = {"even": torch.full((groups,), rows)}
    if rows == 512:
        kinds["real"] = normal_splits(groups, rows, 22, generator)
        kinds["zipf"] = zipf_splits(groups, rows, generator)
    splits = {kind: value.cuda() for kind, value in kinds.items()}
    ends = {kind: value.cumsum(0).int().cuda() for kind, value in kinds.items()}
    plans = {op: Engine(library, layout, groups, total, n, k) for op, layout in (("tn", TN), ("nn", NN), ("nt", NT))}
    plans["swiglu"] = Engine(library, TN, groups, total, n, k, activation=SWIGLU)
    plans["swiglu_keep"] = Engine(library, TN, groups, total, n, k, activation=SWIGLU, keep=1)

    def loop():
        for group in range(groups):
            torch.mm(x[group * rows:(group + 1) * rows], w[group].t(), out=y[group * rows:(group + 1) * rows])

    candidates = {}
    for kind in kinds:
        s, e = splits[kind], ends[kind]
        tag = "" if kind == "even" else "_" + kind
        candidates["tn" + tag] = lambda s=s: plans["tn"].call(s, x, w, y)
        candidates["tn_torch" + tag] = lambda e=e: torch._grouped_mm(x, w.transpose(-2, -1), offs=e)
        candidates["nn" + tag] = lambda s=s: plans["nn"].call(s, dy, w, dx)
        candidates["nt" + tag] = lambda s=s: plans["nt"].call(s, dy, x, dw)
        candidates["nt_torch" + tag] = lambda e=e: torch._grouped_mm(dy.t(), x, offs=e)
    candidates["nn_torch"] = lambda: torch._grouped_mm(dy, w, offs=ends["even"])
    candidates["tn_loop"] = loop
    candidates["swiglu"] = lambda: plans["swiglu"].call(splits["even"], x, w, y, act)
    candidates["swiglu_keep"] = lambda: plans["swiglu_keep"].call(splits["even"], x, w, y, act)
    for kind in kinds:
        tag = "" if kind == "even" else "_" + kind
        candidates["tn" + tag]()
        assert difference(y, torch._grouped_mm(x, w.transpose(-2, -1), offs=ends[kind])) < 1e-5, (name, kind, "tn")
        candidates["nn" + tag]()
        assert difference(dx, torch._grouped_mm(dy, w, offs=ends[kind])) < 1e-5, (name, kind, "nn")
        candidates["nt" + tag]()
        assert difference(dw, torch._grouped_mm(dy.t(), x, offs=ends[kind])) < 1e-5, (name, kind, "nt")
    taken = measure(candidates, rounds, flush, pause)
    flops = 2.0 * total * n * k
    speeds = {op: flops / ms / 1e9 for op, ms in taken.items()}
    weights = groups * n * k * 2 + total * (n + k) * 2
    print(json.dumps({"case": name, "tflops": {op: round(v, 1) for op, v in speeds.items()},
                      "of_ceiling": round(speeds["tn"] / CEILING, 3), "tn_tb_per_s": round(weights / taken["tn"] / 1e9, 2)}),
          flush=True)
    for plan in plans.values():
        plan.close()
    return speeds


def main():
    library = load(sys.argv[1])
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 9
    pause = float(sys.argv[3]) / 1e3 if len(sys.argv) > 3 else 0.0
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(2)
    flush = torch.empty(64 << 20, device="cuda", dtype=torch.int32)
    big = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.empty(1 << 31, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    base = measure({"gemm": lambda: big @ big, "copy": lambda: target.copy_(source)}, rounds, flush, pause)
    print("cublas 8192^3 %.0f TFLOP/s, copy %.2f TB/s" % (2 * 8192**3 / base["gemm"] / 1e9, 2 * 2**31 / base["copy"] / 1e9))
    del source, target, big
    table = {case[0]: run_case(library, case, rounds, flush, pause, generator) for case in SHAPES}
    columns = ["tn", "tn_torch", "tn_loop", "nn", "nn_torch", "nt", "nt_torch", "swiglu", "swiglu_keep", "tn_real",
               "tn_torch_real", "tn_zipf", "tn_torch_zipf", "nn_real", "nt_real", "nt_torch_real", "nt_zipf"]
    print("| case | " + " | ".join(columns) + " |")
    for name, speeds in table.items():
        print("| %s | " % name + " | ".join("%.0f" % speeds[c] if c in speeds else "" for c in columns) + " |")
    for ours, theirs in (("tn", "tn_torch"), ("nn", "nn_torch"), ("nt", "nt_torch")):
        ratios = [speeds[ours] / speeds[theirs] for speeds in table.values()]
        print("%s / %s: geometric mean %.3f, least %.3f" % (ours, theirs, statistics.geometric_mean(ratios), min(ratios)))


if __name__ == "__main__":
    main()
