"""What this machine can do at best, measured in the run whose results are compared with it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

__all__ = ["Ceilings", "array_bytes", "last_level_cache"]

_SOURCE = Path(__file__).with_name("read_bandwidth.cpp")
_GEMM_DTYPES = (torch.bfloat16, torch.float32)


class Ceilings:
    """Read bandwidth and GEMM arithmetic per number of threads: the best of everything seen in the run, and bandwidth at any moment.

    Two threads of a virtual machine read 42 or 75 GB/s, from one second to the next, probably by where the host places them (measured
    with one loop, pages of 4 KB and of 2 MB alike, while one thread reads 40 and two compute at full speed in both states). So what is
    bound by bandwidth is compared with what could be read beside each of its repetitions, :meth:`read_now`.

    Attributes:
        values: ``{"read 2": {"value": 52e9, "how": "..."}, "gemm bfloat16 2": ...}`` in bytes and FLOPs per second.
    """

    def __init__(self, values: dict[str, dict[str, Any]] | None = None) -> None:
        self.values = {} if values is None else values
        self._library: ctypes.CDLL | None = None
        self._data = self._size = self._place = 0
        self._streams: dict[int, int] = {}  # per number of threads: streams of a thread with which most was read

    def __del__(self) -> None:
        if self._library is not None:
            self._library.bench_free(self._data, self._size)

    def measure(self, threads: int, quick: bool = False) -> None:
        """Measure with one and with ``threads`` threads; later measurements only raise what is known."""
        seconds = 0.02 if quick else 0.2
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            for dtype in _GEMM_DTYPES:
                self._gemm(dtype, count, [1024] if quick else [1024, 2048, 4096], seconds)
        self._read(sorted({1, threads}), array_bytes(quick), seconds)
        torch.set_num_threads(threads)

    def again(self, threads: int, quick: bool = False) -> None:
        """A quarter of a second more of the read bandwidth and of products, between cases: neighbours of a shared machine come and go."""
        torch.set_num_threads(threads)
        for dtype in _GEMM_DTYPES:
            self._gemm(dtype, threads, [1024], 0.02 if quick else 0.06)
        self._read([threads], array_bytes(quick), 0.01 if quick else 0.1)

    def settle(self, threads: int, quick: bool = False, tries: int = 20) -> None:
        """At the end of a run: measure again what ``threads`` threads did hardly better than one (by less than half), and drop it where
        they stay at or below one.

        Such a ceiling tells of moments in which the threads shared one core; shares of it would be of nothing. Rows whose least time it
        sets then have no share.
        """
        for dtype in _GEMM_DTYPES:
            name = f"gemm {str(dtype).removeprefix('torch.')}"
            one, left = self.get(name, 1), tries
            if threads == 1 or one is None:
                continue
            while left and (self.get(name, threads) or 0.0) < 1.5 * one:
                left -= 1
                torch.set_num_threads(threads)
                self._gemm(dtype, threads, [1024], 0.02 if quick else 0.1)
            if (self.get(name, threads) or 0.0) <= one:
                self.values.pop(f"{name} {threads}", None)

    def read_now(self, threads: int, size: float | None) -> float | None:
        """Bytes per second that ``threads`` threads read at this moment, from memory in pages of 2 MB; it takes about 3 ms.

        None for work of ``size`` bytes that a cache could hold in good part: reading beside it would drive it out. None without a compiler.
        """
        if self._library is None or size is None or size < 2 * last_level_cache():
            return None
        part = self._size // 8
        self._place = (self._place + part) % self._size
        streams = self._streams.get(threads, 2)
        return part / self._library.bench_read(self._data + self._place, part, threads, streams, ctypes.byref(ctypes.c_uint64()))

    def get(self, kind: str, threads: int) -> float | None:
        """The ceiling of ``kind`` ("read", "gemm bfloat16", "gemm float32") for a number of threads, if it was measured."""
        entry = self.values.get(f"{kind} {threads}")
        return None if entry is None else float(entry["value"])

    def floor(
        self, flops: float | None, size: float | None, arithmetic: str, threads: int, read: float | None = None
    ) -> tuple[float, str] | None:
        """Least seconds for this work and the ceiling that sets them, "bandwidth" or "arithmetic"; ``read``: the bandwidth beside it."""
        read, gemm = read or self.get("read", threads), self.get(f"gemm {arithmetic}", threads)
        floors = []
        if size and read:
            floors.append((size / read, "bandwidth"))
        if flops and gemm:
            floors.append((flops / gemm, "arithmetic"))
        return max(floors, default=None)

    def note(self, name: str, value: float, how: str) -> None:
        """Keep ``value`` if it is the best so far."""
        if value > self.values.get(name, {"value": 0.0})["value"]:
            self.values[name] = {"value": value, "how": how}

    def _gemm(self, dtype: torch.dtype, threads: int, sizes: list[int], seconds: float) -> None:
        name = str(dtype).removeprefix("torch.")
        for n in sizes:
            best = self.get(f"gemm {name}", threads)
            if best and 2 * n**3 / best > seconds:  # a ceiling is known well enough from products of a third of a second
                break
            a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
            ways: dict[str, Callable[[], Any]] = {"a @ b.T": partial(torch.matmul, a, b.T), "a @ b": partial(torch.matmul, a, b)}
            if n <= 2048 and (own := _own_gemm(a, b)) is not None:
                ways["native grouped_gemm"] = own
            for how, way in ways.items():
                self.note(f"gemm {name} {threads}", 2 * n**3 / _best(way, seconds / len(sizes)), f"{how}, {n}^3")

    def _read(self, counts: list[int], size: int, seconds: float) -> None:
        library = _library()
        if library is None:  # no compiler: a matrix-vector product reads faster than torch.sum
            matrix = torch.ones(size // (4 * 4096), 4096)
            vector = torch.ones(4096)
            for threads in counts:
                torch.set_num_threads(threads)
                self.note(f"read {threads}", matrix.numel() * 4 / _best(lambda: matrix @ vector, seconds), "fp32 matrix-vector product")
            return
        if self._library is None:
            self._data, self._size = library.bench_allocate(size), size
            if not self._data:
                raise MemoryError(f"cannot allocate {size} bytes to measure the read bandwidth")
            self._library = library
        data, size = self._data, self._size
        total = ctypes.c_uint64()
        for threads in counts:
            for streams in (1, 2, 4):
                for _ in range(max(2, round(seconds * 15))):
                    elapsed = library.bench_read(data, size, threads, streams, ctypes.byref(total))
                    if size / elapsed > (self.get("read", threads) or 0.0):
                        self._streams[threads] = streams
                    self.note(f"read {threads}", size / elapsed, f"vector loop, {size >> 20} MiB, {streams} streams per thread")


def last_level_cache() -> int:
    """Bytes of the largest cache of CPU 0, or 32 MiB where the system does not say."""
    sizes = [0]
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes) or 32 << 20


def array_bytes(quick: bool = False) -> int:
    """An array far beyond the caches, within a quarter of the memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wanted = 16 * last_level_cache() if quick else max(1 << 30, 8 * last_level_cache())
    return min(wanted, memory // 4) >> 16 << 16


def _best(run: Callable[[], Any], seconds: float) -> float:
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        begin = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - begin)
        if now > end:
            return best


