"""The rule by which a backend chooses, and what the operators of both compiled backends have in common."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """Checked arguments of :func:`moe_routing`, which says what they mean."""

    top_k: int
    n_group: int
    topk_group: int
    scale: float
    score: str
    normalize: bool
    block_pool: tuple[int, int] | None

    def numbers(self) -> tuple[int, int, int, float, bool, bool, int, int]:
        """Arguments of the operators: softmax instead of the score's name, block size and capacity 0 for none."""
        block_size, capacity = self.block_pool or (0, 0)
        return self.top_k, self.n_group, self.topk_group, self.scale, self.score == "softmax", self.normalize, block_size, capacity


def results(logits: Tensor, expert_bias: Tensor | None, top_k: int, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, ids, offsets and permutation, without their values."""
    tokens, experts = logits.shape
    return (
        logits.new_empty(tokens, top_k),
        logits.new_empty(tokens, top_k, dtype=torch.int32),
        logits.new_empty(experts + 1, dtype=torch.int32),
        logits.new_empty(tokens * top_k, dtype=torch.int32),
    )


def gradient(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    """The gradient of the logits, without its values."""
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    """Keeps what :func:`derivative` needs."""
    logits, _, _, _, _, ctx.scale, ctx.softmax, ctx.normalize, _, _ = inputs
    _, ids, offsets, permutation = output
    ctx.save_for_backward(logits, ids)
    ctx.mark_non_differentiable(ids, offsets, permutation)


def derivative(operator: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of all inputs of the forward, by ``operator``, the backward."""
    return operator(grad, *ctx.saved_tensors, ctx.scale, ctx.softmax, ctx.normalize), *[None] * 9
