"""What the GPU can do at best, measured in the same run: copying memory, and a large matrix product."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..ceilings import Ceilings
from ..harness import Settings

__all__ = ["DeviceCeilings"]


class DeviceCeilings(Ceilings):
    """Bytes per second of a device-to-device copy (read plus written) and FLOPs per second of a product of random matrices."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        if settings.device.type == "cuda":
            self._measure()

    def again(self, threads: int, quick: bool = False) -> None:
        """A GPU has no neighbours: once is enough."""

    def get(self, kind: str, threads: int) -> float | None:
        entry = self.values.get(f"{kind} gpu")
        return None if entry is None else float(entry["value"])

    def _measure(self) -> None:
        source = torch.empty(1 << 30, dtype=torch.int32, device="cuda").random_()
        target = torch.empty_like(source)
        size = 2 * source.numel() * source.element_size()
        self.note("read gpu", size / _median(partial(target.copy_, source)), "device copy of 4 GiB, bytes read and written")
        for dtype in (torch.bfloat16, torch.float32):
            name = str(dtype).removeprefix("torch.")
            a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
            self.note(f"gemm {name} gpu", 2 * 8192**3 / _median(partial(torch.matmul, a, b)), "random a @ b, 8192^3")


def _median(run: Callable[[], Any]) -> float:
    for _ in range(3):
        run()
    seconds = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)
