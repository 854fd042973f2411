"""Megatron-Core's token dispatcher, on :class:`epd.torch.Dispatcher`.

A class of the interface that ``MoELayer`` calls (``MoETokenDispatcher``, of Megatron-Core 0.11 and later), without importing
Megatron: pass it where that one takes a dispatcher class, with the group of the layer bound::

    dispatcher = functools.partial(epd.torch.megatron.TokenDispatcher, group=group)

The sequence is dispatch_preprocess, token_dispatch, dispatch_postprocess, experts, combine_preprocess, token_combine,
combine_postprocess; the older pair token_permutation and token_unpermutation does the same in two calls. Probabilities go
with the tokens, and the experts multiply by them. Expert tensor parallelism and shared-expert overlap are not supported, and
refused.
"""

from __future__ import annotations

from typing import Any

import torch

from .dispatcher import Dispatched, Dispatcher
from .group import Group


class TokenDispatcher:
    """See above. sync: experts get exactly the rows received, and their counts on the host, which waits for the GPU once;
    without it all C rows of the group's capacity and the counts on the device, as epd.torch.GroupedMLP takes them."""

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: Any,
        model_comm_pgs: Any = None,
        pg_collection: Any = None,
        *,
        group: Group,
        sync: bool = True,
    ) -> None:
        self.config = config
        self.shared_experts: Any = None
        self.num_local_experts = num_local_experts
        self.local_expert_indices = local_expert_indices
        first = group.info.first_expert
        want = list(range(first, first + group.n_local_experts))
        if list(local_expert_indices) != want:
            raise ValueError(f"local_expert_indices: {list(local_expert_indices)}, the group has {want} on this rank")
        if config.moe_router_topk != group.sizes.top_k:
            raise ValueError(f"moe_router_topk: {config.moe_router_topk}, the group's top_k is {group.sizes.top_k}")
        processes = pg_collection if pg_collection is not None else model_comm_pgs
        tensor_parallel = getattr(processes, "expt_tp", None)
        if tensor_parallel is not None and tensor_parallel.size() > 1:
            raise ValueError(f"expert tensor parallelism: {tensor_parallel.size()}, want 1")
        self.top_k = group.sizes.top_k
        self.sync = sync
        self.dispatcher = Dispatcher(group)
        self._topk_idx: torch.Tensor | None = None
        self._received: Dispatched | None = None
        self._hidden_shape: torch.Size | None = None

    def set_shared_experts(self, shared_experts: Any) -> None:
        """Refused: the shared experts' overlap is not supported."""
        raise ValueError("moe_shared_expert_overlap: not supported by epd's dispatcher; run shared experts outside of it")

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states [..., H]; routing_map bool and probs [T, E]. Returns tokens [T, H] and probabilities [T, K]."""
        self._hidden_shape = hidden_states.shape
        flags, idx = routing_map.to(torch.uint8).topk(self.top_k, dim=1)
        self._topk_idx = torch.where(flags > 0, idx, torch.full_like(idx, -1))
        weights = probs.gather(1, idx).float() * flags
        return hidden_states.reshape(-1, hidden_states.shape[-1]), weights

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sends tokens and probabilities to the ranks of their experts."""
        assert self._topk_idx is not None, "dispatch_preprocess comes first"
        self._received = self.dispatcher.dispatch(hidden_states, self._topk_idx, probs)
        return self._received.recv_x, self._received.recv_weights

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows by local expert, tokens_per_expert [L] i64, probabilities of the rows f32."""
        received = self._received
        assert received is not None, "token_dispatch comes first"
        if not self.sync:
            return hidden_states, received.padded_splits(), probs
        n_rows = received.n_rows()
        return hidden_states[:n_rows], received.padded_splits().cpu(), probs[:n_rows]

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Nothing: rows are in the order that combine wants."""
        return hidden_states

    def token_combine(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Brings the experts' rows back and sums them for each token."""
        received, self._received = self._received, None
        assert received is not None, "token_dispatch comes first"
        return self.dispatcher.combine(hidden_states, received)

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Gives the tokens their shape back."""
        assert self._hidden_shape is not None
        return hidden_states.view(self._hidden_shape)

    def token_permutation(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three steps of dispatch in one call, of earlier versions."""
        return self.dispatch_postprocess(*self.token_dispatch(*self.dispatch_preprocess(hidden_states, routing_map, probs)))

    def token_unpermutation(
        self, hidden_states: torch.Tensor, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The three steps of combine in one call, of earlier versions."""
        if bias is not None:
            raise ValueError("bias: not supported by epd's dispatcher, want None")
        return self.combine_postprocess(self.token_combine(self.combine_preprocess(hidden_states))), None
