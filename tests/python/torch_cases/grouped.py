"""Grouped linear layers, dispatch and combine, and the adapters for other frameworks."""

from __future__ import annotations

import epd.torch
import torch

from . import oracle
from .moe import SIZES, counts_of, sized
from .rank import Rank

# Of one product, per element: relative, and absolute in units of the root mean square.
RTOL = {torch.float32: 1.3e-6, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}
ATOL = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-3}


def near(name: str, got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    if want.numel() == 0:
        return
    got, want = got.detach().double(), want.double()
    allowed = RTOL[dtype] * want.abs() + ATOL[dtype] * want.pow(2).mean().sqrt() + 1e-5
    over = ((got - want).abs() - allowed).max().item()
    assert over <= 0, f"{name}: over its tolerance by {over:.3g}"


def alone(rank: Rank):
    """A group of this rank alone: the products are local."""
    name = f"alone-{rank._prefix}-{next(rank._numbers)}-{rank.rank}"
    return epd.torch.join(
        name, 1, 0, n_experts=1, top_k=1, hidden=8, max_tokens=1, dtype=rank.dtype, client=rank.client, device=rank.device
    )


def parts_of(rows: torch.Tensor, splits: list[int]) -> list[torch.Tensor]:
    return list(rows[: sum(splits)].split(splits))


def linear_case(rank: Rank, group: epd.torch.Group, z: int, m: int, k: int, n: int, **options: object) -> None:
    """Forward and backward against fp32 math; the last group is empty where there are several, three rows are padding."""
    dtype = options.pop("dtype", rank.dtype)
    main_grad, delay = options.pop("main_grad", False), options.get("delay_wgrad", False)
    layer = epd.torch.GroupedLinear(group, z, k, n, dtype=dtype, **options)
    splits = [m] if z == 1 else [m // (z - 1) + (i < m % (z - 1)) for i in range(z - 1)] + [0]
    generator = torch.Generator().manual_seed(z * m)
    x = group.empty((m + 3, k), dtype).copy_(torch.randn(m + 3, k, generator=generator)).requires_grad_()
    dy = torch.randn(m + 3, n, generator=generator).to(dtype).to(rank.device)
    before = {}
    if main_grad:
        for name, parameter in layer.named_parameters():
            parameter.main_grad = group.empty(parameter.shape, torch.float32).normal_()
            before[name] = parameter.main_grad.clone()
    counts = group.empty((z,), torch.int64).copy_(torch.tensor(splits))
    out = layer(x, counts)
    out.backward(dy)
    if delay:
        assert all(p.grad is None for p in layer.parameters())
        layer.backward_dw()
    rank.synchronize()
    weights = [part for weight in layer.weight_parts() for part in (weight if weight.dim() == 3 else [weight])]
    biases = layer.bias if layer.bias is not None else [None] * z
    rows, grads = parts_of(x.detach(), splits), parts_of(dy, splits)
    want = [r.float() @ w.float().T + (0 if b is None else b.float()) for r, w, b in zip(rows, weights, biases, strict=False)]
    near("out", out[:m], torch.cat(want), dtype)
    near("dx", x.grad[:m], torch.cat([g.float() @ w.float() for g, w in zip(grads, weights, strict=False)]), dtype)

    def gradient(name: str, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.main_grad - before[name] if main_grad else parameter.grad

    for name, parameter in layer.named_parameters():
        assert (parameter.grad is None) == bool(main_grad)
        got = gradient(name, parameter)
        if name == "bias":
            near(name, got, torch.stack([g.float().sum(0) for g in grads]), dtype)
        elif parameter.dim() == 3:
            near(name, got, torch.stack([g.float().T @ r.float() for g, r in zip(grads, rows, strict=False)]), dtype)
        else:
            i = int(name.split(".")[1])
            near(name, got, grads[i].float().T @ rows[i].float(), dtype)


def grouped_linear_equals_the_reference(rank: Rank) -> None:
    shapes = [(1, 127, 128, 512), (8, 15, 128, 512), (8, 1027, 128, 512)]
    shapes += [(16, 10027, 128, 512)] if rank.is_cuda else []
    dtypes = (torch.bfloat16, torch.float16) if rank.is_cuda else (torch.float32,)
    with alone(rank) as group:
        for shape in shapes:
            for dtype in dtypes:
                linear_case(rank, group, *shape, dtype=dtype)
                linear_case(rank, group, *shape, dtype=dtype, bias=True, main_grad=True)
        for z in (3, 6):
            linear_case(rank, group, z, 300, 128, 256, bias=True, delay_wgrad=True)
            linear_case(rank, group, z, 300, 128, 256, bias=True, delay_wgrad=True, main_grad=True)
            linear_case(rank, group, z, 300, 128, 256, bias=True, per_group=True)
            linear_case(rank, group, z, 300, 128, 256, per_group=True, main_grad=True, delay_wgrad=True)
            linear_case(rank, group, z, 0, 128, 256, bias=True)
            linear_case(rank, group, z, 0, 128, 256, main_grad=True)


def grouped_linear_uses_buffers_and_checks_them(rank: Rank) -> None:
    with alone(rank) as group:
        splits, padding = [64, 96, 80], 80
        m = sum(splits)
        chain = [epd.torch.GroupedLinear(group, 3, k, n, bias=True) for k, n in ((128, 256), (256, 64))]
        x = group.empty((m + padding, 128)).normal_().requires_grad_()
        rooms = [group.empty((m + padding, n)).fill_(7.0) for n in (256, 64)]
        dgrads = [group.empty((m + padding, k)).fill_(7.0) for k in (128, 256)]
        dy = group.empty((m + padding, 64)).normal_()

        def run(outs: list, backs: list) -> tuple[torch.Tensor, torch.Tensor]:
            x.grad = None
            hidden = chain[0](x, splits, out=outs[0], dgrad_out=backs[0])
            out = chain[1](hidden, splits, out=outs[1], dgrad_out=backs[1])
            out.backward(dy)
            return out, x.grad

        plain, plain_dx = run([None, None], [None, None])
        plain, plain_dx = plain.clone(), plain_dx.clone()
        got, got_dx = run(rooms, dgrads)
        assert got.data_ptr() == rooms[1].data_ptr()
        assert torch.equal(got[:m], plain[:m]) and torch.equal(got_dx[:m], plain_dx[:m])
        assert torch.equal(dgrads[0][:m], plain_dx[:m])
        for buffer in rooms + dgrads:
            assert (buffer[m:] == 7).all(), "padding was written"
            assert not buffer.requires_grad
        for name, wrong in {
            "out": group.empty((m + padding + 1, 256)),
            "dgrad_out": group.empty((m + padding + 1, 128)),
        }.items():
            try:
                chain[0](x, splits, **{name: wrong})
            except ValueError as error:
                assert str(error).startswith(f"{name}: shape"), error
            else:
                raise AssertionError(f"{name} with a row too many was taken")
        for wrong_splits in ([64, 96], [64, 96, 1000], [64, 96, -1], torch.tensor([64, 96, 80], dtype=torch.int32)):
            try:
                chain[0](x, wrong_splits)
            except ValueError as error:
                assert "m_splits" in str(error), error
            else:
                raise AssertionError(f"splits {wrong_splits} were taken")


def experts_of(group: epd.torch.Group, inputs: oracle.Inputs, rank: Rank) -> epd.torch.GroupedMLP:
    mlp = epd.torch.GroupedMLP(group, group.n_local_experts, SIZES["hidden"], SIZES["ffn"])
    first = group.info.first_expert
    with torch.no_grad():
        mlp.fc1.weight.copy_(inputs.w1[first : first + group.n_local_experts])
        mlp.fc2.weight.copy_(inputs.w2[first : first + group.n_local_experts])
    return mlp


def dispatched_experts_equal_the_layer(rank: Rank) -> None:
    """dispatch, GroupedMLP, combine against the reference of the layer, with the weights either way, copied or in place."""
    for alignment in (1, 16):
        run_dispatched(rank, alignment)


def run_dispatched(rank: Rank, alignment: int) -> None:
    inputs = sized(110, rank, counts_of(rank, 120))
    want = oracle.run(inputs, rank.rank)
    with rank.group(**SIZES, alignment=alignment) as group:
        mlp, dispatcher = experts_of(group, inputs, rank), epd.torch.Dispatcher(group)
        for weighted in (True, False):
            for in_place in (True, False):
                mlp.zero_grad(set_to_none=True)
                x = inputs.x[rank.rank].clone().requires_grad_()
                weights = inputs.weights[rank.rank].clone().requires_grad_()
                received = dispatcher.dispatch(x, inputs.idx[rank.rank], weights)
                n_rows = received.n_rows()
                y = mlp(
                    received.recv_x,
                    received.m_splits,
                    None if weighted else received.recv_weights,
                    offsets=received.offsets,
                    out=received.expert_output() if in_place else None,
                )
                assert int(received.padded_splits().sum()) == n_rows and (alignment == 1 or n_rows % 16 == 0)
                out = dispatcher.combine(y if in_place else y[:n_rows], received, weighted=weighted)
                out.backward(inputs.dout[rank.rank])
                dispatcher.check()
                oracle.close("out", out, want.out, rank.dtype)
                oracle.close("dx", x.grad, want.dx, rank.dtype)
                oracle.close("d_weights", weights.grad, want.d_weights, rank.dtype)
                oracle.close("dw1", mlp.fc1.weight.grad, want.dw1, rank.dtype)
                oracle.close("dw2", mlp.fc2.weight.grad, want.dw2, rank.dtype)
                del received, y, out
        assert len(dispatcher._pool) == 1, len(dispatcher._pool)


def identity_experts_give_k_times_x(rank: Rank) -> None:
    inputs = sized(120, rank, [64] * rank.world)
    inputs.idx = [idx.where(idx >= 0, torch.full_like(idx, -1)) for idx in inputs.idx]
    with rank.group(**SIZES) as group:
        dispatcher = epd.torch.Dispatcher(group, n_contexts=2)
        flying = []
        for _ in range(2):
            x = inputs.x[rank.rank].clone().requires_grad_()
            received = dispatcher.dispatch(x, inputs.idx[rank.rank])
            flying.append((x, dispatcher.combine(received.recv_x, received)))
        routed = (inputs.idx[rank.rank] >= 0).sum(1, keepdim=True)
        for x, out in flying:
            oracle.close("out", out, routed * x.detach().float(), rank.dtype)
            out.backward(torch.ones_like(out))
            oracle.close("dx", x.grad, routed.float().expand_as(x), rank.dtype)
        assert len(dispatcher._pool) == 2
        dispatcher.check()


CASES = [
    grouped_linear_equals_the_reference,
    grouped_linear_uses_buffers_and_checks_them,
    dispatched_experts_equal_the_layer,
    identity_experts_give_k_times_x,
]
