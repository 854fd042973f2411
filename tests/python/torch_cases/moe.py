"""The MoE layer: values, gradients, contexts, buffers."""

from __future__ import annotations

import gc
import os
import weakref

import epd
import epd.torch
import torch

from . import oracle
from .rank import Rank

SIZES = {"n_experts": 8, "top_k": 3, "hidden": 64, "ffn": 96, "max_tokens": 200}


def sized(inputs_seed: int, rank: Rank, tokens: list[int], bias: bool = False, **sizes: int) -> oracle.Inputs:
    known = SIZES | sizes
    return oracle.make(
        inputs_seed,
        tokens,
        known["n_experts"],
        known["top_k"],
        known["hidden"],
        known["ffn"],
        rank.dtype,
        rank.device,
        bias,
    )


def load(module: epd.torch.MoE, inputs: oracle.Inputs, rank: Rank) -> None:
    """Gives the module this rank's experts."""
    n_local = module.group.n_local_experts
    mine = slice(rank.rank * n_local, (rank.rank + 1) * n_local)
    with torch.no_grad():
        for name in ("w1", "w2", "b1", "b2"):
            parameter = getattr(module, name)
            if parameter is not None:
                parameter.copy_(getattr(inputs, name)[mine])


def counts_of(rank: Rank, base: int) -> list[int]:
    """Different numbers of tokens on the ranks, one rank has none."""
    return [0 if r == 1 else base - 7 * r for r in range(rank.world)]


