"""Experts on a GPU: a decode layer (A), a training layer (B), the bare grouped product (C)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llada_kernels.ops import QuantizedExperts, Routing
from llada_kernels.ops.grouped_gemm import grouped_gemm
from llada_kernels.ops.moe_mlp import moe_mlp

from ..checks import as_exact_as
from ..harness import Case, Settings, Variant
from ..moe_baselines import exact_expert_gradients, exact_tokens, grouped_mm_mlp, official_loop
from ..shapes import MINI, ROUTINGS, mini_routing
from . import others
from .inputs import normal

__all__ = ["decode", "grouped", "training"]

Call = Callable[[Tensor, Routing, Any, Any], Tensor]
#: Relative error (Frobenius) that quantised weights, and with fp8 activations, may add.
ERRORS = {"int8": 0.015, "int4": 0.18, "fp8": 0.08}
#: The reference of a training layer weighs its rows in fp32, several tensors of T K H alive at a time: 2 GiB each at most.
REFERENCE_ROWS = 1 << 29


def weights(experts: int, width: int, hidden: int, settings: Settings) -> tuple[Tensor, Tensor]:
    """w_gate_up [E, 2I, H] and w_down [E, H, I], normal with variance 1 / fan-in."""
    gate_up = normal(settings.device, settings.dtype, experts, 2 * width, hidden, seed=1, scale=hidden**-0.5)
    down = normal(settings.device, settings.dtype, experts, hidden, width, seed=2, scale=width**-0.5)
    return gate_up, down


def on(routing: Routing, device: torch.device) -> Routing:
    """A routing on the device."""
    return Routing(*(x.to(device) for x in routing))


def decode(settings: Settings) -> Iterator[Case]:
    """A: one layer of the mini geometry, 1 to 4096 tokens, bf16, int8, int4 and FP8 experts."""
    quick = settings.quick
    hidden, width, experts = (128, 128, 16) if quick else (MINI["H"], MINI["I"], MINI["E"])
    held: dict[str, Any] = {}
    rows = [(8, "uniform")] if quick else [(32, r) for r in ROUTINGS] + [(t, "uniform") for t in (256, 1, 8, 64, 128, 512, 1024, 4096)]
    for kind in ("bf16", "int8", "int4", "fp8"):
        for tokens, routing in rows if kind == "bf16" else rows[:6]:
            if not settings.wants(name := f"{tokens} tokens, {routing}, {kind} experts"):
                continue
            if "bf16" not in held:
                held["bf16"] = weights(experts, width, hidden, settings)
            if kind not in held:
                held[kind] = [QuantizedExperts.quantize(w, kind) for w in held["bf16"]]
            yield decode_case(name, tokens, routing, held["bf16"], held[kind], settings)


def decode_case(name: str, tokens: int, kind: str, plain: tuple[Tensor, Tensor], used: Any, settings: Settings) -> Case:
    experts, hidden, width = plain[1].shape[0], plain[1].shape[1], plain[1].shape[2]
    x = normal(settings.device, settings.dtype, tokens, hidden, seed=3)
    top_k = min(MINI["K"], experts // 2)
    # Other experts at each call (a captured graph keeps to the first ones; the L2 cache is overwritten between its replays).
    routings = [on(mini_routing(tokens, kind, seed, experts, top_k), settings.device) for seed in range(4)]
    first = routings[0]
    sample = torch.randperm(tokens, generator=torch.Generator().manual_seed(2))[:16].to(settings.device)
    exact, same = (exact_tokens(x, first, *plain, sample, d) for d in (torch.float64, settings.dtype))
    quantised = isinstance(used[0], QuantizedExperts)

    def check(y: Tensor) -> str | None:
        if not quantised:
            return as_exact_as([exact], [same], lambda r: [r[sample]])(y)
        error, allowed = float((y[sample].double() - exact).norm() / exact.norm()), ERRORS[used[0].kind]
        return None if error <= allowed else f"relative error {error:.4f}, allowed {allowed}"

    def way(call: Call, pair: Any = used) -> Callable[[], Tensor]:
        turn = itertools.cycle(routings)

        def run() -> Tensor:
            with torch.no_grad():
                return call(x, next(turn), *pair)

        return run

    variants = [Variant("triton", way(lambda *a: moe_mlp(*a, backend="triton")), "ours", capture=True)]
    if settings.quick and not quantised:
        variants.append(Variant("native", way(moe_mlp), "ours"))
    if quantised:
        variants.append(Variant("bf16 weights", way(moe_mlp, plain), "yardstick", capture=True))
    else:
        variants.append(Variant("F.grouped_mm", way(grouped_mm_mlp), capture=True))
        if tokens == 32 or settings.quick:
            variants.append(Variant("official per-expert loop", way(official_loop)))
        variants += others.some(others.vllm_experts(way, settings))
    variants.append(Variant("reference", way(lambda *a: moe_mlp(*a, backend="reference"))))
    rows = first.offsets.diff().cpu()
    distinct = int((rows > 0).sum())
    if quantised:
        size = sum(t.numel() * t.element_size() for q in used for t in (q.data, q.scales)) / experts * distinct
    else:
        size = 3.0 * width * hidden * x.element_size() * distinct
    shapes = {
        "tokens": tokens, "hidden": hidden, "width": width, "experts": experts, "top_k": top_k, "distinct_experts": distinct,
        "rows_per_expert": [int(rows.min()), int(rows.median()), int(rows.max())],
    }  # fmt: skip
    flops = 6.0 * tokens * top_k * width * hidden
    return Case("A experts, decoding", name, settings.dtype, shapes, variants, check, flops, size + 2.0 * x.numel() * x.element_size())


def training(settings: Settings) -> Iterator[Case]:
    """B: a training layer; FLOPs 6 T K H I forward and 12 backward."""
    #: tokens, hidden, width, experts, top_k; the last two are SonicMoE's
    shapes = [(8192, 2048, 512, 256, 8), (32768, 2048, 512, 256, 8), (32768, 4096, 512, 128, 8), (24576, 1536, 512, 64, 4)]
    for tokens, hidden, width, experts, top_k in [(16, 64, 32, 8, 2)] if settings.quick else shapes:
        for kind in ("forward", "forward+backward"):
            if settings.wants(name := f"{tokens} tokens, {experts}/{width}/{top_k}, hidden {hidden}, {kind}"):
                yield training_case(name, tokens, hidden, width, experts, top_k, kind, settings)


def training_case(
    name: str, tokens: int, hidden: int, width: int, experts: int, top_k: int, kind: str, settings: Settings
) -> Case:  # fmt: skip
    pair = weights(experts, width, hidden, settings)
    x = normal(settings.device, settings.dtype, tokens, hidden, seed=3)
    grad = normal(settings.device, settings.dtype, tokens, hidden, seed=4)
    routing = on(mini_routing(tokens, "uniform", 0, experts, top_k), settings.device)
    sample = torch.randperm(tokens, generator=torch.Generator().manual_seed(2))[:8].to(settings.device)
    backward = kind != "forward"
    expert = int(routing.offsets.diff().argmax())

    def way(call: Call, used: tuple[Tensor, Tensor] = pair) -> Callable[[], Any]:
        def forward() -> Tensor:
            with torch.no_grad():
                return call(x, routing, *used)

        def both() -> tuple[Tensor, ...]:
            leaves = [t.detach().requires_grad_() for t in (x, *used, routing.topk_weights)]
            out = call(leaves[0], routing._replace(topk_weights=leaves[3]), leaves[1], leaves[2])
            return out.detach(), *torch.autograd.grad(out, leaves, grad)

        return both if backward else forward

    def values(d: torch.dtype) -> list[Tensor]:
        if not backward:
            return [exact_tokens(x, routing, *pair, sample, d)]
        leaf = x.to(d).requires_grad_()
        out = exact_tokens(leaf, routing, *pair, sample, d)
        (grad_x,) = torch.autograd.grad(out, leaf, grad[sample].to(d))
        return [out.detach(), grad_x[sample], *exact_expert_gradients(x, routing, *pair, grad, expert, d)]

    def pick(result: Any) -> list[Tensor]:
        if not backward:
            return [result[sample]]
        return [result[0][sample], result[1][sample], result[2][expert], result[3][expert]]

    variants = [Variant("triton", way(lambda *a: moe_mlp(*a, backend="triton")), "ours")]
    if settings.quick:
        variants.append(Variant("native", way(moe_mlp), "ours"))
    variants.append(Variant("F.grouped_mm", way(grouped_mm_mlp)))
    if tokens * top_k * hidden <= REFERENCE_ROWS:
        variants.append(Variant("reference", way(lambda *a: moe_mlp(*a, backend="reference"))))
    variants += others.some(others.sonic_experts(way, routing, pair, settings))
    shapes = {"tokens": tokens, "hidden": hidden, "width": width, "experts": experts, "top_k": top_k}
    flops = (18.0 if backward else 6.0) * tokens * top_k * width * hidden
    size = (3.0 if backward else 1.0) * 3 * width * hidden * experts * x.element_size()
    check = as_exact_as(values(torch.float64), values(settings.dtype), pick)
    return Case("B experts, training", name, settings.dtype, shapes, variants, check, flops, size)


def grouped(settings: Settings) -> Iterator[Case]:
    """C: the grouped product alone, groups one after the other in memory."""
    shapes = [(2, 16, 32, 64)] if settings.quick else [(4, 8192, 4096, 7168), (8, 4096, 7168, 2048), (256, 256, 1024, 2048)]
    for groups, rows, columns, inner in shapes:
        if not settings.wants(name := f"{groups} groups of {rows}, {columns} x {inner}"):
            continue
        a = normal(settings.device, settings.dtype, groups * rows, inner, seed=1)
        b = normal(settings.device, settings.dtype, groups, columns, inner, seed=2, scale=inner**-0.5)
        offsets = (torch.arange(groups + 1, dtype=torch.int32) * rows).to(settings.device)
        sample = torch.randperm(len(a), generator=torch.Generator().manual_seed(2))[:64].to(settings.device)

        def values(d: torch.dtype, a: Tensor = a, b: Tensor = b, sample: Tensor = sample, rows: int = rows) -> Tensor:
            return torch.stack([b[i // rows].to(d) @ a[i].to(d) for i in sample.tolist()])

        def loop(a: Tensor = a, b: Tensor = b, rows: int = rows) -> Tensor:
            return torch.cat([part @ w.T for part, w in zip(a.split(rows), b.unbind(0), strict=True)])

        variants = [Variant("triton", lambda a=a, b=b, o=offsets: grouped_gemm(a, b, o, backend="triton"), "ours")]  # type: ignore[misc]
        if settings.quick:
            variants.append(Variant("native", lambda a=a, b=b, o=offsets: grouped_gemm(a, b, o), "ours"))  # type: ignore[misc]
        variants.append(Variant("F.grouped_mm", lambda a=a, b=b, o=offsets: F.grouped_mm(a, b.mT, offs=o[1:])))  # type: ignore[misc]
        variants.append(Variant("cuBLAS, group by group", loop))
        variants.append(Variant("reference", lambda a=a, b=b, o=offsets: grouped_gemm(a, b, o, backend="reference")))  # type: ignore[misc]
        packages = (others.grouped_gemm_package, others.deep_gemm)
        variants += others.some(*(package(a, b, [rows] * groups, settings) for package in packages))
        check = as_exact_as([values(torch.float64)], [values(settings.dtype)], lambda r, s=sample: [r[s]])  # type: ignore[misc]
        flops = 2.0 * groups * rows * columns * inner
        yield Case("C grouped_gemm", name, settings.dtype, {"groups": groups, "rows": rows}, variants, check, flops, None)
