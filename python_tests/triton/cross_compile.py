"""Compiles what an op would launch on a GPU that is not there.

    with cross_compiling(90) as launches:
        y = swiglu(torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True), backend="triton")
        y.sum().backward()

Inside the block Triton sees a GPU of the given compute capability, a Triton backend takes CPU tensors for CUDA tensors, and a launch
compiles its kernel instead of running it. So the very configurations that would be launched are compiled, and every launch tells
registers, spills (by Triton's own ptxas), shared memory and instructions. Results of the op are uninitialised memory.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from llada_kernels.ops import _triton

#: Bytes of shared memory that one block may use.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
NUM_SMS = {80: 108, 86: 84, 89: 142, 90: 132}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, compiled."""

    name: str
    variant: str
    grid: tuple[int, ...]
    ptx: str
    shared: int
    num_warps: int

    @functools.cached_property
    def _resources(self) -> str:
        return _ptxas(self.ptx)

    @property
    def registers(self) -> int:
        return int(re.findall(r"Used (\d+) registers", self._resources)[-1])

    @property
    def spilled_bytes(self) -> int:
        return sum(int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", self._resources))

    @property
    def tensor_core_instructions(self) -> int:
        return self.ptx.count("wgmma.mma_async") + self.ptx.count("mma.sync")

    @property
    def wgmma(self) -> int:
        return self.ptx.count("wgmma.mma_async")


def check_resources(launches: list[Launch], arch: int) -> None:
    """No kernel may spill, or need more shared memory than a block of this GPU may have."""
    assert launches
    for launch in unique(launches):
        assert launch.spilled_bytes == 0, f"{launch.name} sm_{arch}: {launch._resources}"
        assert launch.shared <= SHARED_LIMIT[arch], f"{launch.name} sm_{arch}: {launch.shared} bytes of shared memory"


def unique(launches: list[Launch]) -> list[Launch]:
    """One launch per compiled kernel: as many as Triton compiles."""
    return list({launch.variant: launch for launch in launches}.values())


@contextlib.contextmanager
def cross_compiling(arch: int) -> Iterator[list[Launch]]:
    """Compile for compute capability ``arch`` (80, 86, 89, 90) whatever is launched inside; yields the list that fills."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    original_run = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        assert all(0 < size < 2**31 for size in grid) and all(size < 2**16 for size in grid[1:]), (self.__name__, grid)
        kernel = original_run(self, *args, grid=grid, warmup=True, **kwargs)
        metadata = kernel.metadata
        launches.append(Launch(self.__name__, kernel.hash, tuple(grid), kernel.asm["ptx"], metadata.shared, metadata.num_warps))
        return kernel

    before = driver._active
    driver.set_active(_NoDriver(arch))
    try:
        with (
            mock.patch.object(JITFunction, "run", run),
            mock.patch.object(_triton, "capability", lambda device: arch),
            mock.patch.object(_triton, "num_sms", lambda device: NUM_SMS[arch]),
            mock.patch.object(_triton, "device_type", "cpu"),
        ):
            yield launches
    finally:
        driver.set_active(before)


class _NoDriver:
    """What Triton asks its driver before it compiles. The device's number is its compute capability: kernels are cached per device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def _ptxas(ptx: str) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target\s+(\w+)", ptx)
    assert target is not None
    program = get_ptxas(int(re.sub(r"\D", "", target[1]))).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [program, "-v", f"--gpu-name={target[1]}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr
