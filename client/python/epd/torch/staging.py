"""Where the tokens of a group's layers pass through: plans are bound to it. Internal."""

from __future__ import annotations

import ctypes as c
import dataclasses
from typing import Any

import torch

from .. import structs
from .memory import Memory


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a group was joined with."""

    n_experts: int
    top_k: int
    hidden: int
    ffn: int
    max_tokens: int
    dtype: torch.dtype
    alignment: int = 1


class Copies:
    """Copies around a launch, as :meth:`epd.Plan.step` takes them: into staging tensors, and out of others.

    One end of each is known, and the number of bytes changes with the tokens alone; so a step fills in the other ends.
    """

    def __init__(self, into: tuple[torch.Tensor, ...], out_of: tuple[torch.Tensor, ...]) -> None:
        self._staged = into + out_of
        self._n_tokens, self._has_gaps = -1, False
        self._words = (c.c_uint64 * (3 * len(self._staged)))()  # of each: to, from, bytes
        self._array = c.cast(self._words, c.POINTER(structs.epd_copy))
        for i, tensor in enumerate(self._staged):
            self._words[3 * i + (i >= len(into))] = tensor.data_ptr()
        self._open = tuple(3 * i + (i < len(into)) for i in range(len(self._staged)))

    def array(self, n_tokens: int, *others: int) -> Any:
        """The copies of n_tokens rows from and to the other addresses, none where that is 0; valid until the next call."""
        words, has_gaps = self._words, 0 in others
        if n_tokens != self._n_tokens or has_gaps or self._has_gaps:
            for i, tensor in enumerate(self._staged):
                words[3 * i + 2] = n_tokens * tensor.stride(0) * tensor.element_size() if others[i] else 0
            self._n_tokens, self._has_gaps = n_tokens, has_gaps
        for place, address in zip(self._open, others, strict=True):
            words[place] = address
        return self._array


class Staging:
    """Tensors that plans are bound to and that steps copy into and out of, in the order of the stream.

    A plan is bound to addresses, a tensor of PyTorch comes with another one each time, so tokens pass through here: one
    copy in and one out. tokens_in, tokens_out [T, H]; topk_idx [T, K] i64; topk_weights, d_weights [T, K] f32.
    """

    def __init__(self, memory: Memory, sizes: Sizes) -> None:
        n, k = sizes.max_tokens, sizes.top_k
        self.tokens_in = memory.empty((n, sizes.hidden), sizes.dtype)
        self.tokens_out = memory.empty((n, sizes.hidden), sizes.dtype)
        self.topk_idx = memory.empty((n, k), torch.int64)
        self.topk_weights = memory.empty((n, k), torch.float32)
        self.d_weights = memory.empty((n, k), torch.float32)
        self.forward_copies = Copies((self.tokens_in, self.topk_idx, self.topk_weights), (self.tokens_out,))
        self.backward_copies = Copies((self.tokens_in,), (self.d_weights, self.tokens_out))
        self._n = n
        self._views = self._all = (self.tokens_in, self.tokens_out, self.topk_idx, self.topk_weights, self.d_weights)

    def views(self, n_tokens: int) -> tuple[torch.Tensor, ...]:
        """tokens_in, tokens_out, topk_idx, topk_weights and d_weights, of the first n_tokens tokens."""
        if n_tokens != self._n:
            self._views = tuple(tensor[:n_tokens] for tensor in self._all)
            self._n = n_tokens
        return self._views
