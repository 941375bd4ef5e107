"""moe_mlp at the geometry of the mini model: 1 to 8192 tokens, three kinds of routing, forward and with backward, quantised experts."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llada_kernels.ops import QuantizedExperts, Routing
from llada_kernels.ops.moe_mlp import moe_mlp

from .checks import as_exact_as
from .harness import Case, Settings, Variant, backends
from .moe_baselines import exact_expert_gradients, exact_tokens, grouped_mm_mlp, official_loop
from .runner import main
from .shapes import MINI, ROUTINGS, expert_weights, mini_routing

OP = importlib.import_module("llada_kernels.ops.moe_mlp")
Call = Callable[[Tensor, Routing, Tensor, Tensor], Tensor]
#: tokens, routing: forward cases per dtype
FULL = {
    torch.bfloat16: [(1, "uniform"), *[(32, r) for r in ROUTINGS], *[(512, r) for r in ROUTINGS], (2048, "uniform"), (8192, "uniform")],
    torch.float32: [(32, "uniform"), (512, "uniform")],
}
#: kind of the experts: tokens of its cases, and how far values may be from those of the unquantised weights (Frobenius, relative)
QUANTIZED = {"int8": ((32, 512), 0.012), "int4": ((32, 512), 0.16)}
QUICK = {torch.bfloat16: [(1, "uniform"), (32, "llada-block")], torch.float32: [(32, "zipf0.5")]}


def cases(settings: Settings) -> Iterator[Case]:
    quick = settings.quick
    hidden, width, experts = (256, 64, 16) if quick else (MINI["H"], MINI["I"], MINI["E"])
    for dtype, forwards in (QUICK if quick else FULL).items():
        weights = None
        trained = 64 if quick else 2048
        wanted = [(t, r, False) for t, r in forwards] + ([(trained, "uniform", True)] if dtype == torch.bfloat16 else [])
        for tokens, kind, backward in wanted:
            name = f"{tokens} tokens, {kind}, forward{'+backward' if backward else ''}"
            if not settings.wants(name, dtype):
                continue
            weights = expert_weights(dtype, experts, width, hidden) if weights is None else weights
            yield (forward_backward if backward else forward)(name, tokens, kind, dtype, weights, settings)
        if dtype == torch.bfloat16 and settings.wants(name := f"{trained} tokens, uniform, forward+backward, freed memory kept", dtype):
            weights = expert_weights(dtype, experts, width, hidden) if weights is None else weights
            with freed_memory_kept():
                yield forward_backward(name, trained, "uniform", dtype, weights, settings)
        if dtype == torch.bfloat16:
            yield from quantized_cases(settings, experts, width, hidden, weights)


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """The C library keeps what is freed: the 1.6 GB of gradients of a call are pages that the process had before.

    With fresh pages F.grouped_mm took 1.0 to 1.2 s instead of 0.61 s, native 0.65 to 1.45 s instead of 0.58 s.
    """
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library keeps what it likes
        yield
        return
    mallopt(mmap_max, 0), mallopt(trim_threshold, -1)
    try:
        yield
    finally:
        mallopt(mmap_max, 65536), mallopt(trim_threshold, 128 << 10)


def quantized_cases(
    settings: Settings, experts: int, width: int, hidden: int, weights: tuple[Tensor, Tensor] | None
) -> Iterator[Case]:  # fmt: skip
    for kind, (all_tokens, bound) in QUANTIZED.items():
        packed = None
        for tokens in all_tokens[: 1 if settings.quick else None]:
            if settings.wants(name := f"{tokens} tokens, uniform, {kind} experts, forward", torch.bfloat16):
                weights = expert_weights(torch.bfloat16, experts, width, hidden) if weights is None else weights
                packed = [QuantizedExperts.quantize(w, kind) for w in weights] if packed is None else packed
                yield quantized(name, tokens, weights, packed, bound, settings)


def quantized(
    name: str, tokens: int, weights: tuple[Tensor, Tensor], packed: list[QuantizedExperts], bound: float, settings: Settings
) -> Case:
    """The same layer with quantised and with bf16 weights; the latter is other work (more bytes), compared by its rate."""
    x, routing = make(tokens, "uniform", torch.bfloat16, weights)
    sample = torch.randperm(tokens, generator=torch.Generator().manual_seed(2))[:16]
    exact = exact_tokens(x, routing, *weights, sample, torch.float64)

    def call(backend: str, gate_up: Tensor | QuantizedExperts, down: Tensor | QuantizedExperts) -> Tensor:
        with torch.no_grad():
            return moe_mlp(x, routing, gate_up, down, backend=backend)

    def error(y: Tensor) -> float:
        return float((y[sample].double() - exact).norm() / exact.norm())

    def check(y: Tensor) -> str | None:
        return None if error(y) <= bound else f"relative error {error(y):.4f}, allowed {bound}"

    def facts(run: Callable[[], Tensor]) -> dict[str, float]:
        return {"relative_error": round(error(run()), 5)}

    rows = routing.offsets.diff()
    distinct, (experts, hidden, width) = int((rows > 0).sum()), weights[1].shape
    size = sum(t.numel() * t.element_size() for q in packed for t in (q.data, q.scales)) / experts * distinct + 4.0 * x.numel()
    variants = backends(OP, lambda backend: call(backend, *packed))
    if settings.threads > 1:
        variants.insert(1, Variant("native, 1 thread", lambda: call("native", *packed), threads=1))
    for variant in variants:
        variant.extra = partial(facts, variant.run)
    variants.append(Variant("native, bf16 weights", lambda: call("native", *weights), "yardstick"))
    shapes = {
        "tokens": tokens, "hidden": hidden, "width": width, "experts": experts, "top_k": routing.topk_ids.shape[1],
        "distinct_experts": distinct, "group_size": packed[0].group_size,
    }  # fmt: skip
    flops = 6.0 * tokens * routing.topk_ids.shape[1] * width * hidden
    return Case("moe_mlp", name, torch.bfloat16, shapes, variants, check, flops, size)


def forward(name: str, tokens: int, kind: str, dtype: torch.dtype, weights: tuple[Tensor, Tensor], settings: Settings) -> Case:
    x, routing = make(tokens, kind, dtype, weights)
    sample = torch.randperm(tokens, generator=torch.Generator().manual_seed(2))[:16]
    exact, same = (exact_tokens(x, routing, *weights, sample, d) for d in (torch.float64, dtype))

    # Few tokens touch few experts, which a cache would keep from call to call: other experts each time.
    others = range(1, 16 if tokens * MINI["K"] < weights[0].shape[0] else 1)
    routings = [routing, *(mini_routing(tokens, kind, seed, weights[0].shape[0]) for seed in others)]

    def one(call: Call) -> Callable[[], Tensor]:
        turn = itertools.cycle(routings)

        def run() -> Tensor:
            with torch.no_grad():
                return call(x, next(turn), *weights)

        return run

    return case(name, routing, dtype, weights, one, as_exact_as([exact], [same], lambda y: [y[sample]]), 6, 1, settings)


def forward_backward(name: str, tokens: int, kind: str, dtype: torch.dtype, weights: tuple[Tensor, Tensor], settings: Settings) -> Case:
    x, routing = make(tokens, kind, dtype, weights)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    sample = torch.randperm(tokens, generator=torch.Generator().manual_seed(2))[:8]
    expert = int(routing.offsets.diff().argmax())

    def one(call: Call) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            leaves = [t.detach().requires_grad_() for t in (x, *weights, routing.topk_weights)]
            out = call(leaves[0], routing._replace(topk_weights=leaves[3]), leaves[1], leaves[2])
            return out.detach(), *torch.autograd.grad(out, leaves, grad)

        return run

    def values(d: torch.dtype) -> list[Tensor]:
        leaf = x.to(d).requires_grad_()
        out = exact_tokens(leaf, routing, *weights, sample, d)
        (grad_x,) = torch.autograd.grad(out, leaf, grad[sample].to(d))
        return [out.detach(), grad_x[sample], *exact_expert_gradients(x, routing, *weights, grad, expert, d)]

    def pick(result: tuple[Tensor, ...]) -> list[Tensor]:
        out, grad_x, grad_gate_up, grad_down, _ = result
        return [out[sample], grad_x[sample], grad_gate_up[expert], grad_down[expert]]

    # Each call has 1.6 GB of fresh gradients, so times spread by what the machine does with pages.
    return case(name, routing, dtype, weights, one, as_exact_as(values(torch.float64), values(dtype), pick), 18, 3, settings, least=7)


def make(tokens: int, kind: str, dtype: torch.dtype, weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Routing]:
    experts, hidden = weights[0].shape[0], weights[0].shape[2]
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x, mini_routing(tokens, kind, experts=experts)


def case(
    name: str, routing: Routing, dtype: torch.dtype, weights: tuple[Tensor, Tensor], one: Callable[[Call], Callable[[], Any]],
    check: Callable[[Any], str | None], flops_per_pair: int, passes: int, settings: Settings, least: int = 0,
) -> Case:  # fmt: skip
    """``passes``: how often weights come from or go to memory: read; or read, read again and gradients written."""
    experts, hidden, width = weights[0].shape[0], weights[0].shape[2], weights[1].shape[2]
    tokens, top_k = routing.topk_ids.shape
    rows = routing.offsets.diff()
    distinct = int((rows > 0).sum())
    ways = {b.name: one(partial(moe_mlp, backend=b.name)) for b in OP.BACKENDS}
    variants = backends(OP, lambda backend: ways[backend]())
    single = one(lambda *a: moe_mlp(*a, backend="native"))
    if settings.threads > 1 and tokens >= 32:
        variants.insert(1, Variant("native, 1 thread", single, threads=1))
    variants.append(Variant("F.grouped_mm", one(grouped_mm_mlp)))
    variants.append(Variant("official per-expert loop", one(official_loop)))
    shapes = {
        "tokens": tokens, "hidden": hidden, "width": width, "experts": experts, "top_k": top_k, "distinct_experts": distinct,
        "rows_per_expert": [int(rows.min()), int(rows.median()), int(rows.max())],
    }  # fmt: skip
    one_expert = 3 * width * hidden * weights[0].element_size()
    size = passes * distinct * one_expert + 2 * tokens * hidden * weights[0].element_size()
    flops = float(flops_per_pair * tokens * top_k * width * hidden)
    return Case("moe_mlp", name, dtype, shapes, variants, check, flops, float(size), least=least)


if __name__ == "__main__":
    sys.exit(main("moe_mlp", cases))
