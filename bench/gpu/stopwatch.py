"""Timing on a GPU: what the device spends on a call, its inputs out of the L2 cache and its launches waiting in the queue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..harness import Stopwatch, Variant

__all__ = ["DeviceStopwatch"]

#: More than the L2 cache of any GPU so far (H100, H200: 50 to 60 MB).
FLUSHED_BYTES = 256 << 20
#: Cycles for which the device is kept busy while the host queues the call: about a millisecond at 2 GHz.
HEAD_START = 2_000_000


class DeviceStopwatch(Stopwatch):
    """Seconds that a call takes on the current device.

    Before every call the L2 cache is overwritten and the device waits a millisecond, during which the host queues all launches of the
    call: gaps between launches are the device's, not Python's. A variant with ``capture`` is replayed as a CUDA graph where it can be
    captured. A call with syncs pays for them, as its users do.

    Attributes:
        graphs: of the variants that were captured, by the identity of their call.
    """

    def __init__(self) -> None:
        super().__init__()
        self._flushed = torch.empty(FLUSHED_BYTES // 4, dtype=torch.int32, device="cuda")
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.graphs: dict[int, tuple[Callable[[], Any], torch.cuda.CUDAGraph]] = {}

    def settle(self, variant: Variant, first: float) -> float:
        """The second call: the first one compiled."""
        if variant.capture:
            self._capture(variant.run)
        return self(variant, 1)

    def calls(self, seconds: float) -> int:
        return 1

    def __call__(self, variant: Variant, calls: int) -> float:
        _, graph = self.graphs.get(id(variant.run), (None, None))
        self._flushed.zero_()
        torch.cuda._sleep(HEAD_START)
        self._begin.record()
        if graph is None:
            variant.run()
        else:
            graph.replay()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3

    def _capture(self, run: Callable[[], Any]) -> None:
        graph = torch.cuda.CUDAGraph()
        side, before = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(before)
        try:
            with torch.cuda.stream(side):
                run()  # warm up on a stream that is not the default one, as the capture
            before.wait_stream(side)
            with torch.cuda.graph(graph):
                run()
        except Exception:  # whatever the call did that a graph cannot hold: it is timed without one
            torch.cuda.set_stream(before)  # a capture that fails stays on its own
            torch.cuda.synchronize()
            return
        self.graphs[id(run)] = run, graph  # with the call, so that its identity stays its own
