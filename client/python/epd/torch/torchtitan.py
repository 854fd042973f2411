"""torchtitan's expert parallelism, on :class:`epd.torch.Dispatcher`.

torchtitan sorts the routed copies of the tokens itself and exchanges rows, each for one expert. So the group is joined with
``top_k=1`` and ``max_tokens`` = tokens x top-k of the model. Two forms of the interface are here: the hooks of
``ExpertParallel`` around a module of experts, and ``TokenDispatcher`` with dispatch and combine. Nothing of torchtitan is
imported. The model's ``num_tokens_per_expert`` need not visit the host: with sync=False the experts get all C rows of the
group's capacity, of which grouped matrix products touch those that count.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from .dispatcher import Dispatched, Dispatcher
from .group import Group


class _Rows:
    """Exchange of rows that are sorted by expert."""

    def __init__(self, group: Group, sync: bool) -> None:
        if group.sizes.top_k != 1:
            raise ValueError(f"group top_k: {group.sizes.top_k}, want 1: torchtitan's rows have one expert each")
        self.group = group
        self.sync = sync
        self.dispatcher = Dispatcher(group)
        self._experts = torch.arange(group.sizes.n_experts, device=group.device)

    def dispatch(self, rows: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Dispatched]:
        """rows [R, H] by expert, counts [E] of them: rows of the local experts, their counts [L], and what combine wants."""
        idx = self._experts.repeat_interleave(counts.long(), output_size=rows.shape[0])
        received = self.dispatcher.dispatch(rows, idx[:, None])
        recv_x = received.recv_x[: received.n_rows()] if self.sync else received.recv_x
        return recv_x, received.padded_splits(), received

    def combine(self, rows: torch.Tensor, received: Dispatched) -> torch.Tensor:
        """The rows [R, H] in the order in which they were dispatched."""
        return self.dispatcher.combine(rows, received)


class ExpertParallel:
    """The hooks of torchtitan's ``ExpertParallel`` style: experts are sharded over their first dimension.

    ``parallelize_module(module, mesh, ExpertParallel(group))`` takes it, as do callers of the two hooks.
    """

    def __init__(self, group: Group, sync: bool = True) -> None:
        self._rows = _Rows(group, sync)
        self._received: list[Dispatched] = []

    def _partition_fn(self, name: str, mod: nn.Module, device_mesh: Any) -> None:
        from torch.distributed.tensor import Shard, distribute_tensor

        for parameter_name, parameter in mod.named_parameters(recurse=False):
            mod.register_parameter(parameter_name, nn.Parameter(distribute_tensor(parameter, device_mesh, [Shard(0)])))

    def _token_dispatch(
        self, mod: nn.Module, inputs: tuple[torch.Tensor, torch.Tensor], device_mesh: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        routed_input, num_tokens_per_expert = inputs
        rows, counts, received = self._rows.dispatch(routed_input, num_tokens_per_expert)
        self._received.append(received)
        return rows, counts

    def _token_combine(self, mod: nn.Module, routed_output: torch.Tensor, device_mesh: Any) -> torch.Tensor:
        return self._rows.combine(routed_output, self._received.pop())

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        from torch.distributed.tensor import distribute_module

        return distribute_module(module, device_mesh, self._partition_fn, self._token_dispatch, self._token_combine)


@dataclasses.dataclass(frozen=True)
class DispatchMetadata:
    """What combine needs, with the names that the model reads."""

    token_indices_experts_sorted: torch.Tensor
    top_scores_experts_sorted: torch.Tensor
    received: Dispatched


class TokenDispatcher:
    """torchtitan's ``TokenDispatcher``: dispatch, and combine that returns rows sorted by expert, not summed yet."""

    def __init__(self, config: Any, *, group: Group, sync: bool = True) -> None:
        self.num_experts: int = config.num_experts
        self.top_k: int = config.top_k
        self.score_before_experts: bool = config.score_before_experts
        if self.num_experts != group.sizes.n_experts:
            raise ValueError(f"num_experts: {self.num_experts}, the group has {group.sizes.n_experts}")
        self._rows = _Rows(group, sync)

    def dispatch(
        self,
        x: torch.Tensor,
        top_scores: torch.Tensor,
        selected_experts_indices: torch.Tensor,
        num_tokens_per_expert: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, DispatchMetadata]:
        """x [N, H], scores and experts [N, K]: rows of the local experts, their counts, and what combine needs."""
        experts = selected_experts_indices.reshape(-1)
        order = torch.argsort(experts, stable=True)
        scores, tokens = top_scores.reshape(-1)[order], order // self.top_k
        rows = x[tokens]
        if self.score_before_experts:
            rows = (rows.float() * scores[:, None]).to(x.dtype)
        counts = num_tokens_per_expert
        if counts is None:
            counts = torch.zeros(self.num_experts, dtype=torch.int64, device=x.device)
            counts.scatter_add_(0, experts.long(), torch.ones_like(experts, dtype=torch.int64))
        received_rows, local_counts, received = self._rows.dispatch(rows, counts)
        return received_rows, local_counts, DispatchMetadata(tokens, scores, received)

    def combine(self, routed_output: torch.Tensor, metadata: DispatchMetadata, *_: Any) -> torch.Tensor:
        """[N K, H], in the order of ``metadata.token_indices_experts_sorted``."""
        return self._rows.combine(routed_output, metadata.received)
