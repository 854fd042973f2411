"""epd.torch on the host backend: the cases of torch_cases, each rank a thread with a client of its own."""

from __future__ import annotations

import epd
import pytest
from ranks import fresh_name, on_threads

pytest.importorskip("torch", reason="no PyTorch")

from torch_cases import adapters, grouped, moe  # noqa: E402
from torch_cases.rank import Rank  # noqa: E402

CASES = moe.CASES + moe.HOST_CASES + grouped.CASES + adapters.CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("world", [2])
def test_torch(socket, case, world):
    prefix = fresh_name()

    def body(index: int) -> None:
        with epd.connect(socket) as client:
            case(Rank(client, index, world, prefix))

    on_threads(world, body)
