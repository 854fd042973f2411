"""Times on the GPU of the slowest rank, as epd-bench takes them: a kernel of the caller before each iteration, events around it.

A peer whose call waits on the host for a count from the device pays for it here as it does for its users.
"""

import torch
import torch.distributed as dist

# What the stream does before each iteration; about 50 us at 1.98 GHz.
CLIENT_KERNEL_CYCLES = 100_000


def measure(run, iterations, warmup, prepare=None):
    """[iterations] microseconds: of each iteration the slowest rank's. `prepare` is not timed; its result goes to `run`."""
    align = torch.zeros(1, device="cuda")
    marks = []
    for i in range(warmup + iterations):
        given = prepare() if prepare else None
        dist.all_reduce(align)
        torch.cuda._sleep(CLIENT_KERNEL_CYCLES)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        if prepare:
            run(given)
        else:
            run()
        end.record()
        if i >= warmup:
            marks.append((begin, end))
    torch.cuda.synchronize()
    times = torch.tensor([begin.elapsed_time(end) * 1000 for begin, end in marks], device="cuda")
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    return times.tolist()


def summary(times):
    """The numbers of an epd-bench line."""
    times = sorted(times)
    at = lambda share: times[min(len(times) - 1, max(0, -(-int(share * 100) * len(times) // 100) - 1))]
    return {
        "median_us": at(0.5), "p10_us": at(0.1), "p90_us": at(0.9), "p99_us": at(0.99), "min_us": times[0],
        "iterations": len(times),
    }
