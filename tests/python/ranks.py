"""Runs the ranks of a group: as threads with a client each, where one process is enough, or as processes."""

from __future__ import annotations

import itertools
import multiprocessing
import threading
import traceback

import epd

LIMIT_S = 60
DEADLINE_S = 20  # of a step in the tests that expect none

_names = itertools.count()


def fresh_name() -> str:
    """A group name that no other test uses."""
    return f"group-{next(_names)}"


def on_threads(n: int, body) -> list:
    """body(rank) on n threads; what they return. Raises the first failure, rather not one that another one caused."""
    results, failures = [None] * n, []

    def run(rank: int) -> None:
        try:
            results[rank] = body(rank)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive(), "a rank hangs"
    if failures:
        raise min(failures, key=lambda error: isinstance(error, epd.PeerLost))
    return results


def in_group(socket: str, n: int, body, **options) -> list:
    """body(group) on n threads, each rank with a client and a membership of its own."""
    name = fresh_name()
    options = {"n_experts": 2 * n, "top_k": 2, "hidden": 16, "max_tokens": 32, "deadline": DEADLINE_S} | options

    def run(rank: int):
        with epd.connect(socket) as client, client.join(name, n, rank, **options) as group:
            result = body(group)
            group.barrier()()  # nobody leaves while another one works
            return result

    return on_threads(n, run)


def _process_main(body, rank: int, args: tuple, pipe) -> None:
    try:
        pipe.send((True, body(rank, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def on_processes(n: int, body, *args, may_die: int | None = None) -> list:
    """body(rank, *args) in n fresh processes; what they returned, None for the rank that may be killed."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(n)]
    processes = [context.Process(target=_process_main, args=(body, rank, args, pipes[rank][1])) for rank in range(n)]
    results: list = [None] * n
    for process, (_, writer) in zip(processes, pipes, strict=True):
        process.start()
        writer.close()
    try:
        for rank, (reader, _) in enumerate(pipes):
            assert reader.poll(LIMIT_S), f"rank {rank} hangs"
            try:
                done, results[rank] = reader.recv()
            except EOFError:
                assert rank == may_die, f"rank {rank} died"
                continue
            assert done, f"rank {rank}:\n{results[rank]}"
    finally:
        for process in processes:
            process.join(5)
            process.kill()
            process.join()
    return results
