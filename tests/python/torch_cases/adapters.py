"""Stand-ins that call the adapters as Megatron-Core's MoE layer and torchtitan's call their own dispatchers."""

from __future__ import annotations

import types

import epd.torch
import epd.torch.megatron
import epd.torch.torchtitan
import torch

from . import oracle
from .grouped import experts_of
from .moe import SIZES, sized
from .rank import Rank


def dense(inputs: oracle.Inputs, rank: Rank, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """routing_map bool and probs [T, E], as Megatron's router gives them."""
    idx, n_experts = inputs.idx[rank.rank], SIZES["n_experts"]
    routed = idx >= 0
    safe = idx.clamp(min=0)
    probs = torch.zeros(len(idx), n_experts, device=rank.device).scatter_add(1, safe, weights * routed)
    routing_map = torch.zeros(len(idx), n_experts, device=rank.device).scatter_add(1, safe, routed.float()) > 0
    return routing_map, probs


def megatron_layer(dispatcher: epd.torch.megatron.TokenDispatcher, experts, hidden_states, routing_map, probs, old: bool):
    """The calls of MoELayer.forward, of both generations."""
    if old:
        tokens, counts, row_probs = dispatcher.token_permutation(hidden_states, probs, routing_map)
        output, bias = dispatcher.token_unpermutation(experts(tokens, counts, row_probs))
        assert bias is None
        return output
    hidden_states, probs = dispatcher.dispatch_preprocess(hidden_states, routing_map, probs)
    hidden_states, probs = dispatcher.token_dispatch(hidden_states, probs)
    tokens, counts, row_probs = dispatcher.dispatch_postprocess(hidden_states, probs)
    output = dispatcher.combine_preprocess(experts(tokens, counts, row_probs))
    return dispatcher.combine_postprocess(dispatcher.token_combine(output))


def megatron_dispatcher_is_replaced(rank: Rank) -> None:
    inputs = sized(130, rank, [48] * rank.world)
    want = oracle.run(inputs, rank.rank)
    with rank.group(**SIZES) as group:
        mlp = experts_of(group, inputs, rank)

        def experts(tokens, counts, probs):
            counts = counts if counts.device == tokens.device and rank.is_cuda else counts.tolist()
            return mlp(tokens, counts, probs)

        config = types.SimpleNamespace(moe_router_topk=SIZES["top_k"], num_moe_experts=SIZES["n_experts"])
        local = list(range(group.info.first_expert, group.info.first_expert + group.n_local_experts))
        for sync, old in ((True, False), (True, True), (False, False)):
            dispatcher = epd.torch.megatron.TokenDispatcher(len(local), local, config, group=group, sync=sync)
            mlp.zero_grad(set_to_none=True)
            hidden = inputs.x[rank.rank].reshape(12, 4, -1).clone().requires_grad_()
            weights = inputs.weights[rank.rank].clone().requires_grad_()
            output = megatron_layer(dispatcher, experts, hidden, *dense(inputs, rank, weights), old)
            output.backward(inputs.dout[rank.rank].reshape(hidden.shape))
            dispatcher.dispatcher.check()
            oracle.close("out", output.reshape(48, -1), want.out, rank.dtype)
            oracle.close("dx", hidden.grad.reshape(48, -1), want.dx, rank.dtype)
            oracle.close("d_weights", weights.grad, want.d_weights, rank.dtype)
            oracle.close("dw1", mlp.fc1.weight.grad, want.dw1, rank.dtype)
            del output
        for wrong in (
            lambda: epd.torch.megatron.TokenDispatcher(1, [local[0] + 1], config, group=group),
            lambda: epd.torch.megatron.TokenDispatcher(
                len(local), local, types.SimpleNamespace(moe_router_topk=1), group=group
            ),
            lambda: dispatcher.set_shared_experts(object()),
        ):
            try:
                wrong()
            except ValueError:
                continue
            raise AssertionError("what the dispatcher does not do was taken")


def torchtitan_styles_are_replaced(rank: Rank) -> None:
    inputs = oracle.make(
        140, [40] * rank.world, SIZES["n_experts"], 3, SIZES["hidden"], SIZES["ffn"], rank.dtype, rank.device, unrouted=0
    )
    want = oracle.run(inputs, rank.rank)
    with rank.group(**(SIZES | {"top_k": 1, "max_tokens": 40 * 3})) as group:
        mlp = experts_of(group, inputs, rank)
        config = types.SimpleNamespace(num_experts=SIZES["n_experts"], top_k=3, score_before_experts=False)
        style = epd.torch.torchtitan.ExpertParallel(group, sync=False)
        dispatcher = epd.torch.torchtitan.TokenDispatcher(config, group=group)

        def run(x: torch.Tensor, scores: torch.Tensor, by_style: bool) -> torch.Tensor:
            if not by_style:
                rows, counts, metadata = dispatcher.dispatch(x, scores, inputs.idx[rank.rank])
                back = dispatcher.combine(mlp(rows, counts), metadata)
                order, sorted_scores = metadata.token_indices_experts_sorted, metadata.top_scores_experts_sorted
            else:
                experts = inputs.idx[rank.rank].reshape(-1)
                sort = experts.argsort(stable=True)
                order, sorted_scores = sort // 3, scores.reshape(-1)[sort]
                counts = torch.bincount(experts, minlength=SIZES["n_experts"])
                rows, counts = style._token_dispatch(mlp, (x[order], counts), None)
                back = style._token_combine(mlp, mlp(rows, counts), None)
            return torch.zeros_like(x).index_add(0, order, (back.float() * sorted_scores[:, None]).to(x.dtype))

        for by_style in (False, True):
            mlp.zero_grad(set_to_none=True)
            x = inputs.x[rank.rank].clone().requires_grad_()
            scores = inputs.weights[rank.rank].clone().requires_grad_()
            out = run(x, scores, by_style)
            out.backward(inputs.dout[rank.rank])
            dispatcher._rows.dispatcher.check()
            oracle.close("out", out, want.out, rank.dtype)
            oracle.close("dx", x.grad, want.dx, rank.dtype)
            oracle.close("d_weights", scores.grad, want.d_weights, rank.dtype)
            oracle.close("dw2", mlp.fc2.weight.grad, want.dw2, rank.dtype)
            del out


CASES = [megatron_dispatcher_is_replaced, torchtitan_styles_are_replaced]
