"""Every op once, forward and backward, at a small size: for compute-sanitizer, and for what must hold of each call (guards)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from llada_kernels.masks import DiffusionMask
from llada_kernels.ops import (
    QuantizedExperts,
    block_attention,
    cached_block_attention,
    grouped_gemm,
    lm_head_unmask,
    lm_loss,
    moe_mlp,
    moe_routing,
    rms_norm,
    rope,
    swiglu,
    threshold_unmask,
)

from ..harness import Settings
from .inputs import normal

__all__ = ["INFERENCE", "operations"]

#: What a decoding step runs: these must be capturable in a CUDA graph.
INFERENCE = (
    "cached_block_attention", "moe_routing", "moe_mlp", "moe_mlp int8", "moe_mlp int4", "rms_norm", "rope", "swiglu", "threshold_unmask",
    "lm_head_unmask",
)  # fmt: skip
BLOCK, HEADS, KV_HEADS, DIM = 32, 4, 2, 64
HIDDEN, WIDTH, EXPERTS, TOP_K, VOCAB = 128, 64, 16, 4, 1000


def operations(lengths: list[int], settings: Settings, backward: bool = True) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Calls by the name of their op, on documents of the given lengths. The same lengths give the same inputs.

    Making the inputs may wait for the device; the calls must not.
    """
    device, dtype = settings.device, settings.dtype
    total = sum(lengths)

    def of(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
        return normal(device, dtype, *shape, seed=seed, scale=scale)

    def differentiable(call: Callable[..., Any], *inputs: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            if not backward:
                with torch.no_grad():
                    out = call(*inputs)
                return out if isinstance(out, tuple) else (out,)
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = call(*leaves)
            outs = out if isinstance(out, tuple) else (out,)
            grads = torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs])
            return *(o.detach() for o in outs), *grads

        return run

    mask = DiffusionMask.block_diffusion([0, *accumulate(lengths)], BLOCK).to(device)
    tokens = mask.num_queries
    q, k, v = (of(tokens, h, DIM, seed=i) for i, h in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    contexts = [n // BLOCK * BLOCK for n in lengths]
    cached = DiffusionMask.cached(contexts, [BLOCK] * len(lengths), BLOCK).to(device)
    pages = max(1, max(contexts) // BLOCK)
    cache_k, cache_v = (of(len(lengths) * pages, BLOCK, KV_HEADS, DIM, seed=s) for s in (3, 4))
    table = torch.arange(len(lengths) * pages, dtype=torch.int32).view(len(lengths), pages).to(device)
    new_q, new_k, new_v = (of(len(lengths) * BLOCK, h, DIM, seed=s) for h, s in ((HEADS, 5), (KV_HEADS, 6), (KV_HEADS, 7)))
    x = of(total, HIDDEN, seed=8)
    gate_up, down = of(EXPERTS, 2 * WIDTH, HIDDEN, seed=9, scale=0.1), of(EXPERTS, HIDDEN, WIDTH, seed=10, scale=0.1)
    scores = normal(device, torch.float32, total, EXPERTS, seed=11)
    bias = normal(device, torch.float32, EXPERTS, seed=12, scale=0.1)
    routing = moe_routing(scores, bias, TOP_K, 4, 2, 2.5)
    rows = normal(device, dtype, total * TOP_K, HIDDEN, seed=13)
    head = of(VOCAB, HIDDEN, seed=14, scale=0.1)
    targets = torch.randint(0, VOCAB, (total,), generator=torch.Generator().manual_seed(15)).to(device)
    weights = (torch.arange(total) % 3 > 0).float().to(device)
    logits = of(2, BLOCK, VOCAB, seed=16, scale=4.0)
    masked = torch.full((2, BLOCK), VOCAB - 1, device=device)
    hidden = of(2, BLOCK, HIDDEN, seed=17)
    angles = torch.arange(total, device=device, dtype=torch.float32)[:, None] * torch.linspace(1, 0.01, DIM // 4, device=device)
    cos, sin = (f(torch.cat([angles, angles], -1)).to(dtype) for f in (torch.cos, torch.sin))
    norm_weight, head_weight = of(HIDDEN, seed=18), of(DIM, seed=19)
    queries, keys = of(total, HEADS, DIM, seed=20), of(total, KV_HEADS, DIM, seed=21)

    def experts(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return moe_mlp(x, routing, gate_up, down)

    def integers(kind: str) -> Callable[[], tuple[Tensor, ...]]:
        pair = [QuantizedExperts.quantize(w, kind) for w in (gate_up, down)]
        return lambda: (moe_mlp(x, routing, *pair),)

    def route() -> tuple[Tensor, ...]:
        return tuple(moe_routing(scores, bias, TOP_K, 4, 2, 2.5))

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return lm_loss(hidden, head, targets, weights).loss

    def decode() -> tuple[Tensor, ...]:
        return (cached_block_attention(new_q, new_k, new_v, cache_k, cache_v, table, cached),)

    def unmask() -> tuple[Tensor, ...]:
        return tuple(threshold_unmask(logits, masked, VOCAB - 1, 0.5, 0.5))

    def head_unmask() -> tuple[Tensor, ...]:
        return tuple(lm_head_unmask(hidden, head, masked, VOCAB - 1, 0.5))

    return {
        "block_attention": differentiable(lambda q, k, v: block_attention(q, k, v, mask), q, k, v),
        "cached_block_attention": decode,
        "moe_routing": route,
        "grouped_gemm": differentiable(lambda a, b: grouped_gemm(a, b, routing.offsets), rows, gate_up),
        "moe_mlp": differentiable(experts, x, gate_up, down),
        "moe_mlp int8": integers("int8"),
        "moe_mlp int4": integers("int4"),
        "rms_norm": differentiable(lambda x, w, r: rms_norm(x, w, 1e-6, r), x, norm_weight, x * 0.5),
        "rope": differentiable(lambda q, k, a, b: rope(q, cos, sin, k, a, b), queries, keys, head_weight, head_weight + 0.5),
        "swiglu": differentiable(lambda gate_up: swiglu(gate_up), of(total, 2 * WIDTH, seed=22)),
        "lm_loss": differentiable(loss, x, head),
        "threshold_unmask": unmask,
        "lm_head_unmask": head_unmask,
    }
