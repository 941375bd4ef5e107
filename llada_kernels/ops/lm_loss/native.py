"""Native CPU backend of lm_loss: csrc/lm_loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _library
from .._common import native_reason, register_autograd
from ..dispatch import Backend
from .operator import ENTROPY_OF, derivative, gradients, results, setup_context


def _supports(hidden: Tensor, lm_head: Tensor, targets: Tensor, weights: Tensor, *_: object) -> str | None:
    if weights.requires_grad:
        return "native does not differentiate weights, which require a gradient"
    return native_reason(hidden, lm_head, targets, weights)


def _native(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    weights: Tensor,
    entropy: str | None,
    entropy_temperature: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    loss, token_losses, entropies, correct, _ = torch.ops.llada_kernels.lm_loss(
        hidden.contiguous(),
        lm_head.contiguous(),
        targets.contiguous(),
        weights.contiguous(),
        ENTROPY_OF[entropy],
        entropy_temperature,
    )
    return loss, token_losses, None if entropy is None else entropies, correct


if _library.load_error is None:
    torch.library.register_fake("llada_kernels::lm_loss", results)
    torch.library.register_fake("llada_kernels::lm_loss_backward", gradients)

    def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return derivative(torch.ops.llada_kernels.lm_loss_backward, ctx, *(grad.contiguous() for grad in grads[:3]))

    register_autograd("llada_kernels::lm_loss", _backward, setup_context)


BACKEND = Backend("native", _supports, _native)
