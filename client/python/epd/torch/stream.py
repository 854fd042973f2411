"""How a plan is launched from PyTorch: on the current stream, or into the graph that it is capturing. Internal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..errors import Error
from ..plan import Plan

if TYPE_CHECKING:
    from .graph import CUDAGraph


def raw_stream(device_index: int) -> int:
    """The current stream of the device as a number."""
    if _raw_stream is not None:
        return int(_raw_stream(device_index))
    return int(torch.cuda.current_stream(device_index).cuda_stream)


# Without making a Stream object, which the step path needs only when the stream has changed.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_is_capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing)


class Launcher:
    """Launches the plans of one group. Failures of steps are raised by a later call: streams are never waited for here."""

    def __init__(self, device: torch.device, abandon: Callable[[], None]) -> None:
        """abandon: called when a step of the host backend may have been left in flight."""
        self._device = device
        self._abandon = abandon
        self._is_cuda = device.type == "cuda"

    def __call__(self, plan: Plan) -> None:
        """One step, in the order of the current stream; on the host backend it has ended when this returns."""
        if not self._is_cuda:
            try:
                plan.launch()
                plan.wait()
            except BaseException:  # an interrupt too
                self._abandon()
                raise
            return
        graph, stream = capturing_graph(), raw_stream(self._device.index)
        if graph is None:
            plan.step(stream, None, 0, 0)  # looks for a failure first
        else:
            plan.check()
            plan.capture(stream)
            graph.add(plan)


# The graphs that are being captured: one at a time in a process, in torch.cuda.graph.
_capturing: list[CUDAGraph] = []


def begin_capture(graph: CUDAGraph) -> None:
    _capturing.append(graph)


def end_capture(graph: CUDAGraph) -> None:
    _capturing.remove(graph)


def capturing_graph() -> CUDAGraph | None:
    """The graph that the current CUDA stream is capturing. Raises RuntimeError if that is none of epd's."""
    if not _is_capturing():
        return None
    if not _capturing:
        raise RuntimeError(
            "epd: the current stream is capturing a torch.cuda.CUDAGraph; capture into an epd.torch.CUDAGraph, whose replay "
            "announces its launches to the daemon"
        )
    return _capturing[-1]


def first_failure(plans: list[Plan], wait: bool) -> Error | None:
    """What the first of the plans with a failed launch failed of; with wait, after all have ended."""
    for plan in plans:
        try:
            if wait:
                plan.wait()
            else:
                plan.check()
        except Error as error:
            return error
    return None
