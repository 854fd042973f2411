"""Who keeps whom, in which order things may end, and what happens to those who come too late."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time

import epd
import numpy as np
import pytest
from ranks import fresh_name
from values import given

SIZES = {"n_experts": 4, "top_k": 2, "hidden": 8, "ffn": 8, "max_tokens": 16, "deadline": 20}


@pytest.fixture
def client(socket):
    with epd.connect(socket) as client:
        yield client


@pytest.fixture
def group(client):
    with client.join(fresh_name(), 1, 0, **SIZES) as group:
        yield group


def double(group, values):
    """A plan that computes c = 2 a by a grouped GEMM, and c."""
    n = values.shape[1]
    m_splits = given(group, np.array([len(values)]), "i64")
    c = group.alloc(values.shape)
    b = given(group, 2 * np.eye(n)[None], "f32")
    return group.grouped_gemm("TN", a=given(group, values, "f32"), b=b, c=c, m_splits=m_splits), c


def n_native(group) -> int:
    """Buffers and plans of the group that the library has."""
    return len(group._handle._children)


def test_a_plan_keeps_its_tensors_and_an_array_its_buffer(group):
    values = np.arange(12.0).reshape(3, 4)
    plan, c = double(group, values)
    tail = group.alloc((1000,))[500:]
    gc.collect()
    plan()
    assert (c == 2 * values).all() and n_native(group) == 6
    tail[...] = 3  # its buffer is there as long as any view
    del plan, tail
    assert n_native(group) == 1
    assert (c == 2 * values).all()
    del c
    assert n_native(group) == 0


def test_views_are_tensors_too(group):
    pool = group.alloc((10, 4))
    pool[...] = np.arange(40).reshape(10, 4)
    m_splits, out = given(group, np.array([2]), "i64"), group.alloc((10, 4))
    group.grouped_gemm("TN", a=pool[3:5], b=given(group, np.eye(4)[None], "f32"), c=out[6:8], m_splits=m_splits)()
    assert (out[6:8] == pool[3:5]).all() and not out[:6].any() and not out[8:].any()
    b, c = group.alloc((1, 3, 8)), group.alloc((2, 3))
    group.grouped_gemm("TN", a=pool.reshape(5, 8)[:2], b=b, c=c, m_splits=m_splits)()


def test_cycles_are_collected_without_a_trace(group):
    class Holder:
        pass

    for _ in range(3):
        holder = Holder()
        holder.plan, holder.c = double(group, np.ones((2, 2)))
        holder.again = holder
    del holder
    gc.collect()
    assert n_native(group) == 0


def test_release_is_refused_while_a_plan_is_bound(group):
    buffer = group.alloc_buffer(64)
    b, c, m_splits = group.alloc((1, 4, 4)), group.alloc((4, 4)), given(group, np.array([4]), "i64")
    a = buffer.array((4, 4))
    plan = group.grouped_gemm("TN", a=a, b=b, c=c, m_splits=m_splits)
    with pytest.raises(epd.InUse, match="buffer of 64 bytes: .* bound"):
        buffer.release()
    plan()
    plan.destroy()
    plan.destroy()
    a[...] = 5
    buffer.release()
    buffer.release()
    assert (a == 5).all()  # still mapped
    with pytest.raises(epd.Closed, match="plan grouped_gemm"):
        plan()
    with pytest.raises(epd.Closed, match="buffer of 64 bytes"):
        buffer.array((4, 4))
    with pytest.raises(epd.Closed, match="buffer of 64 bytes"):
        group.grouped_gemm("TN", a=a, b=b, c=c, m_splits=m_splits)


def test_a_destroyed_context_plan_stays_until_its_users_go(group):
    idx = group.alloc((4, 2), "i32")
    idx[...] = (0, 1)
    rows = group.info.capacity_rows
    x, recv_x, out = given(group, np.ones((4, 8)), "f32"), group.alloc((rows, 8)), group.alloc((4, 8))
    dispatch = group.dispatch(x=x, topk_idx=idx, recv_x=recv_x)
    combine = group.combine(dispatch, y=recv_x, out=out)
    dispatch()
    dispatch.destroy()
    combine()
    assert (out == 2).all()


@pytest.mark.parametrize("how", ["leave", "close"])
def test_use_after_the_end_raises_and_arrays_stay_readable(socket, how):
    client = epd.connect(socket)
    group = client.join(fresh_name(), 1, 0, **SIZES)
    plan, c = double(group, np.ones((2, 3)))
    buffer = group.alloc_buffer(64)
    plan()
    client.close() if how == "close" else group.leave()
    for use in (
        plan,
        plan.launch,
        plan.wait,
        group.barrier,
        lambda: group.alloc(3),
        lambda: buffer.array((2,)),
        lambda: plan.info,
    ):
        with pytest.raises(epd.Closed, match="used after its end"):
            use()
    assert (c == 2).all()
    c[...] = 7
    for end in (plan.destroy, buffer.release, group.leave, client.close):
        end()
    assert client.closed and (c == 7).all()
    with pytest.raises(epd.Closed, match="client"):
        client.stats()


def test_everything_may_be_dropped_in_any_order(socket):
    for order in ("client group plan", "plan group client", "group plan client"):
        alive = {"client": epd.connect(socket)}
        alive["group"] = alive["client"].join(fresh_name(), 1, 0, **SIZES)
        alive["plan"], c = double(alive["group"], np.ones((2, 3)))
        for name in order.split():
            del alive[name]
            gc.collect()
        assert not c.any()
        del c


def test_a_wait_ends_when_another_thread_closes_the_client(socket):
    name, seen = fresh_name(), []
    clients = [epd.connect(socket) for _ in range(2)]
    groups = [None, None]

    def join(rank):
        groups[rank] = clients[rank].join(name, 2, rank, **SIZES)
        groups[rank] = groups[rank], groups[rank].barrier()

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def wait():
        try:
            groups[0][1]()  # rank 1 never comes
        except epd.Error as error:
            seen.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.3)
    begin = time.monotonic()
    clients[0].close()
    waiter.join()
    assert time.monotonic() - begin < 5 and isinstance(seen[0], epd.Closed)
    clients[1].close()


def test_threads_may_share_a_plan_and_end_it_under_each_other(socket):
    """Launches, waits, allocations and the close of the client from many threads: errors, but no crash."""
    for _ in range(5):
        client = epd.connect(socket)
        group = client.join(fresh_name(), 1, 0, **SIZES)
        plan, _ = double(group, np.ones((2, 3)))
        unexpected = []

        def work(plan=plan, group=group, unexpected=unexpected):
            while True:
                try:
                    group.alloc(100)
                    plan()
                except epd.Busy:
                    continue
                except epd.Closed:
                    return
                except BaseException as error:
                    unexpected.append(error)
                    return

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        client.close()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert not unexpected


ENDS_AS_IT_IS = """
import sys, threading, numpy, epd
client = epd.connect(sys.argv[1])
sizes = dict(n_experts=2, top_k=1, hidden=8, max_tokens=8, deadline=20)
groups = []
other = threading.Thread(target=lambda: groups.append(epd.connect(sys.argv[1]).join(sys.argv[2], 2, 1, **sizes)))
other.start()
group = client.join(sys.argv[2], 2, 0, **sizes)
other.join()
plans = []
other = threading.Thread(target=lambda: plans.append(groups[0].barrier()))
other.start()
plan = group.barrier()
other.join()
threading.Thread(target=plan, daemon=True).start()  # waits for a rank that never comes
x = group.alloc((8, 8))
print("end")
"""


def test_a_program_may_end_without_closing_anything(socket):
    begin = time.monotonic()
    command = [sys.executable, "-c", ENDS_AS_IT_IS, socket, fresh_name()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
    assert time.monotonic() - begin < 15


def test_a_forked_child_is_refused_and_does_not_end_the_parents_objects(client, group):
    plan, c = double(group, np.ones((2, 3)))
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            plan()
        except epd.InvalidArgument as error:
            code = 0 if "fork" in str(error) else 2
        finally:
            client.close()
            del plan, c
            gc.collect()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    plan()
    assert (c == 2).all()


def test_an_interrupt_reaches_a_long_wait_and_the_step_may_be_waited_for_again(socket):
    import signal

    name = fresh_name()
    release = threading.Event()

    def other():
        with epd.connect(socket) as client, client.join(name, 2, 1, **SIZES) as group:
            plan = group.barrier()
            release.wait(20)
            plan()
            group.barrier()()

    thread = threading.Thread(target=other)
    thread.start()
    with epd.connect(socket) as client, client.join(name, 2, 0, **SIZES) as group:
        plan = group.barrier()
        plan.launch()
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            plan.wait()
        assert time.monotonic() - begin < 5
        release.set()
        plan.wait()
        group.barrier()()
    thread.join()
