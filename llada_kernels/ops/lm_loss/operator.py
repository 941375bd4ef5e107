"""What the operators of both compiled backends have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: As enum class EntropyOf of csrc/lm_loss/params.h.
ENTROPY_OF = {None: 0, "all": 1, "correct": 2}


def results(
    hidden: Tensor, lm_head: Tensor, targets: Tensor, weights: Tensor, entropy_of: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, losses, entropies, correctness and the statistics for the backward, without their values."""
    tokens = hidden.shape[0]
    return (
        weights.new_empty(()),
        weights.new_empty(tokens),
        weights.new_empty(tokens if entropy_of else 0),
        weights.new_empty(tokens, dtype=torch.bool),
        weights.new_empty((tokens, 4)),
    )


def gradients(
    grad_loss: Tensor, grad_losses: Tensor, grad_entropy: Tensor, hidden: Tensor, lm_head: Tensor, targets: Tensor, weights: Tensor,
    correct: Tensor, statistics: Tensor, entropy_of: int, temperature: float, need_hidden: bool, need_lm_head: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of hidden and lm_head, without their values; no rows of what is not needed."""
    width = hidden.shape[1]
    return (
        hidden.new_empty((hidden.shape[0] if need_hidden else 0, width)),
        hidden.new_empty((lm_head.shape[0] if need_lm_head else 0, width)),
    )


def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    """Keeps what :func:`derivative` needs."""
    *tensors, ctx.entropy_of, ctx.temperature = inputs
    _, _, _, correct, statistics = output
    ctx.mark_non_differentiable(correct, statistics)
    ctx.save_for_backward(*tensors, correct, statistics)


def derivative(operator: Any, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of all inputs of the forward, by ``operator``, the backward. ``grads``: of loss, losses and entropies."""
    need_hidden, need_lm_head = ctx.needs_input_grad[:2]
    grad_hidden, grad_lm_head = operator(*grads, *ctx.saved_tensors, ctx.entropy_of, ctx.temperature, need_hidden, need_lm_head)
    return grad_hidden if need_hidden else None, grad_lm_head if need_lm_head else None, None, None, None, None
