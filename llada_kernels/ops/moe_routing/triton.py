"""Triton kernels: the choice of a few tokens per warp, then a counting sort that needs no atomic operation on global memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._triton import define, define_autograd, triton_reason
from ..dispatch import Backend
from .routing import Routing
from .rule import Rule, derivative, gradient, results, setup_context

#: Slots that one program sorts.
_CHUNK = 256
#: Up to so many chunks every program adds up the counts of all of them, which saves a launch; of more they are summed up once.
_FEW_CHUNKS = 16
#: Experts whose counts one program sums up.
_SCANNED = 16


def _supports(logits: Tensor, expert_bias: Tensor | None, *_: Any) -> str | None:
    return triton_reason(logits, expert_bias, dtypes=(torch.float32,))


def _tokens_per_program(experts: int) -> int:
    """A power of two. One warp, at most 16 scores per thread, so that no maximum crosses warps."""
    return 1 << (max(1, min(4, 512 // experts)).bit_length() - 1)


def _forward(
    logits: Tensor,
    expert_bias: Tensor | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    softmax: bool,
    normalize: bool,
    block_size: int,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from . import triton_kernels

    logits = logits.contiguous()
    bias = None if expert_bias is None else expert_bias.float().contiguous()
    weights, ids, offsets, permutation = result = results(logits, bias, top_k)
    tokens, experts = logits.shape
    if not tokens:
        offsets.zero_()
        return result
    pool = None
    if block_size:
        pool = torch.empty(tokens // block_size, experts, dtype=torch.int8, device=logits.device)
        maxima = torch.empty_like(pool, dtype=torch.int32)
        triton_kernels.pool_kernel[(pool.shape[0],)](
            logits, bias, maxima, pool, BLOCK=block_size, CAPACITY=capacity, E=experts, SOFTMAX=softmax, num_warps=4
        )
    many = _tokens_per_program(experts)
    limited = topk_group < n_group
    triton_kernels.choose_kernel[(-(-tokens // many),)](
        logits, bias, pool, ids, weights, tokens, scale, BLOCK=block_size,
        E=experts, K=top_k, GROUPS=n_group if limited else 1, TOPK_GROUP=topk_group if limited else 1, SOFTMAX=softmax,
        NORMALIZE=normalize, T=many, num_warps=1,
    )  # fmt: skip
    slots, bins = ids.numel(), 1 << experts.bit_length()
    chunks = -(-slots // _CHUNK)
    counts, starts = (ids.new_empty(chunks, bins) for _ in range(2))
    sizes = {"E": experts, "BINS": bins, "CHUNK": _CHUNK, "num_warps": 4}
    triton_kernels.count_kernel[(chunks,)](ids, counts, slots, **sizes)
    if scanned := chunks > _FEW_CHUNKS:
        some, each = min(bins, _SCANNED), counts
        counts = ids.new_empty(bins)
        triton_kernels.scan_kernel[(bins // some,)](each, starts, counts, chunks, BINS=bins, SOME=some, num_warps=4)
    triton_kernels.sort_kernel[(chunks,)](ids, counts, starts, offsets, permutation, slots, SCANNED=scanned, **sizes)
    return result


def _backward(grad: Tensor, logits: Tensor, ids: Tensor, scale: float, softmax: bool, normalize: bool) -> Tensor:
    from . import triton_kernels

    out = gradient(grad, logits)
    tokens, experts = logits.shape
    if tokens:
        many = _tokens_per_program(experts)
        triton_kernels.choose_backward_kernel[(-(-tokens // many),)](
            grad.contiguous(), logits.contiguous(), ids, out, tokens, scale,
            E=experts, K=ids.shape[1], SOFTMAX=softmax, NORMALIZE=normalize, T=many, num_warps=1,
        )  # fmt: skip
    return out


def _autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return derivative(torch.ops.llada_kernels_triton.moe_routing_backward, ctx, grad)


define(
    "moe_routing(Tensor logits, Tensor? expert_bias, int top_k, int n_group, int topk_group, float scale, bool softmax, bool normalize, "
    "int block_size, int capacity) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward, results,
)  # fmt: skip
define(
    "moe_routing_backward(Tensor grad, Tensor logits, Tensor ids, float scale, bool softmax, bool normalize) -> Tensor",
    _backward, gradient,
)  # fmt: skip
define_autograd("moe_routing", _autograd, setup_context)


def _moe_routing(logits: Tensor, expert_bias: Tensor | None, rule: Rule) -> Routing:
    bias = None if expert_bias is None else expert_bias.detach()
    weights, ids, offsets, permutation = torch.ops.llada_kernels_triton.moe_routing(logits, bias, *rule.numbers())
    return Routing(ids, weights, offsets, permutation)


BACKEND = Backend("triton", _supports, _moe_routing)
