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


def test_copies_around_a_step_are_those_that_are_asked_for():
    import torch
    from epd.torch.staging import Copies

    staged = [torch.empty(10, 4), torch.empty(10, 2, dtype=torch.int64), torch.empty(10, 3)]
    rows = [tensor.stride(0) * tensor.element_size() for tensor in staged]
    copies = Copies((staged[0],), (staged[1], staged[2]))

    def expect(n_tokens: int, *others: int) -> None:
        found = copies.array(n_tokens, *others)
        for i, (tensor, row, other) in enumerate(zip(staged, rows, others, strict=True)):
            to, source = (tensor.data_ptr(), other) if i == 0 else (other, tensor.data_ptr())
            assert (found[i].to or 0, getattr(found[i], "from") or 0) == (to, source)
            assert found[i].bytes == (n_tokens * row if other else 0)

    expect(10, 4096, 8192, 12288)
    expect(7, 4096, 8192, 12288)
    expect(7, 4096, 0, 12288)  # the second is not wanted this time
    expect(7, 4096, 8192, 0)
    expect(7, 4096, 8192, 12288)
    expect(0, 4096, 8192, 12288)


def test_a_tensor_that_is_no_memory_of_the_gpu_is_located_to_be_told_by_its_name():
    import torch
    from epd.torch.memory import CudaMemory

    class Plain:
        """A group with a GPU, as far as addresses go."""

        def allocation_id(self, address: int) -> int:
            raise epd.InvalidArgument(f"buffer {address:#x}: not device memory of this process")

    memory, tensor = CudaMemory(Plain(), torch.device("cuda:0")), torch.empty(4)
    assert memory.mark(tensor) != memory.mark(tensor)  # no plan is found by it
    with pytest.raises(epd.InvalidArgument, match="dw1: on cpu, want cuda:0"):
        memory.locate(tensor, "dw1")
