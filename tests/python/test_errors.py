"""What users do wrong and what ranks do to each other: every error is of its class and says what was given."""

from __future__ import annotations

import os
import pickle
import re
import threading
import time

import epd
import numpy as np
import pytest
from ranks import fresh_name, in_group, on_threads
from values import given

SIZES = {"n_experts": 4, "top_k": 2, "hidden": 8, "ffn": 8, "max_tokens": 16}


def failing(kind, *words):
    """pytest.raises of the class with all words in the text, in any order."""
    return pytest.raises(kind, match="".join(f"(?=.*{re.escape(str(word))})" for word in words) or None)


def gemm(group, **changed):
    """A grouped_gemm TN of two groups, [7, 16] x [2, 8, 16], with some arguments replaced."""
    m_splits = group.alloc((2,), "i64")
    m_splits[...] = (3, 4)
    arguments = {"a": group.alloc((7, 16)), "b": group.alloc((2, 8, 16)), "c": group.alloc((7, 8)), "m_splits": m_splits}
    layout = changed.pop("layout", "TN")
    return group.grouped_gemm(layout, **(arguments | changed))


def test_how_messages_cross_is_chosen_by_ops_that_cross(socket):
    def body(group):
        idx = group.alloc((4, 2), "i32")
        idx[...] = (0, 3)
        tensors = {"x": group.alloc((4, 8)), "topk_idx": idx, "recv_x": group.alloc((group.info.capacity_rows, 8))}
        for crossing in ("static", epd.Crossing.EAGER):  # of no effect in a group of one node
            group.dispatch(**tensors, crossing=crossing)()
        with failing(epd.InvalidArgument, "crossing", "eager, static"):
            group.dispatch(**tensors, crossing="fast")
        with failing(epd.InvalidArgument, "barrier", "crossing"):
            group.plan("barrier", crossing="static")

    in_group(socket, 2, body, **SIZES)


def test_wrong_tensors_name_the_tensor_and_the_property(socket):
    def body(group):
        cases = [
            (epd.InvalidShape, {"c": group.alloc((6, 8))}, ("c", 6, 7)),
            (epd.InvalidShape, {"b": group.alloc((2, 8, 15))}, (15, 16)),
            (epd.InvalidShape, {"a": group.alloc((7, 4, 4))}, ("a", "3 dimensions", 2)),
            (epd.InvalidShape, {"a": group.alloc((7, 1, 1, 16))}, ("a", "4 dimensions")),
            (epd.InvalidShape, {"bias": group.alloc((2, 9))}, ("bias", 9, 8)),
            (epd.InvalidDtype, {"b": group.alloc((2, 8, 16), "bf16")}, ("b", "bf16", "f32")),
            (epd.InvalidDtype, {"m_splits": group.alloc((2,), "i32")}, ("m_splits", "i32", "i64")),
            (epd.InvalidDtype, {"a": group.alloc((7, 16)).view(np.uint32)}, ("a", "uint32", "float32")),
            (epd.InvalidArgument, {"a": group.alloc((16, 7)).T}, ("a", "strides", "C-contiguous")),
            (epd.InvalidArgument, {"a": np.zeros((7, 16), np.float32)}, ("a", "Group.alloc")),
            (epd.InvalidArgument, {"a": [[0.0]]}, ("a[0]", "list", "numpy array")),
            (epd.InvalidArgument, {"a": None}, ("a", "not bound")),
            (epd.InvalidArgument, {"b": [group.alloc((8, 16))]}, ("b", 1, 2)),
            (epd.InvalidArgument, {"b": []}, ("b", "empty list")),
            (epd.InvalidArgument, {"layout": "TT"}, ("layout", "TT", "tn, nn, nt")),
            (epd.InvalidArgument, {"accumulate": True}, ("accumulate",)),
        ]
        for kind, changed, words in cases:
            with failing(kind, *words) as caught:
                gemm(group, **changed)
            assert type(caught.value) is kind and isinstance(caught.value, ValueError)
        raw = group.alloc_buffer(7 * 16 * 4 + 8)
        with failing(epd.InvalidAlignment, "a", 2):
            gemm(group, a=raw.array((7, 16), "f32", offset=2))
        with failing(epd.InvalidArgument, "dx", "grouped_gemm"):
            group.plan("grouped_gemm", layout="TN", dx=group.alloc((1, 1)))
        with failing(epd.InvalidArgument, "nonsense", "unknown role"):
            group.plan("barrier", nonsense=group.alloc(1))
        with failing(epd.InvalidArgument, "op", "'multiply'", "moe_forward"):
            group.plan("multiply")
        gemm(group)()  # after all of it the right one works

    in_group(socket, 1, body)


