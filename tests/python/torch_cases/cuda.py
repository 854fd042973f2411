"""What only a GPU can show: streams, graphs, addresses that come and go, memory over many steps."""

from __future__ import annotations

import gc
import os
import signal
import time

import epd
import epd.torch
import torch

from . import oracle
from .moe import SIZES, compare, load, sized, step
from .rank import Rank


def other_streams_are_followed(rank: Rank) -> None:
    inputs = sized(70, rank, [150] * rank.world)
    want = oracle.run(inputs, rank.rank)
    with rank.group(**SIZES) as group:
        module = epd.torch.MoE(group)
        load(module, inputs, rank)
        streams = [torch.cuda.Stream(rank.device) for _ in range(2)]
        torch.cuda.synchronize()
        for i in range(6):
            stream = streams[i % 2]
            with torch.cuda.stream(stream):
                torch.cuda._sleep(2_000_000)  # what comes before the layer in its stream is late
                got = step(module, inputs, rank)
            stream.synchronize()
            compare(got, module, want, rank)


def a_graph_replays_with_other_counts(rank: Rank) -> None:
    tokens = [64] * rank.world
    batches = [sized(80 + i, rank, tokens) for i in range(3)]
    batches[2].idx = [torch.where(idx >= 0, idx % 2, idx) for idx in batches[2].idx]  # all to the first two experts
    for idx in batches[2].idx:  # an expert comes once in a token
        idx[:, 1:] = -1
    for batch in batches[1:]:
        batch.w1, batch.w2 = batches[0].w1, batches[0].w2
    with rank.group(**SIZES) as group:
        module = epd.torch.MoE(group)
        load(module, batches[0], rank)
        x = batches[0].x[rank.rank].clone().requires_grad_()
        weights = batches[0].weights[rank.rank].clone().requires_grad_()
        idx, dout = batches[0].idx[rank.rank].clone(), batches[0].dout[rank.rank].clone()

        def run() -> list[torch.Tensor]:
            out = module(x, idx, weights)
            return [out, *torch.autograd.grad(out, [x, weights, module.w1, module.w2], dout)]

        side = torch.cuda.Stream(rank.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = epd.torch.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run()
        assert len(graph.plans) == 3
        for i, batch in enumerate(batches * 2):
            with torch.no_grad():
                x.copy_(batch.x[rank.rank])
                weights.copy_(batch.weights[rank.rank])
                idx.copy_(batch.idx[rank.rank])
                dout.copy_(batch.dout[rank.rank])
            graph.replay()
            module.check()
            want = oracle.run(batch, rank.rank)
            for name, value in zip(("out", "dx", "d_weights", "dw1", "dw2"), got, strict=True):
                oracle.close(f"replay {i} {name}", value, getattr(want, name), rank.dtype)
        # A step outside of the graph between replays, and many replays announced ahead.
        compare(step(module, batches[1], rank), module, oracle.run(batches[1], rank.rank), rank)
        graph.arm(50)
        for _ in range(50):
            graph.replay()
        module.check()
        want = oracle.run(batches[2], rank.rank)
        oracle.close("out after 50", got[0], want.out, rank.dtype)
        plain = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(plain):
                module(x, idx, weights)
        except RuntimeError as error:
            assert "epd.torch.CUDAGraph" in str(error), error
        else:
            raise AssertionError("a plain CUDAGraph captured the layer")


def captured_inference_and_eager_steps_do_not_meet(rank: Rank) -> None:
    captured, eager = sized(85, rank, [64] * rank.world), sized(86, rank, [40] * rank.world)
    eager.w1, eager.w2 = captured.w1, captured.w2
    wants = [oracle.run(inputs, rank.rank).out for inputs in (captured, eager)]
    with rank.group(**SIZES) as group, torch.no_grad():
        module = epd.torch.MoE(group)
        load(module, captured, rank)
        captured_in, eager_in = (
            (inputs.x[rank.rank], inputs.idx[rank.rank], inputs.weights[rank.rank]) for inputs in (captured, eager)
        )
        module(*captured_in)
        torch.cuda.synchronize()
        graph = epd.torch.CUDAGraph()
        with torch.cuda.graph(graph):
            got = module(*captured_in)
        for _ in range(2):
            got.zero_()
            for _ in range(3):  # eager steps of fewer tokens come between the replays
                graph.replay()
                oracle.close("eager", module(*eager_in), wants[1], rank.dtype)
            module.check()
            oracle.close("captured", got, wants[0], rank.dtype)


def memory_given_back_is_registered_anew(rank: Rank) -> None:
    inputs = sized(90, rank, [50] * rank.world)
    want = oracle.run(inputs, rank.rank)
    with rank.group(**SIZES) as group:
        for _ in range(4):
            module = epd.torch.MoE(group)
            load(module, inputs, rank)
            ballast = group.empty((64 << 20,), torch.int32)
            compare(step(module, inputs, rank), module, want, rank)
            del module, ballast
            gc.collect()
            torch.cuda.empty_cache()


def memory_is_flat_over_many_steps(rank: Rank) -> None:
    n_steps = int(os.environ.get("EPD_TEST_STEPS", "1000"))
    inputs = sized(95, rank, [128] * rank.world)
    with rank.group(**SIZES) as group:
        module = epd.torch.MoE(group)
        load(module, inputs, rank)
        optimizer = torch.optim.SGD(module.parameters(), lr=0)
        began = resident = 0.0
        torch.cuda.reset_peak_memory_stats()
        used = reserved = free = 0
        for i in range(n_steps):
            if i == 50:
                module.check()
                torch.cuda.synchronize()
                used, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
                free, resident, began = torch.cuda.mem_get_info()[0], resident_bytes(), time.monotonic()
            step(module, inputs, rank)
            optimizer.step()
        module.check()
        torch.cuda.synchronize()
        print(f"a step takes {(time.monotonic() - began) / (n_steps - 50) * 1e6:.0f} us", flush=True)
        assert torch.cuda.memory_allocated() <= used and torch.cuda.memory_reserved() == reserved
        assert torch.cuda.mem_get_info()[0] >= free - (1 << 20), f"{free - torch.cuda.mem_get_info()[0]} bytes of the GPU gone"
        assert resident_bytes() - resident < 8 << 20, f"{resident_bytes() - resident} bytes of the host gone"


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def device_arrays_go_in_and_out(rank: Rank) -> None:
    """The plain client with tensors by DLPack and __cuda_array_interface__, both ways."""
    sizes = {"n_experts": 4 * rank.world, "top_k": 2, "hidden": 32, "max_tokens": 16, "dtype": "f16", "deadline": 30}
    from epd.driver import uuid_of

    with rank.client.join("device-arrays", rank.world, rank.rank, device=uuid_of(rank.device.index), **sizes) as group:
        x = torch.randn(16, 32, device=rank.device).half()
        idx = (torch.arange(16, device=rank.device)[:, None] + torch.tensor([0, 1], device=rank.device)) % sizes["n_experts"]
        received = group.alloc((group.info.capacity_rows, 32), "f16")
        out = torch.empty_like(x)
        dispatch = group.dispatch(x=group.register_array(x), topk_idx=group.register_array(idx), recv_x=received)
        combine = group.combine(dispatch, y=received, out=group.register_array(out))
        torch.cuda.synchronize()
        dispatch()
        combine()
        assert torch.equal(out, 2 * x)
        for view in (torch.from_dlpack(received), torch.as_tensor(received, device=rank.device)):
            assert view.shape == (group.info.capacity_rows, 32) and view.dtype == torch.float16
            assert view.data_ptr() == received.address and torch.isfinite(view[:8]).all()
        bf16 = group.alloc((8, 32), "bf16")
        assert torch.from_dlpack(bf16).dtype == torch.bfloat16 and (torch.from_dlpack(bf16) == 0).all()
        for tensor in (
            torch.randn(4, 32, device=rank.device).bfloat16(),
            torch.ones(4, 32, device=rank.device, dtype=torch.int32),
        ):
            known = group.register_array(tensor)
            assert known.address == tensor.data_ptr() and known.shape == (4, 32)
            assert torch.equal(torch.from_dlpack(known), tensor)
        group.barrier()()


def compiled_layers_equal_eager_ones(rank: Rank) -> None:
    compiled_equals_eager(rank, "aot_eager")


def layers_compiled_by_inductor_equal_eager_ones(rank: Rank) -> None:
    compiled_equals_eager(rank, "inductor")


def compiled_equals_eager(rank: Rank, backend: str) -> None:
    inputs = sized(150, rank, [48] * rank.world, bias=True)
    want = oracle.run(inputs, rank.rank)
    with rank.group(**SIZES) as group:
        module = epd.torch.MoE(group, bias=True)
        load(module, inputs, rank)

        def layer(x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return module(x * 2, idx, weights) / 1

        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        for _ in range(2):
            module.zero_grad(set_to_none=True)
            x = (inputs.x[rank.rank] / 2).requires_grad_()
            weights = inputs.weights[rank.rank].clone().requires_grad_()
            out = compiled(x, inputs.idx[rank.rank], weights)
            out.backward(inputs.dout[rank.rank])
            compare({"out": out, "dx": x.grad / 2, "d_weights": weights.grad}, module, want, rank)
            del out
        assert module.layer.n_contexts == 1, module.layer.n_contexts
        with torch.no_grad():
            oracle.close("inference", compiled(x, inputs.idx[rank.rank], weights), want.out, rank.dtype)


def a_killed_rank_is_named_and_the_others_go_on(rank: Rank) -> None:
    """The last case: rank 1 ends in it."""
    sizes = SIZES | {"n_experts": 12}
    inputs = sized(160, rank, [32] * rank.world, n_experts=12)
    group = epd.torch.join(
        "killed", rank.world, rank.rank, dtype=rank.dtype, client=rank.client, device=rank.device, deadline=20, **sizes
    )
    module = epd.torch.MoE(group)
    load(module, inputs, rank)
    compare(step(module, inputs, rank), module, oracle.run(inputs, rank.rank), rank)
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        for _ in range(3):  # a step may be launched before the daemon sees the hang-up
            step(module, inputs, rank)
            module.check()
    except epd.PeerLost as lost:
        assert lost.rank == 1 and "rank 1" in str(lost), lost
    else:
        raise AssertionError("three steps went well without rank 1")
    torch.cuda.synchronize()  # the stream goes on
    assert time.monotonic() - begin < 10
    group.leave()
    survivors = [r for r in range(rank.world) if r != 1]
    left = Rank(rank.client, survivors.index(rank.rank), len(survivors), "survivors")
    if 12 % left.world:
        return
    fewer = sized(161, left, [32] * left.world, n_experts=12)
    with left.group(**sizes) as group:
        module = epd.torch.MoE(group)
        load(module, fewer, left)
        compare(step(module, fewer, left), module, oracle.run(fewer, left.rank), left)


CASES = [
    other_streams_are_followed,
    a_graph_replays_with_other_counts,
    captured_inference_and_eager_steps_do_not_meet,
    memory_given_back_is_registered_anew,
    memory_is_flat_over_many_steps,
    device_arrays_go_in_and_out,
    compiled_layers_equal_eager_ones,
    layers_compiled_by_inductor_equal_eager_ones,
    a_killed_rank_is_named_and_the_others_go_on,
]