def step(module: epd.torch.MoE, inputs: oracle.Inputs, rank: Rank, **buffers: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Forward and backward; everything that came of it."""
    module.zero_grad(set_to_none=True)
    x = inputs.x[rank.rank].clone().requires_grad_()
    weights = inputs.weights[rank.rank].clone().requires_grad_()
    out = module(x, inputs.idx[rank.rank], weights, **buffers)
    out.backward(inputs.dout[rank.rank])
    return {"out": out, "dx": x.grad, "d_weights": weights.grad}


def compare(got: dict[str, torch.Tensor | None], module: epd.torch.MoE, want: oracle.Result, rank: Rank) -> None:
    module.check()
    for name, value in got.items():
        oracle.close(name, value, getattr(want, name), rank.dtype)
    for name in ("w1", "w2", "b1", "b2"):
        parameter = getattr(module, name)
        oracle.close(f"d{name}", None if parameter is None else parameter.grad, getattr(want, f"d{name}"), rank.dtype)


def gradients_equal_the_reference(rank: Rank) -> None:
    for bias, saved, kind in ((False, "context", "swiglu"), (True, "context", "geglu"), (True, "recompute", "relu2")):
        inputs = sized(11, rank, counts_of(rank, 200), bias)
        with rank.group(**SIZES) as group:
            module = epd.torch.MoE(group, bias=bias, saved=saved, activation=kind)
            load(module, inputs, rank)
            for _ in range(2):
                compare(step(module, inputs, rank), module, oracle.run(inputs, rank.rank, kind), rank)
            assert module.layer.n_contexts == 1


def several_dimensions_and_no_weights_are_taken(rank: Rank) -> None:
    inputs = sized(12, rank, [24] * rank.world)
    inputs.weights = [torch.ones_like(w) for w in inputs.weights]
    with rank.group(**SIZES) as group:
        module = epd.torch.MoE(group)
        load(module, inputs, rank)
        x = inputs.x[rank.rank].reshape(2, 12, -1).clone().requires_grad_()
        out = module(x, inputs.idx[rank.rank].int())
        out.backward(inputs.dout[rank.rank].reshape(x.shape))
        got = {"out": out.reshape(24, -1), "dx": x.grad.reshape(24, -1)}
        compare(got, module, oracle.run(inputs, rank.rank), rank)


def no_grad_keeps_nothing(rank: Rank) -> None:
    inputs = sized(13, rank, counts_of(rank, 100))
    with rank.group(**SIZES) as group:
        module = epd.torch.MoE(group)
        load(module, inputs, rank)
        with torch.no_grad():
            out = module(inputs.x[rank.rank], inputs.idx[rank.rank], inputs.weights[rank.rank])
        assert not out.requires_grad and module.layer.n_contexts == 0
        oracle.close("out", out, oracle.run(inputs, rank.rank).out, rank.dtype)


def main_grad_is_added_to(rank: Rank) -> None:
    inputs = sized(14, rank, counts_of(rank, 150), bias=True)
    want = oracle.run(inputs, rank.rank)
    for delay in (False, True):
        with rank.group(**SIZES) as group:
            module = epd.torch.MoE(group, bias=True, delay_wgrad=delay)
            load(module, inputs, rank)
            before = {}
            for name, parameter in module.named_parameters():
                parameter.main_grad = group.empty(parameter.shape, torch.float32).normal_()
                before[name] = parameter.main_grad.clone()
            got = step(module, inputs, rank)
            if delay:
                assert all(torch.equal(p.main_grad, before[n]) for n, p in module.named_parameters())
                module.backward_dw()
            module.check()
            for name, parameter in module.named_parameters():
                assert parameter.grad is None
                oracle.close(f"main_grad {name}", parameter.main_grad - before[name], getattr(want, f"d{name}"), rank.dtype)
            for name, value in got.items():
                oracle.close(name, value, getattr(want, name), rank.dtype)


def plans_are_found_again(rank: Rank) -> None:
    """Steps with the same tensors make no plans, and a tensor that lies elsewhere is not taken for the one before."""
    inputs = sized(17, rank, [50] * rank.world)
    want = oracle.run(inputs, rank.rank)
    for delay in (False, True):
        with rank.group(**SIZES) as group:
            module, make, made = epd.torch.MoE(group, delay_wgrad=delay), group.plain.plan, []
            group.plain.plan = lambda op, make=make, made=made, **rest: made.append(op) or make(op, **rest)
            load(module, inputs, rank)

            def run(module: epd.torch.MoE = module, delay: bool = delay) -> None:
                step(module, inputs, rank)
                if delay:
                    module.backward_dw()

            for parameter in module.parameters():
                parameter.main_grad = group.empty(parameter.shape, torch.float32).zero_()
            run()
            n_first = len(made)
            run()
            run()
            assert len(made) == n_first, made
            kept = module.w1.main_grad
            module.w1.main_grad = group.empty(kept.shape, torch.float32).zero_()
            run()
            assert len(made) == n_first + 1, made
            module.check()
            oracle.close("dw1, three steps", kept / 3, want.dw1, rank.dtype)
            oracle.close("dw1, the last", module.w1.main_grad, want.dw1, rank.dtype)


def delayed_gradients_go_to_grad_without_main_grad(rank: Rank) -> None:
    first, second = (sized(seed, rank, [60] * rank.world) for seed in (15, 16))
    second.w1, second.w2 = first.w1, first.w2
    wants = [oracle.run(inputs, rank.rank) for inputs in (first, second)]
    with rank.group(**SIZES) as group:
        module = epd.torch.MoE(group, delay_wgrad=True)
        load(module, first, rank)
        for inputs in (first, second):
            x = inputs.x[rank.rank].clone().requires_grad_()
            module(x, inputs.idx[rank.rank], inputs.weights[rank.rank]).backward(inputs.dout[rank.rank])
        assert module.w1.grad is None and module.layer.n_contexts == 2
        module.backward_dw()
        oracle.close("dw1", module.w1.grad, wants[0].dw1, rank.dtype)
        module.backward_dw()
        module.check()
        oracle.close("dw1 of both", module.w1.grad, wants[0].dw1 + wants[1].dw1, rank.dtype)
        oracle.close("dw2 of both", module.w2.grad, wants[0].dw2 + wants[1].dw2, rank.dtype)
        try:
            module.backward_dw()
        except RuntimeError as error:
            assert "no backward" in str(error)
        else:
            raise AssertionError("a third backward_dw went well")


def interleaved_contexts_do_not_mix(rank: Rank) -> None:
    """1F1B: three micro-batches in flight, backward in the order of the forwards."""
    batches = [sized(20 + i, rank, [40 + 10 * i] * rank.world) for i in range(5)]
    for batch in batches[1:]:
        batch.w1, batch.w2 = batches[0].w1, batches[0].w2
    wants = [oracle.run(batch, rank.rank) for batch in batches]
    with rank.group(**SIZES) as group:
        module = epd.torch.MoE(group)
        load(module, batches[0], rank)
        flying = []

        def forward(i: int) -> None:
            x = batches[i].x[rank.rank].clone().requires_grad_()
            weights = batches[i].weights[rank.rank].clone().requires_grad_()
            flying.append((i, x, weights, module(x, batches[i].idx[rank.rank], weights)))

        def backward() -> None:
            i, x, weights, out = flying.pop(0)
            module.zero_grad(set_to_none=True)
            out.backward(batches[i].dout[rank.rank])
            compare({"out": out, "dx": x.grad, "d_weights": weights.grad}, module, wants[i], rank)

        for i in range(3):
            forward(i)
        for i in range(3, 5):
            backward()
            forward(i)
        while flying:
            backward()
        assert module.layer.n_contexts == 3, module.layer.n_contexts


def a_dropped_graph_gives_its_context_back(rank: Rank) -> None:
    inputs = sized(30, rank, [16] * rank.world)
    with rank.group(**SIZES) as group:
        module = epd.torch.MoE(group)
        load(module, inputs, rank)
        for _ in range(3):
            x = inputs.x[rank.rank].clone().requires_grad_()
            out = module(x, inputs.idx[rank.rank], inputs.weights[rank.rank])
            del out
            gc.collect()
        assert module.layer.n_contexts == 1
        out = module(x, inputs.idx[rank.rank], inputs.weights[rank.rank])
        out.backward(inputs.dout[rank.rank], retain_graph=True)
        try:
            out.backward(inputs.dout[rank.rank])
        except RuntimeError as error:
            assert "used up" in str(error)
        else:
            raise AssertionError("a second backward went well")


def buffers_are_used_and_their_contract_is_checked(rank: Rank) -> None:
    inputs = sized(40, rank, [33] * rank.world)
    n, hidden = 33, SIZES["hidden"]
    with rank.group(**SIZES) as group:
        module = epd.torch.MoE(group)
        load(module, inputs, rank)
        plain = step(module, inputs, rank)
        room = torch.full((n + 5, hidden), 7.0, dtype=rank.dtype, device=rank.device)
        gradient = torch.full((n + 5, hidden), 7.0, dtype=rank.dtype, device=rank.device)
        got = step(module, inputs, rank, out=room[:n], grad_input=gradient[:n])
        assert got["out"].data_ptr() == room.data_ptr() and not room.requires_grad
        assert torch.equal(got["out"], plain["out"]) and torch.equal(gradient[:n], plain["dx"])
        assert (room[n:] == 7).all() and (gradient[n:] == 7).all(), "the tail was written"
        step(module, inputs, rank, out=room[:n])  # again: the buffer has not become part of the graph

        def empty(*shape: int, dtype: torch.dtype = rank.dtype, device: torch.device = rank.device) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        wrong = {
            "2-D": empty(n, hidden, 1),
            "shape": empty(n + 1, hidden),
            "dtype": empty(n, hidden, dtype=torch.float64),
            "device": empty(n, hidden, device=torch.device("meta")),
            "contiguous": empty(hidden, n).t(),
            "grad": empty(n, hidden).requires_grad_(),
        }
        for name in ("out", "grad_input"):
            for word, given in wrong.items():
                try:
                    step(module, inputs, rank, **{name: given})
                except ValueError as error:
                    assert str(error).startswith(f"{name}: ") and word in str(error), error
                else:
                    raise AssertionError(f"{name} with wrong {word} was taken")
        for words, call in {
            "x: shape": (inputs.x[rank.rank][:, 1:], inputs.idx[rank.rank]),
            "x: dtype": (inputs.x[rank.rank].double(), inputs.idx[rank.rank]),
            "topk_idx: shape": (inputs.x[rank.rank], inputs.idx[rank.rank][1:]),
            "topk_idx: device": (inputs.x[rank.rank], inputs.idx[rank.rank].to("meta")),
            "topk_idx: dtype": (inputs.x[rank.rank], inputs.idx[rank.rank].float()),
            "at most": (inputs.x[rank.rank].repeat(10, 1), inputs.idx[rank.rank].repeat(10, 1)),
        }.items():
            try:
                module(*call)
            except ValueError as error:
                assert words in str(error), error
            else:
                raise AssertionError(f"{words} was taken")


def parts_and_frozen_weights_are_taken(rank: Rank) -> None:
    inputs = sized(50, rank, counts_of(rank, 80))
    want = oracle.run(inputs, rank.rank)
    with rank.group(**SIZES) as group:
        n_local = group.n_local_experts
        mine = range(rank.rank * n_local, (rank.rank + 1) * n_local)
        w1 = [group.empty(inputs.w1[e].shape).copy_(inputs.w1[e]).requires_grad_() for e in mine]
        w2 = [group.empty(inputs.w2[e].shape).copy_(inputs.w2[e]) for e in mine]  # frozen
        layer = epd.torch.Layer(group)
        x = inputs.x[rank.rank].clone().requires_grad_()
        out = epd.torch.moe(layer, x, inputs.idx[rank.rank], inputs.weights[rank.rank], w1, w2)
        out.backward(inputs.dout[rank.rank])
        layer.check()
        oracle.close("out", out, want.out, rank.dtype)
        oracle.close("dx", x.grad, want.dx, rank.dtype)
        for i in range(n_local):
            oracle.close(f"dw1[{i}]", w1[i].grad, want.dw1[i], rank.dtype)
        assert all(w.grad is None for w in w2)


def a_bad_routing_is_told_and_the_group_goes_on(rank: Rank) -> None:
    inputs = sized(60, rank, [16] * rank.world)
    with rank.group(**SIZES) as group:
        module = epd.torch.MoE(group)
        load(module, inputs, rank)
        good = inputs.idx[rank.rank]
        bad = good.clone()
        bad[3, 0] = SIZES["n_experts"]
        try:
            with torch.no_grad():
                module(inputs.x[rank.rank], bad if rank.rank == 0 else good, inputs.weights[rank.rank])
                module.check()
        except epd.BadRouting as error:
            assert error.rank == 0 and "token 3" in str(error), error
        else:
            raise AssertionError("expert 8 of 8 was taken")
        compare(step(module, inputs, rank), module, oracle.run(inputs, rank.rank), rank)


def files_and_mappings_are_flat_over_many_steps(rank: Rank) -> None:
    inputs = sized(70, rank, [8] * rank.world)

    def counted() -> tuple[int, int]:
        gc.collect()
        with open("/proc/self/maps") as maps:
            return len(os.listdir("/proc/self/fd")), sum(1 for _ in maps)

    with rank.group(**SIZES) as group:
        module = epd.torch.MoE(group)
        load(module, inputs, rank)
        before = (0, 0)
        for i in range(120):
            step(module, inputs, rank)
            if i == 40:
                before = counted()
        after = counted()
        assert after[0] <= before[0] + 4 and after[1] <= before[1] + 40, (before, after)


def memory_that_is_gone_is_used_again(rank: Rank) -> None:
    """The gradients of a loop come to lie where the last ones lay, unless something still refers to these."""
    inputs = sized(71, rank, [40] * rank.world)
    with rank.group(**SIZES) as group:
        module, make, made = epd.torch.MoE(group), group.plain.plan, []
        group.plain.plan = lambda op, **rest: made.append(op) or make(op, **rest)
        load(module, inputs, rank)
        for _ in range(3):
            step(module, inputs, rank)
        n, place = len(made), module.w1.grad.data_ptr()
        step(module, inputs, rank)
        assert len(made) == n and module.w1.grad.data_ptr() == place
        for kept in (module.w1.grad, torch.from_numpy(module.w1.grad.numpy())):
            before = kept.clone()
            inputs.dout[rank.rank].mul_(2)
            step(module, inputs, rank)
            assert module.w1.grad.data_ptr() != kept.data_ptr()
            assert torch.equal(kept, before) and not torch.equal(kept, module.w1.grad)
        place = group.empty((1000,), torch.float32).data_ptr()
        assert group.empty((1000,), torch.float32).data_ptr() == place
        again, before, longer = (group.empty((1000 + i,), torch.float32) for i in range(3))
        buffers = [weakref.ref(group.memory._buffers[tensor.data_ptr()]) for tensor in (again, before, longer)]
        del before
        group.memory.abandon()
        assert buffers[1]() is None and buffers[0]() is not None
        del again
        assert buffers[0]() is None  # at once, though another tensor of that time lives
        longer.zero_()
        several = [group.empty((500 + i,), torch.float32) for i in range(100)]
        del several
        group.empty((8,), torch.float32)
        assert len(group.memory._kept) <= group.memory.KEPT_BUFFERS
        module.check()
        kept = [weakref.ref(buffer) for _, buffer in group.memory._kept]
    assert kept and all(buffer() is None for buffer in kept)  # plans of a group that was left are no reason to stay mapped


def nodes_reach_the_daemon(rank: Rank) -> None:
    """One node can be said; two are refused by a daemon that is in no fabric."""
    with rank.group(**SIZES, n_nodes=1) as group:
        group.barrier()
    try:
        with rank.group(**SIZES, n_nodes=2):
            raise AssertionError("a daemon without a fabric has made a group of two nodes")
    except epd.Unsupported as refused:
        assert "n_nodes: 2" in str(refused), refused


CASES = [
    gradients_equal_the_reference,
    several_dimensions_and_no_weights_are_taken,
    no_grad_keeps_nothing,
    main_grad_is_added_to,
    plans_are_found_again,
    delayed_gradients_go_to_grad_without_main_grad,
    interleaved_contexts_do_not_mix,
    a_dropped_graph_gives_its_context_back,
    buffers_are_used_and_their_contract_is_checked,
    parts_and_frozen_weights_are_taken,
    a_bad_routing_is_told_and_the_group_goes_on,
]
HOST_CASES = [files_and_mappings_are_flat_over_many_steps, memory_that_is_gone_is_used_again, nodes_reach_the_daemon]