def test_a_failed_step_says_who_and_what_and_the_next_one_works(socket):
    def body(group):
        topk_idx = group.alloc((4, 2), "i64")
        topk_idx[...] = (0, 1)
        if group.info.rank == 1:
            topk_idx[2, 1] = 77
        recv_x = group.alloc((group.info.capacity_rows, 8))
        plan = group.dispatch(x=group.alloc((4, 8)), topk_idx=topk_idx, recv_x=recv_x)
        with failing(epd.BadRouting, 77, "token 2") as caught:
            plan()
        assert caught.value.rank == 1 and caught.value.phase is epd.Phase.ROUTE and caught.value.seq == 1
        assert caught.value.status is epd.Status.BAD_ROUTING
        topk_idx[...] = (0, 1)
        plan()
        assert plan.info.failed_launches == 1 and plan.info.launches == 2

    in_group(socket, 2, body, **SIZES)


def test_bad_splits_and_capacity_overflow_are_told(socket):
    def splits(group):
        m_splits = group.alloc((2,), "i64")
        plan = gemm(group, m_splits=m_splits)
        for bad in ((3, 5), (-1, 2)):
            m_splits[...] = bad
            with pytest.raises(epd.BadSplits):
                plan()

    def overflow(group):
        topk_idx = group.alloc((16, 2), "i64")
        topk_idx[...] = (0, 1)
        plan = group.dispatch(x=group.alloc((16, 8)), topk_idx=topk_idx, recv_x=group.alloc((20, 8)))
        with failing(epd.CapacityOverflow, 32, 20) as caught:
            plan()
        assert caught.value.rank == 0

    in_group(socket, 1, splits)
    in_group(socket, 1, overflow, **(SIZES | {"capacity_rows": 20}))
    in_group(socket, 1, lambda group: None, **(SIZES | {"capacity_rows": 20, "overflow": "drop"}))


@pytest.mark.parametrize(
    ("changed", "kind", "words"),
    [
        ({"n_experts": 5}, epd.InvalidArgument, ("n_experts", 5)),
        ({"alignment": 3}, epd.InvalidArgument, ("alignment", 3)),
        ({"dtype": "i32"}, epd.InvalidArgument, ("dtype",)),
        ({"dtype": np.float64}, epd.InvalidDtype, ("dtype", "float64")),
        ({"hidden": -1}, epd.InvalidArgument, ("hidden", -1)),
        ({"hidden": 2**32 + 8}, epd.InvalidArgument, ("hidden", 2**32 + 8)),
        ({"top_k": 99}, epd.InvalidArgument, ("top_k", 99)),
        ({"overflow": "explode"}, epd.InvalidArgument, ("overflow", "'explode'", "drop")),
        ({"device": 99}, epd.InvalidDevice, ("device", 99)),
        ({"rank": 2}, epd.InvalidArgument, ("rank", 2)),
        ({"n_nodes": 2}, epd.Unsupported, ("n_nodes", 2, "fabric")),
        ({"n_nodes": -1}, epd.InvalidArgument, ("n_nodes", -1)),
        ({"deadline": -1.0}, epd.InvalidArgument, ("deadline", -1.0)),
        ({"world_size": None}, epd.InvalidArgument, ("world_size", "$WORLD_SIZE")),
    ],
)
def test_a_wrong_join_names_the_field(socket, changed, kind, words):
    with epd.connect(socket) as client, failing(kind, *words):
        client.join(fresh_name(), **({"world_size": 2, "rank": 0} | SIZES | changed))


def test_ranks_that_disagree_all_learn_the_field(socket):
    name = fresh_name()

    def body(rank):
        with epd.connect(socket) as client, failing(epd.GroupMismatch, "hidden", 40, 32):
            client.join(name, 2, rank, **(SIZES | {"hidden": (32, 40)[rank]}))

    on_threads(2, body)


