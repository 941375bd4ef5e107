"""The CUDA C++ kernels on a CPU: the same sources, every thread of every block, compiled by a C++ compiler (cuda_emulation.h)."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent.parent / "build" / "cuda-emulation"


@functools.cache
def load() -> Any:
    """torch.ops.llada_kernels_emulated: operators of CPU tensors. Compiled first where a source changed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path}
    configure = ["cmake", "-S", str(HERE), "-B", str(BUILD), "-DCMAKE_BUILD_TYPE=Release", f"-DTORCH_ROOT={Path(torch.__file__).parent}"]
    if not (BUILD / "CMakeCache.txt").exists() and shutil.which("ninja", path=path):
        configure += ["-G", "Ninja"]
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run in several processes
        for command in (configure, ["cmake", "--build", str(BUILD), "-j", "2"]):
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    torch.ops.load_library(str(BUILD / "_emulated.so"))
    return torch.ops.llada_kernels_emulated


class _Redirected(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "llada_kernels":
            func = getattr(load(), func._opname).default
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def emulated_cuda(order: int = 0) -> Iterator[None]:
    """Native operators called inside run the emulated CUDA kernels; threads and blocks in rising (0), falling (1) or shuffled order."""
    load().set_order(order)
    with _Redirected():
        yield
