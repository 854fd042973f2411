"""Ranks as processes: one that is killed, a daemon that restarts, many at once, and memory over many steps."""

from __future__ import annotations

import os
import pathlib
import signal
import time

import epd
import numpy as np
import pytest
from ranks import in_group, on_processes
from values import given

SIZES = {"n_experts": 12, "top_k": 2, "hidden": 8, "ffn": 8, "max_tokens": 16, "deadline": 20}


def identity_exchange(group, value: float) -> None:
    """Dispatches rows of the value to two experts and combines them unweighted: twice the value."""
    idx, out = group.alloc((4, 2), "i32"), group.alloc((4, 8))
    idx[...] = (0, 11)
    recv_x = group.alloc((group.info.capacity_rows, 8))
    dispatch = group.dispatch(x=given(group, np.full((4, 8), value), "f32"), topk_idx=idx, recv_x=recv_x)
    combine = group.combine(dispatch, y=recv_x, out=out)
    for _ in range(3):
        dispatch()
        combine()
    assert (out == 2 * value).all()
    group.barrier()()


def killed_rank(rank: int, socket: str) -> str:
    with epd.connect(socket) as client:
        group = client.join("killed", 3, rank, **SIZES)
        identity_exchange(group, rank + 1.0)
        barrier = group.barrier()
        barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(epd.PeerLost, match="rank 1") as caught:
            while True:  # a step or two may still be before the daemon sees the hang-up
                barrier()
        assert time.monotonic() - begin < 10 and caught.value.rank == 1
        with pytest.raises(epd.PeerLost, match="rank 1"):
            barrier()
        group.leave()
        survivors = [0, 2]
        with client.join("survivors", 2, survivors.index(rank), **SIZES) as again:
            identity_exchange(again, rank + 1.0)
        return str(caught.value)


def test_a_killed_rank_is_named_to_the_others_and_they_go_on(socket):
    told = on_processes(3, killed_rank, socket, may_die=1)
    assert told[1] is None and "rank 1" in told[0] and "rank 1" in told[2]


def test_a_restarted_daemon_is_told_and_the_client_goes_on(own_daemon):
    with epd.connect(own_daemon.socket) as client:
        group = client.join("restart", 1, 0, **SIZES)
        barrier, kept = group.barrier(), group.alloc(3)
        barrier()
        kept[...] = 5
        boot_id = client.info.boot_id
        own_daemon.kill_worker()
        with pytest.raises((epd.Restarted, epd.Disconnected)) as caught:
            barrier()
        assert isinstance(caught.value, ConnectionError)
        with pytest.raises((epd.Restarted, epd.Disconnected)):
            group.alloc(3)
        client.reconnect(timeout=20)
        assert client.info.boot_id != boot_id
        with pytest.raises((epd.Restarted, epd.Disconnected)):
            barrier()  # what was made before stays lost
        group.leave()
        assert (kept == 5).all()
        with client.join("restart", 1, 0, **SIZES) as again:
            identity_exchange(again, 4.0)


def many_groups(rank: int, socket: str) -> int:
    """Six processes in a group of all, and three pairs beside it."""
    with epd.connect(socket) as client:
        with client.join("all", 6, rank, **SIZES) as every, client.join(f"pair-{rank // 2}", 2, rank % 2, **SIZES) as pair:
            for _ in range(5):
                identity_exchange(every, rank + 1.0)
                identity_exchange(pair, rank + 0.5)
        return client.info.session_id


def test_many_processes_and_groups_at_once(socket):
    assert len(set(on_processes(6, many_groups, socket))) == 6


def resident_kib(pid: int | str) -> int:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def n_mappings() -> int:
    return pathlib.Path("/proc/self/maps").read_text().count("\n")


def n_fds(pid: int | str) -> int:
    """Open descriptors; the fewest of a while, because the daemon closes what a client left a moment later."""
    counts = []
    for _ in range(10):
        counts.append(len(os.listdir(f"/proc/{pid}/fd")))
        time.sleep(0.02)
    return min(counts)


def training_steps(rank: int, socket: str, worker: int) -> dict[str, int]:
    """Growth over 1,000 forward and backward steps after 300 others, in KiB of memory and in descriptors."""
    with epd.connect(socket) as client, client.join("steps", 2, rank, **SIZES) as group:
        n, rng = group.info.n_local_experts, np.random.default_rng(rank)
        idx = group.alloc((16, 2), "i64")
        idx[...] = [rng.permutation(12)[:2] for _ in range(16)]
        x, out, dout, dx = (given(group, rng.standard_normal((16, 8)), "f32") for _ in range(4))
        w1, dw1 = (given(group, rng.standard_normal((n, 16, 8)), "f32") for _ in range(2))
        w2, dw2 = (given(group, rng.standard_normal((n, 8, 8)), "f32") for _ in range(2))
        weights = given(group, rng.random((16, 2)), "f32")
        forward = group.moe_forward(x=x, topk_idx=idx, topk_weights=weights, w1=w1, w2=w2, out=out, saved="context")
        backward = group.moe_backward(forward, dout=dout, dx=dx, dw1=dw1, dw2=dw2)
        before = {}
        for step in range(1300):
            if step == 300:
                before = {"client": resident_kib("self"), "worker": resident_kib(worker), "fds": n_fds("self") + n_fds(worker)}
            forward.set_tokens(step % 17)
            backward.set_tokens(step % 17)
            forward()
            backward()
        after = {"client": resident_kib("self"), "worker": resident_kib(worker), "fds": n_fds("self") + n_fds(worker)}
        group.barrier()()
    return {name: after[name] - before[name] for name in before}


def test_memory_does_not_grow_over_a_thousand_steps(own_daemon):
    for growth in on_processes(2, training_steps, own_daemon.socket, own_daemon.worker()):
        assert growth["client"] < 1024 and growth["worker"] < 1024 and growth["fds"] <= 0, growth


def test_buffers_plans_and_groups_that_come_and_go_leave_nothing(own_daemon):
    """Nothing is ended by hand here: the arrays and plans are dropped, every second group with them."""

    def life(group):
        for _ in range(4):
            m_splits = given(group, np.array([3]), "i64")
            a, b, c = group.alloc((3, 256)), group.alloc((1, 256, 256)), group.alloc((3, 256))
            group.grouped_gemm("TN", a=a, b=b, c=c, m_splits=m_splits)()

    with epd.connect(own_daemon.socket) as client:
        begin = None
        for round_ in range(120):
            if round_ == 20:
                begin = n_mappings(), n_fds("self"), n_fds(own_daemon.worker()), resident_kib(own_daemon.worker())
            group = client.join("come-and-go", 1, 0, **SIZES)
            life(group)
            if round_ % 2:
                group.leave()
            del group
        mappings, fds, worker_fds, worker_kib = begin
        assert n_mappings() - mappings < 10 and n_fds("self") <= fds
        assert n_fds(own_daemon.worker()) <= worker_fds and resident_kib(own_daemon.worker()) - worker_kib < 2048


def test_a_launch_costs_the_host_little(socket):
    """Not a benchmark: catches a round trip, a copy or a check per launch that does not belong there."""

    def body(group):
        plan = group.barrier()
        times = []
        for _ in range(300):
            begin = time.perf_counter()
            plan.launch()
            times.append(time.perf_counter() - begin)
            plan.wait()
        return float(np.median(times))

    assert in_group(socket, 1, body)[0] < 1e-3