def test_no_nodes_and_one_node_are_the_same(socket):
    name = fresh_name()

    def body(rank):
        with epd.connect(socket) as client, client.join(name, 2, rank, **(SIZES | {"n_nodes": rank})) as group:
            assert group.info.world_size == 2
            group.barrier()()

    on_threads(2, body)


def test_torchrun_environment_gives_the_defaults(socket, monkeypatch):
    monkeypatch.setenv("EPD_SOCKET", socket)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with epd.connect(name="torchrun") as client, client.join(fresh_name(), **SIZES) as group:
        assert (group.info.world_size, group.info.rank, group.info.device_idx) == (1, 0, client.devices[3].index)
    monkeypatch.setenv("RANK", "first")
    with epd.connect() as client, failing(epd.InvalidArgument, "$RANK", "'first'"):
        client.join(fresh_name(), **SIZES)


def test_device_is_taken_by_place_uuid_or_itself(socket):
    with epd.connect(socket) as client:
        for device in (2, client.devices[2], client.devices[2].uuid):
            with client.join(fresh_name(), 1, 0, device=device, **SIZES) as group:
                assert group.info.device_uuid == client.devices[2].uuid


def test_a_missing_rank_is_named_at_the_deadline(socket):
    late = threading.Event()

    def body(group):
        plan = group.barrier()
        if group.info.rank == 1:
            late.wait(20)
            return
        begin = time.monotonic()
        plan.launch()
        with failing(epd.Busy):
            plan.launch()
        with failing(epd.Timeout, "in flight") as caught:
            plan.wait(timeout=0.05)
        assert caught.value.rank is None
        with failing(epd.Timeout, "rank 1") as caught:
            plan.wait()  # of the group's deadline, longer than one turn of the wait
        assert 0.45 < time.monotonic() - begin < 10
        assert caught.value.rank == 1 and caught.value.phase is epd.Phase.GATHER and isinstance(caught.value, TimeoutError)
        late.set()

    name = fresh_name()

    def run(rank):
        with epd.connect(socket) as client, client.join(name, 2, rank, deadline=0.5, **SIZES) as group:
            body(group)

    on_threads(2, run)


def test_waiting_lets_other_threads_run(socket):
    ticks = []

    def body(group):
        plan = group.barrier()
        if group.info.rank == 0:
            plan()
            return
        begin = time.monotonic()
        while time.monotonic() - begin < 0.4:
            ticks.append(time.monotonic())
            time.sleep(0.01)
        plan()

    in_group(socket, 2, body, **SIZES)
    assert len(ticks) > 20 and max(np.diff(ticks)) < 0.15


def test_other_order_and_other_plans_are_told(socket):
    def order(rank, group):
        plans = group.barrier(), group.barrier()
        with pytest.raises(epd.SeqMismatch):
            plans[rank]()

    def plans(rank, group):
        with failing(epd.PlanMismatch, "barrier", "dispatch"):
            if rank == 0:
                group.barrier()
            else:
                idx, recv_x = group.alloc((4, 2), "i32"), group.alloc((group.info.capacity_rows, 8))
                group.dispatch(x=group.alloc((4, 8)), topk_idx=idx, recv_x=recv_x)

    for body in (order, plans):
        name = fresh_name()

        def run(rank, body=body, name=name):
            with epd.connect(socket) as client, client.join(name, 2, rank, deadline=5, **SIZES) as group:
                body(rank, group)

        on_threads(2, run)


def test_memfd_is_taken_only_sealed_and_in_range_and_results_alias_it(socket):
    import fcntl
    import mmap

    def body(group):
        fd = os.memfd_create("mine", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, 65536)
        with failing(epd.InvalidArgument, "seal"):
            group.register_memfd(fd)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        with failing(epd.OutOfRange, 4096, 65536):
            group.register_memfd(fd, 4096, 65536)
        mine = mmap.mmap(fd, 65536)
        buffer = group.register_memfd(fd, offset=4096 + 16)
        os.close(fd)
        assert buffer.nbytes == 65536 - 4096 - 16
        m_splits = group.alloc(1, "i64")
        m_splits[0] = 2
        dy, x = given(group, np.array([[1.0], [2.0]]), "f32"), given(group, np.array([[3.0, 4.0], [5.0, 6.0]]), "f32")
        dw = buffer.array((1, 1, 2), "f32", offset=32)
        group.grouped_gemm("NT", a=dy, b=x, c=dw, m_splits=m_splits)()
        assert dw.ravel().tolist() == [13, 16]
        assert np.frombuffer(mine, np.float32, 2, 4096 + 16 + 32).tolist() == [13, 16]
        with failing(epd.InvalidArgument, "register_memfd", "fd -1"):
            group.register_memfd(-1)

    in_group(socket, 1, body, **SIZES)


