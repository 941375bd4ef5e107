"""What must hold of every call on a GPU, beside right values: no sync, no recompilation, the same bits, fit for a CUDA graph."""

from __future__ import annotations

import importlib
import pkgutil
import random
from collections.abc import Callable
from typing import Any

import torch

from llada_kernels import ops

from ..harness import Settings
from .operations import INFERENCE, operations

__all__ = ["run"]

Fact = dict[str, Any]


def run(settings: Settings, batches: int = 100, runs: int = 100) -> list[Fact]:
    """One fact per guard: its name, whether it holds (None: not to be seen on this machine), and what was seen."""
    facts = []
    for name, guard in (
        (f"no sync over {batches} batches of random lengths", lambda: _syncs(settings, batches)),
        (f"no recompilation over {batches} batches of random lengths", lambda: _recompilations(settings, batches)),
        (f"bitwise equal over {runs} runs", lambda: _repeatable(settings, runs)),
        ("capturable in a CUDA graph", lambda: _capturable(settings)),
    ):
        try:
            holds, seen = guard()
        except Exception as error:  # the other guards still tell something
            holds, seen = False, f"{type(error).__name__}: {error}".splitlines()[0][:300]
        facts.append({"name": name, "holds": holds, "seen": seen})
    return facts


def _random_lengths(settings: Settings, seed: int) -> list[int]:
    draw = random.Random(seed)
    longest = 48 if settings.quick else 700
    return [draw.randint(1, longest) for _ in range(draw.randint(1, 4))]


def _syncs(settings: Settings, batches: int) -> tuple[bool | None, str]:
    on_gpu = settings.device.type == "cuda"
    waited: dict[str, str] = {}
    for seed in range(batches):
        for name, call in operations(_random_lengths(settings, seed), settings).items():
            if on_gpu:
                torch.cuda.set_sync_debug_mode("error")
            try:
                call()
            except RuntimeError as error:
                if "synchroniz" not in str(error):
                    raise
                waited[name] = str(error).splitlines()[0][:120]
            finally:
                if on_gpu:
                    torch.cuda.set_sync_debug_mode("default")
    if not on_gpu:
        return None, f"{batches} batches ran on a CPU, where nothing can wait"
    return not waited, f"{batches} batches; " + ("; ".join(f"{k}: {v}" for k, v in waited.items()) or "no call waited")


def _kernels() -> dict[str, Any]:
    """The Triton kernels of all ops that were imported."""
    found = {}
    for module in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}."):
        if module.name.rpartition(".")[2].startswith("triton"):
            for name, value in vars(importlib.import_module(module.name)).items():
                if hasattr(value, "device_caches"):
                    found[f"{value.__module__}.{name}"] = value
    return found


def _compiled() -> int:
    return sum(len(entry[0]) for kernel in _kernels().values() for entry in kernel.device_caches.values())


def _recompilations(settings: Settings, batches: int) -> tuple[bool | None, str]:
    # The first batches meet what there is to meet: lengths that are multiples of 16 and others, one document
    # and several, few and many tokens for each expert.
    longest = 48 if settings.quick else 700
    for lengths in ([5], [64], [33], [64, 64], [1, 47], [16, 5, longest], [longest] * 4):
        for call in operations(lengths, settings).values():
            call()
    before = _compiled()
    for seed in range(batches):
        for call in operations(_random_lengths(settings, 1000 + seed), settings).values():
            call()
    after = _compiled()
    if settings.device.type != "cuda":
        return None, f"{batches} batches ran in the interpreter, which compiles nothing"
    return after == before and before > 0, f"{before} compiled kernels before, {after} after {batches} batches"


def _repeatable(settings: Settings, runs: int) -> tuple[bool | None, str]:
    lengths = [40, 8] if settings.quick else [700, 33, 256]
    different = []
    for name, call in operations(lengths, settings).items():
        first = call()
        for _ in range(runs - 1):
            if not all(torch.equal(a, b) for a, b in zip(first, call(), strict=True)):
                different.append(name)
                break
    return not different, f"{runs} runs of each op; " + (f"different bits: {', '.join(different)}" if different else "all equal")


def _capturable(settings: Settings) -> tuple[bool | None, str]:
    calls = operations([40, 8] if settings.quick else [700, 33], settings, backward=False)
    if settings.device.type != "cuda":
        for name in INFERENCE:
            calls[name]()
        return None, "the calls ran on a CPU, which has no graphs"
    wrong = []
    for name in INFERENCE:
        expected = calls[name]()
        problem = _replay(calls[name], expected)
        if problem:
            wrong.append(f"{name}: {problem}")
    return not wrong, "; ".join(wrong) or f"{len(INFERENCE)} ops replayed with equal results"


def _replay(call: Callable[[], Any], expected: Any) -> str | None:
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            out = call()
    except Exception as error:
        torch.cuda.set_stream(before)  # a capture that fails stays on its own
        torch.cuda.synchronize()
        return f"{type(error).__name__}: {error}".splitlines()[0][:160]
    graph.replay()
    torch.cuda.synchronize()
    return None if all(torch.equal(a, b) for a, b in zip(out, expected, strict=True)) else "other values than without a graph"