def _own_gemm(a: torch.Tensor, b: torch.Tensor) -> Callable[[], Any] | None:
    """Our own product, where the compiled library is there: a ceiling must not be below what we reach ourselves."""
    from llada_kernels import _library
    from llada_kernels.ops.grouped_gemm import grouped_gemm

    if _library.load_error is not None:
        return None
    offsets = torch.tensor([0, a.shape[0]], dtype=torch.int32)
    return lambda: grouped_gemm(a, b[None], offsets, backend="native")


def _cpu_flags() -> bytes:
    """What -march=native depends on: a checkout may be seen by several machines."""
    try:
        with open("/proc/cpuinfo", "rb") as lines:
            return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    except OSError:
        return b""


def _library() -> ctypes.CDLL | None:
    """The compiled helper, or None without a working compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        return None
    command = [compiler, "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
    key = hashlib.sha256(_SOURCE.read_bytes() + " ".join(command).encode() + _cpu_flags()).hexdigest()[:16]
    folder = _SOURCE.parent.parent / "build" / "bench"
    built = folder / f"read_bandwidth-{key}.so"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            target = Path(temporary) / "out.so"
            result = subprocess.run([*command, str(_SOURCE), "-o", str(target)], capture_output=True, text=True)
            if result.returncode:
                print(f"read bandwidth: {compiler} failed, using torch\n{result.stderr[:500]}", file=sys.stderr)
                return None
            os.replace(target, built)
    library = ctypes.CDLL(str(built))
    library.bench_allocate.restype, library.bench_allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.bench_free.restype, library.bench_free.argtypes = None, [ctypes.c_void_p, ctypes.c_size_t]
    library.bench_read.restype = ctypes.c_double
    library.bench_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_uint64)]
    return library