def test_memory_of_another_group_or_client_is_refused(socket):
    with epd.connect(socket) as mine, epd.connect(socket) as other:
        group, foreign = (client.join(fresh_name(), 1, 0, **SIZES) for client in (mine, other))
        with failing(epd.ForeignId, "a"):
            gemm(group, a=foreign.alloc((7, 16)))
        with failing(epd.ForeignId, "context"):
            group.plan("combine", context=foreign.barrier(), y=group.alloc((1, 8)), out=group.alloc((1, 8)))


def test_no_daemon_and_no_library_are_told_with_the_path(tmp_path, monkeypatch):
    path = str(tmp_path / "absent.sock")
    with failing(epd.Disconnected, path) as caught:
        epd.connect(path, timeout=0.05)
    assert isinstance(caught.value, ConnectionError)
    with failing(epd.InvalidArgument, "client_name", 100):
        epd.connect(path, name="n" * 100)
    monkeypatch.setenv("EPD_LIBRARY", str(tmp_path / "libepd.so"))
    with pytest.raises(epd.LibraryNotFound, match="EPD_LIBRARY.*libepd.so"):
        epd.connect(path)
    monkeypatch.setenv("EPD_LIBRARY", "libc.so.6")
    with pytest.raises(epd.LibraryNotFound, match="libc.so.6"):
        epd.connect(path)


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(epd.PeerLost("rank 3 is gone", rank=3, phase=epd.Phase.GATHER, seq=7)))
    assert type(error) is epd.PeerLost and str(error) == error.text == "rank 3 is gone"
    assert (error.rank, error.phase, error.seq, error.status) == (3, epd.Phase.GATHER, 7, epd.Status.PEER_LOST)
    assert type(pickle.loads(pickle.dumps(epd.Timeout("late")))) is epd.Timeout
    from epd.errors import error_of

    assert isinstance(error_of(999, "of a newer library"), epd.Internal)


def test_stats_and_info_tell_about_the_session(socket):
    with epd.connect(socket, name="statistician") as client, client.join(fresh_name(), 1, 0, **SIZES) as group:
        assert client.info.backend is epd.Backend.HOST and len(client.devices) == 4 and client.library_version == "0.1.0"
        group.barrier()()
        stats = client.stats()
        assert isinstance(stats, dict) and group.name in str(stats)


def test_what_belongs_to_gpus_says_so_on_the_host_backend(socket):
    def body(group):
        barrier = group.barrier()
        calls = {
            "epd_buffer_register_cuda": lambda: group.register_cuda(4096, 16),
            "epd_memory_range": lambda: group.memory_range(4096),
            "epd_plan_step": lambda: barrier.step(0, None, 0, 0),
            "epd_plan_capture": lambda: barrier.capture(0),
            "epd_plan_arm": lambda: barrier.arm(),
        }
        for name, call in calls.items():
            with failing(epd.Unsupported, name, "CUDA backend"):
                call()
        barrier()
        barrier.check()

    in_group(socket, 1, body)


def test_a_failed_step_is_found_by_check_once(socket):
    def body(group):
        idx, x = group.alloc((1, 2), "i32"), group.alloc((1, 8))
        idx[...] = (0, 99)
        dispatch = group.dispatch(x=x, topk_idx=idx, recv_x=group.alloc((group.info.capacity_rows, 8)))
        dispatch.launch()
        for _ in range(1000):
            try:
                dispatch.check()
            except epd.BadRouting as error:
                assert error.rank == 0 and "99" in str(error)
                break
            time.sleep(0.01)
        else:
            raise AssertionError("a bad routing was not told")
        dispatch.check()
        dispatch.wait()

    in_group(socket, 1, body, **SIZES)
