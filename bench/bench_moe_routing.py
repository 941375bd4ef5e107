"""moe_routing: the exact rule of the mini model, from router logits to tokens sorted by expert; also with pools of experts per block."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from llada_kernels.ops import Routing
from llada_kernels.ops.moe_routing import moe_routing

from .checks import close, equal
from .harness import Case, Settings, Variant, backends
from .runner import main
from .shapes import MINI, rotate, stays_out

BLOCK = 32
OP = importlib.import_module("llada_kernels.ops.moe_routing")


def cases(settings: Settings) -> Iterator[Case]:
    for tokens in (32, 64) if settings.quick else (32, 512, 2048, 8192):
        if settings.wants(name := f"{tokens} tokens", torch.float32):
            yield routing(name, tokens, settings.quick)
    tokens, capacity = (64, 48) if settings.quick else (512, 48)
    if settings.wants(name := f"{tokens} tokens, pools of {capacity} experts per block of {BLOCK}", torch.float32):
        yield routing(name, tokens, settings.quick, (BLOCK, capacity))


def official(logits: Tensor, bias: Tensor, top_k: int, groups: int, used: int, scale: float) -> Routing:
    """The gate of the official code (torch.topk, unsorted groups), then the sort by expert that a grouped product needs."""
    scores = logits.sigmoid()
    biased = scores + bias
    group_scores = biased.view(len(logits), groups, -1).topk(2, dim=-1)[0].sum(-1)
    chosen = torch.topk(group_scores, used, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(group_scores).scatter_(1, chosen, 1)
    expanded = mask.unsqueeze(-1).expand(-1, groups, logits.shape[1] // groups).reshape(len(logits), -1)
    ids = torch.topk(biased.masked_fill(~expanded.bool(), float("-inf")), top_k, dim=-1)[1]
    weights = scores.gather(1, ids)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * scale
    return Routing.from_topk(ids, weights, logits.shape[1])


def official_pooled(logits: Tensor, bias: Tensor, top_k: int, block: int, capacity: int, scale: float) -> Routing:
    """The block-wise gate of LLaDA2.2 in PyTorch: only the experts with the largest maximum over the block may be chosen."""
    scores = logits.sigmoid()
    biased = (scores + bias).view(-1, block, logits.shape[1])
    pool = biased.amax(1).topk(capacity, dim=-1)[1]
    allowed = torch.zeros_like(biased[:, 0], dtype=torch.bool).scatter_(1, pool, True)
    ids = biased.masked_fill(~allowed.unsqueeze(1), float("-inf")).flatten(0, 1).topk(top_k, dim=-1)[1]
    weights = scores.gather(1, ids)
    return Routing.from_topk(ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * scale, logits.shape[1])


def routing(name: str, tokens: int, quick: bool, pool: tuple[int, int] | None = None) -> Case:
    experts, top_k = MINI["E"], MINI["K"]
    generator = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(tokens, experts, generator=generator), 0.1 * torch.randn(experts, generator=generator)
    copies = rotate(logits.clone, logits.numel() * 4, quick)
    groups, used = (1, 1) if pool else (8, 4)

    def ours(x: Tensor, backend: str) -> Routing:
        return moe_routing(x, bias, top_k, groups, used, 2.5, block_pool=pool, backend=backend)

    def theirs() -> Routing:
        x = next(copies)
        return official_pooled(x, bias, top_k, *pool, 2.5) if pool else official(x, bias, top_k, groups, used, 2.5)

    expected = ours(logits, "reference")
    same: list[Callable[[Any], str | None]] = [
        equal([expected.topk_ids, expected.offsets, expected.permutation], lambda r: [r.topk_ids, r.offsets, r.permutation]),
        close([expected.topk_weights], 1e-5, lambda r: [r.topk_weights]),
    ]
    return Case(
        "moe_routing", name, torch.float32,
        {"tokens": tokens, "experts": experts, "top_k": top_k, "groups": f"{used} of {groups}", "block_pool": pool},
        [*backends(OP, lambda backend: ours(next(copies), backend)), Variant("official gate + sort", theirs)],
        lambda r: same[0](r) or same[1](r), None,
        float(logits.numel() * 4 + tokens * top_k * 12) if stays_out(logits.numel() * 4) else None,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main("moe_routing", cases))
