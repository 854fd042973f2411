"""Runs the cases of torch_cases on GPUs: a daemon with the CUDA backend, one process per GPU, a table.

    EPD_BINARY=... EPD_LIBRARY=... PYTHONPATH=client/python python3 tests/python/torch_gpu.py [--ranks N] [--out DIR] [CASE...]

A rank is started as torchrun starts it (RANK, LOCAL_RANK, WORLD_SIZE); torchrun itself may start them too: then the daemon's
socket is taken from EPD_SOCKET. Without --ranks there are four, or two where there are fewer GPUs. Exit code 77, with the
reason, where there are not enough GPUs or no PyTorch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import traceback

SKIPPED = 77
START_S = 60


def cases(args: argparse.Namespace):
    """The cases with one of the names, or all, but for those left out."""
    from torch_cases import adapters, cuda, grouped, moe

    known = moe.CASES + grouped.CASES + adapters.CASES + cuda.CASES
    chosen = [case for case in known if not args.cases or any(name in case.__name__ for name in args.cases)]
    return [case for case in chosen if not any(name in case.__name__ for name in args.without)]


def run_rank(args: argparse.Namespace) -> int:
    """All cases on this rank; one JSON line for each."""
    import epd
    import torch
    from torch_cases.rank import Rank

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    torch.cuda.init()
    n_failed = 0
    with open(os.path.join(args.out, f"rank{rank}.jsonl"), "w") as results:
        for number, case in enumerate(cases(args)):
            begin, failure = time.monotonic(), ""
            try:
                with epd.connect(timeout=START_S) as client:
                    case(Rank(client, rank, world, f"case-{number}"))
                    torch.cuda.synchronize()
            except Exception as error:
                n_failed += 1
                failure = f"{type(error).__name__}: {error}"
                traceback.print_exc()
            line = {"case": case.__name__, "seconds": round(time.monotonic() - begin, 2), "failure": failure}
            print(json.dumps(line), file=results, flush=True)
    return n_failed > 0


def start_daemon(args: argparse.Namespace, directory: str) -> tuple[subprocess.Popen, str]:
    """The daemon, as soon as it takes connections."""
    import socket

    path = os.path.join(directory, "epd.sock")
    command = [os.environ["EPD_BINARY"], "--backend", "cuda", "--socket", path]
    command += ["--control-socket", os.path.join(directory, "control.sock")]
    with open(os.path.join(args.out, "daemon.log"), "wb") as log:
        daemon = subprocess.Popen(command, stdout=log, stderr=log)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and daemon.poll() is None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            if probe.connect_ex(path) == 0:
                return daemon, path
        time.sleep(0.05)
    daemon.kill()
    raise SystemExit("the daemon does not start:\n" + pathlib.Path(args.out, "daemon.log").read_text())


def run_all(args: argparse.Namespace) -> int:
    directory = tempfile.mkdtemp(prefix="epd-torch-")
    daemon, path = start_daemon(args, directory)
    ranks = []
    for rank in range(args.ranks):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(args.ranks),
            "EPD_SOCKET": path,
        }
        with open(os.path.join(args.out, f"rank{rank}.log"), "wb") as log:
            command = [sys.executable, __file__, "--as-rank", "--out", args.out, *args.cases]
            for name in args.without:
                command += ["--without", name]
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    deadline = time.monotonic() + args.limit
    for process in ranks:
        try:
            process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            for each in ranks:
                each.kill()
    daemon.terminate()
    try:
        ended = daemon.wait(30)
    except subprocess.TimeoutExpired:
        daemon.kill()
        ended = "timeout"
    return table(args, [process.wait() for process in ranks], ended)


def table(args: argparse.Namespace, codes: list[int], daemon_code: object) -> int:
    """Prints one line for each case; the first failure of each in words."""
    found: dict[str, list[dict]] = {}
    for rank in range(args.ranks):
        path = pathlib.Path(args.out, f"rank{rank}.jsonl")
        for line in path.read_text().splitlines() if path.exists() else []:
            result = json.loads(line)
            found.setdefault(result["case"], []).append(result)
    n_failed = 0
    for case, results in found.items():
        failures = [result["failure"] for result in results if result["failure"]]
        n_wanted = args.ranks - case.startswith("a_killed_rank")
        good = len(results) == n_wanted and not failures
        n_failed += not good
        word = "ok" if good else f"FAILED ({len(results)} of {args.ranks} ranks came to it)"
        print(f"{case:60s} {max(result['seconds'] for result in results):6.2f} s  {word}")
        for failure in failures[: 1 if good else 2]:
            print(f"    {failure[:300]}")
    print(f"ranks ended with {codes}, the daemon with {daemon_code}; {len(found)} cases, {n_failed} failed")
    if any(case.startswith("a_killed_rank") for case in found) and codes[1] == -signal.SIGKILL:
        codes[1] = 0
    return int(n_failed > 0 or any(codes) or daemon_code != 0 or not found)


def missing(args: argparse.Namespace) -> str | None:
    if sys.version_info < (3, 10):  # noqa: UP036
        return "this is Python {}.{}, the package needs 3.10".format(*sys.version_info)
    if importlib.util.find_spec("torch") is None:
        return "no PyTorch"
    import torch

    n = torch.cuda.device_count()
    args.ranks = args.ranks or (4 if n >= 4 else 2)
    return f"{n} GPUs, want {args.ranks}" if n < args.ranks else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=0, help="one per GPU (default: 4 if there are as many GPUs, else 2)")
    parser.add_argument("--out", help="where logs go (default: a new directory)")
    parser.add_argument("--limit", type=float, default=280, help="seconds until all ranks are killed")
    parser.add_argument(
        "--without", action="append", default=[], metavar="CASE", help="leaves cases out, by parts of their names"
    )
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("cases", nargs="*", help="parts of the names of cases")
    args = parser.parse_args()
    args.out = args.out or tempfile.mkdtemp(prefix="epd-torch-out-")
    os.makedirs(args.out, exist_ok=True)
    if args.as_rank or "RANK" in os.environ:
        return run_rank(args)
    reason = missing(args)
    if reason:
        print(f"skipped: {reason}")
        return SKIPPED
    return run_all(args)


if __name__ == "__main__":
    sys.exit(main())
