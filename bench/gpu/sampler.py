"""What stands round attention and experts on a GPU (S): sampler, LM head, routing, norm, rope, loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llada_kernels.ops import lm_head_unmask, lm_loss, moe_routing, rms_norm, rope, rope_tables, threshold_unmask

from ..bench_threshold_unmask import softmax_max
from ..checks import as_exact_as, close, equal
from ..harness import Case, Settings, Variant
from ..shapes import MINI
from . import others
from .inputs import generator, normal

__all__ = ["cases"]

LENGTH = 32


def ours(call: Callable[[str | None], Any], settings: Settings, *names: str) -> list[Variant]:
    """A variant for each backend that serves a GPU; in a dry run the one that serves a CPU."""
    wanted = names or ("native", "triton")
    return [Variant(name, lambda name=name: call(name), "ours", capture=True) for name in wanted]  # type: ignore[misc]


def cases(settings: Settings) -> Iterator[Case]:
    """S: in the order of what a denoising step spends."""
    vocab, hidden = (512, 64) if settings.quick else (MINI["V"], MINI["H"])
    for rows, dtype in ((1, settings.dtype), (1, torch.float32), (64, settings.dtype)):
        rows = min(rows, 2) if settings.quick else rows
        if settings.wants(name := f"threshold_unmask {rows} x {LENGTH} x {vocab} {str(dtype)[6:]}"):
            yield unmask(name, rows, vocab, dtype, settings)
    if settings.wants(name := f"lm_head_unmask 1 x {LENGTH} x {vocab}, hidden {hidden}"):
        yield head(name, vocab, hidden, settings)
    for tokens in (8,) if settings.quick else (32, 8192):
        if settings.wants(name := f"moe_routing {tokens} tokens"):
            yield routing(name, tokens, settings)
    for tokens in (8,) if settings.quick else (32, 16384):
        if settings.wants(name := f"rms_norm with residual, {tokens} x {hidden}"):
            yield norm(name, tokens, hidden, settings)
        if settings.wants(name := f"rope with norms, {tokens} tokens, 16:4 heads"):
            yield rotation(name, tokens, settings)
    if settings.wants(name := f"lm_loss, hidden {hidden}, vocabulary {vocab}"):
        yield loss(name, 16 if settings.quick else 4096, vocab, hidden, settings)


def unmask(name: str, rows: int, vocab: int, dtype: torch.dtype, settings: Settings) -> Case:
    spread = torch.linspace(1, 6, LENGTH, device=settings.device)[:, None]
    logits = (torch.randn(rows, LENGTH, vocab, device=settings.device, generator=generator(settings.device, 0)) * spread).to(dtype)
    mask_id = vocab - 1
    logits[..., mask_id] = -30.0
    tokens = torch.full((rows, LENGTH), mask_id, device=settings.device)
    tokens[:, : LENGTH // 4] = 1
    expected = threshold_unmask(logits[:1], tokens[:1], mask_id, 0.9, backend="reference")
    exact = equal([expected.tokens], lambda r: [r.tokens[:1]])
    sure = close([expected.confidence], 1e-5, lambda r: [r.confidence[:1]])
    confidence = close([expected.confidence], 1e-4, lambda r: [r[0][:1]])
    variants = ours(lambda backend: threshold_unmask(logits, tokens, mask_id, 0.9, backend=backend), settings)
    variants.append(Variant("softmax + max", lambda: softmax_max(logits), capture=True))
    variants.append(Variant("reference", lambda: threshold_unmask(logits, tokens, mask_id, 0.9, backend="reference")))
    variants += others.some(others.flashinfer_softmax(logits, settings))
    shapes = {"rows": rows, "length": LENGTH, "vocabulary": vocab}
    return Case(
        "S threshold_unmask", name, dtype, shapes, variants,
        lambda r: (exact(r) or sure(r)) if hasattr(r, "counts") else confidence(r), None, float(logits.numel() * logits.element_size()),
    )  # fmt: skip


def head(name: str, vocab: int, width: int, settings: Settings) -> Case:
    lm_head = normal(settings.device, settings.dtype, vocab, width, seed=1, scale=width**-0.5)
    mask_id = vocab - 1
    preferred = torch.randint(0, mask_id, (1, LENGTH), generator=torch.Generator().manual_seed(0)).to(settings.device)
    sureness = torch.linspace(10, 20, LENGTH, device=settings.device)[:, None]
    noise = torch.randn(1, LENGTH, width, device=settings.device, generator=generator(settings.device, 2))
    hidden = (noise + sureness * lm_head[preferred].float()).to(settings.dtype)
    tokens = torch.full((1, LENGTH), mask_id, device=settings.device)
    expected = lm_head_unmask(hidden, lm_head, tokens, mask_id, 0.9, backend="reference")
    check = close([expected.confidence], 0.1, lambda r: [r.confidence])  # bf16 rounds a logit of 20 by up to 0.06
    names = ("native", "triton") if settings.device.type == "cpu" else ("triton",)
    variants = ours(lambda backend: lm_head_unmask(hidden, lm_head, tokens, mask_id, 0.9, backend=backend), settings, *names)
    variants.append(Variant("F.linear + threshold_unmask", lambda: threshold_unmask(F.linear(hidden, lm_head), tokens, mask_id, 0.9)))
    variants.append(Variant("reference", lambda: lm_head_unmask(hidden, lm_head, tokens, mask_id, 0.9, backend="reference")))
    size = float(lm_head.numel() * lm_head.element_size())
    shapes = {"length": LENGTH, "hidden": width, "vocabulary": vocab}
    return Case("S lm_head_unmask", name, settings.dtype, shapes, variants, check, 2.0 * LENGTH * width * vocab, size)


def routing(name: str, tokens: int, settings: Settings) -> Case:
    experts, top_k, groups = (16, 4, 4) if settings.quick else (MINI["E"], MINI["K"], 8)
    logits = torch.randn(tokens, experts, device=settings.device, generator=generator(settings.device, 0))
    bias = torch.randn(experts, device=settings.device, generator=generator(settings.device, 1)) * 0.1

    def call(backend: str | None) -> Any:
        return moe_routing(logits, bias, top_k, groups, groups // 2, 2.5, backend=backend)

    expected = call("reference")
    integers = equal([expected.topk_ids, expected.offsets, expected.permutation], lambda r: [r.topk_ids, r.offsets, r.permutation])
    weights = close([expected.topk_weights], 1e-6, lambda r: [r.topk_weights])
    variants = [*ours(call, settings), Variant("reference", lambda: call("reference"))]
    shapes = {"tokens": tokens, "experts": experts, "top_k": top_k}
    size = float(logits.numel() * 4)
    return Case("S moe_routing", name, torch.float32, shapes, variants, lambda r: integers(r) or weights(r), None, size)


def norm(name: str, tokens: int, width: int, settings: Settings) -> Case:
    x, residual = (normal(settings.device, settings.dtype, tokens, width, seed=i) for i in (1, 2))
    weight = normal(settings.device, settings.dtype, width, seed=3)

    def by_torch(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (width,), weight, 1e-6), total

    def call(backend: str | None) -> Any:
        with torch.no_grad():
            return rms_norm(x, weight, 1e-6, residual, backend=backend)

    check = as_exact_as(by_torch(x.double(), residual.double(), weight.double()), by_torch(x, residual, weight))
    variants = [*ours(call, settings), Variant("add + F.rms_norm", lambda: by_torch(x, residual, weight), capture=True)]
    variants.append(Variant("reference", lambda: call("reference"), capture=True))
    size = 4.0 * x.numel() * x.element_size()
    return Case("S rms_norm", name, settings.dtype, {"tokens": tokens, "hidden": width}, variants, check, None, size)


def rotation(name: str, tokens: int, settings: Settings) -> Case:
    """Queries and keys as views of a fused QKV product; every head is normed before it turns."""
    heads, kv_heads, dim = MINI["Hq"], MINI["Hkv"], MINI["D"]
    product = normal(settings.device, settings.dtype, tokens, (heads + 2 * kv_heads) * dim, seed=1)
    q, k = (
        product[:, : heads * dim].view(tokens, heads, dim),
        product[:, heads * dim : (heads + kv_heads) * dim].view(tokens, kv_heads, dim),
    )
    cos, sin = rope_tables(torch.arange(tokens, device=settings.device), dim // 2, 600000.0, settings.dtype)
    q_weight, k_weight = (normal(settings.device, settings.dtype, dim, seed=i) for i in (2, 3))

    def call(backend: str | None) -> Any:
        with torch.no_grad():
            return rope(q, cos, sin, k, q_weight, k_weight, backend=backend)

    expected = call("reference")
    exact = rope(q.double(), cos.double(), sin.double(), k.double(), q_weight.double(), k_weight.double(), backend="reference")
    check = as_exact_as(exact, expected)
    variants = [*ours(call, settings), Variant("reference", lambda: call("reference"), capture=True)]
    size = 2.0 * (q.numel() + k.numel()) * q.element_size()
    return Case("S rope", name, settings.dtype, {"tokens": tokens, "heads": "16:4", "head_dim": dim}, variants, check, None, size)


def loss(name: str, tokens: int, vocab: int, width: int, settings: Settings) -> Case:
    hidden = normal(settings.device, settings.dtype, tokens, width, seed=1)
    lm_head = normal(settings.device, settings.dtype, vocab, width, seed=2, scale=width**-0.5)
    targets = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(0)).to(settings.device)
    scale = torch.ones(tokens, device=settings.device)

    def gradients(call: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype | None = None) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (hidden, lm_head)]
            value = call(*leaves)
            return value.detach(), *torch.autograd.grad(value, leaves)

        return run

    def dense(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).float(), targets, reduction="sum")

    def fused(backend: str | None) -> Any:
        return gradients(lambda h, w: lm_loss(h, w, targets, scale, backend=backend).loss)()

    rows = slice(0, 64)
    pick = lambda r: [r[0], r[1], r[2][rows]]  # noqa: E731
    exact, same = pick(gradients(dense, torch.float32)()), pick(gradients(dense)())
    names = ("native", "triton") if settings.device.type == "cpu" else ("triton",)
    variants = [*ours(fused, settings, *names), Variant("F.linear + cross_entropy", gradients(dense))]
    variants += [Variant("reference", lambda: fused("reference")), *others.some(others.liger_loss(targets, gradients, settings))]
    shapes = {"tokens": tokens, "hidden": width, "vocabulary": vocab}
    check = as_exact_as(exact, same, pick)
    return Case("S lm_loss", name, settings.dtype, shapes, variants, check, 6.0 * tokens * width * vocab, None)
