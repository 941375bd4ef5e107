"""moe_routing in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import compute_dtype
from ..dispatch import Backend
from .routing import Routing, sort_by_expert
from .rule import Rule


def largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest scores of each row, descending, ties to the lowest index
    (torch.topk leaves ties open)."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count]


def _only(scores: Tensor, keep: Tensor) -> Tensor:
    """``scores`` [R, N, ...] with -inf wherever the second index is not among ``keep`` [R,
    count]."""
    allowed = torch.zeros(scores.shape[:2], dtype=torch.bool, device=scores.device).scatter(1, keep, True)
    return scores.masked_fill(~allowed.view(*allowed.shape, *[1] * (scores.ndim - 2)), float("-inf"))


def moe_routing(logits: Tensor, expert_bias: Tensor | None, rule: Rule) -> Routing:
    """See :func:`llada_kernels.ops.moe_routing`."""
    top_k, n_group, topk_group, scale, score, normalize, block_pool = rule
    tokens, experts = logits.shape
    logits = logits.to(compute_dtype(logits))
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    biased = scores.detach()
    if expert_bias is not None:
        biased = biased + expert_bias.detach().to(biased.dtype)
    if topk_group < n_group:
        groups = biased.view(tokens, n_group, experts // n_group)
        group_scores = groups.topk(2).values.sum(-1)
        biased = _only(groups, largest(group_scores, topk_group)).view(tokens, experts)
    if block_pool is not None:
        block_size, capacity = block_pool
        blocks = biased.view(tokens // block_size, block_size, experts)
        pool = largest(blocks.amax(1), capacity)
        biased = _only(blocks.transpose(1, 2), pool).transpose(1, 2).reshape(tokens, experts)
    ids = largest(biased, top_k)
    weights = scores.gather(1, ids)
    if normalize and top_k > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    ids = ids.to(torch.int32)
    return Routing(ids, weights * scale, *sort_by_expert(ids, experts))


BACKEND = Backend("reference", lambda *args: None, moe_routing)
