"""What a case knows of the rank that it runs on."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import epd
import epd.torch
import torch

DEADLINE_S = 30


class Rank:
    """One rank of the world: its client, its device, and groups whose names all ranks come to alike."""

    def __init__(self, client: epd.Client, rank: int, world: int, prefix: str) -> None:
        self.client = client
        self.rank = rank
        self.world = world
        self.is_cuda = client.info.backend == epd.Backend.CUDA
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.is_cuda else torch.device("cpu")
        self.dtype = torch.bfloat16 if self.is_cuda else torch.float32
        self._prefix = prefix
        self._numbers = itertools.count()

    @contextlib.contextmanager
    def group(self, **sizes: object) -> Iterator[epd.torch.Group]:
        """A group of all ranks, left after everybody has arrived at its end."""
        options: dict[str, object] = {"top_k": 2, "dtype": self.dtype, "deadline": DEADLINE_S}
        name = f"{self._prefix}-{next(self._numbers)}"
        joined = epd.torch.join(name, self.world, self.rank, client=self.client, device=self.device, **(options | sizes))
        with joined as group:
            yield group
            group.barrier()

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
