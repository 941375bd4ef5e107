"""moe_routing in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _library
from .._common import native_reason, register_autograd
from ..dispatch import Backend
from .routing import Routing


def _supports(logits: Tensor, expert_bias: Tensor | None, top_k: int, n_group: int, *options: Any) -> str | None:
    if logits.device.type == "cuda" and logits.shape[1] + n_group > 1500:
        return f"native serves at most 1500 experts and groups together on a GPU, got {logits.shape[1] + n_group}"
    return native_reason(logits, expert_bias, dtypes=(torch.float32,), cuda="moe_routing")


def moe_routing(
    logits: Tensor,
    expert_bias: Tensor | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    score: str,
    normalize: bool,
    block_pool: tuple[int, int] | None,
) -> Routing:
    """See :func:`llada_kernels.ops.moe_routing`."""
    bias = None if expert_bias is None else expert_bias.detach().float().contiguous()
    block_size, capacity = block_pool or (0, 0)
    options = (top_k, n_group, topk_group, scale, score == "softmax", normalize, block_size, capacity)
    weights, ids, *order = torch.ops.llada_kernels.moe_routing(logits.contiguous(), bias, *options)
    return Routing(ids, weights, *order)


if _library.load_error is None:

    @torch.library.register_fake("llada_kernels::moe_routing")
    def _fake(logits: Tensor, expert_bias: Tensor | None, top_k: int, *options: Any) -> tuple[Tensor, ...]:
        tokens, experts = logits.shape
        return (
            logits.new_empty(tokens, top_k),
            logits.new_empty(tokens, top_k, dtype=torch.int32),
            logits.new_empty(experts + 1, dtype=torch.int32),
            logits.new_empty(tokens * top_k, dtype=torch.int32),
        )

    @torch.library.register_fake("llada_kernels::moe_routing_backward")
    def _fake_backward(grad_weights: Tensor, logits: Tensor, *rest: Any) -> Tensor:
        return torch.empty_like(logits)

    def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        logits, _, _, _, _, ctx.scale, ctx.softmax, ctx.normalize, _, _ = inputs
        _, ids, offsets, permutation = output
        ctx.save_for_backward(logits, ids)
        ctx.mark_non_differentiable(ids, offsets, permutation)

    def _backward(ctx: Any, grad_weights: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
        backward = torch.ops.llada_kernels.moe_routing_backward
        logits, ids = ctx.saved_tensors
        grad = backward(grad_weights.contiguous(), logits, ids, ctx.scale, ctx.softmax, ctx.normalize)
        return grad, *[None] * 9

    register_autograd("llada_kernels::moe_routing", _backward, _setup_context)


BACKEND = Backend("native", _supports, moe_routing)
