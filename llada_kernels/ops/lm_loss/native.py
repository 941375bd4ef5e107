"""Native CPU backend of lm_loss: csrc/lm_loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _library
from .._common import native_reason, register_autograd
from ..dispatch import Backend

#: As enum class EntropyOf of csrc/lm_loss/params.h.
_ENTROPY_OF = {None: 0, "all": 1, "correct": 2}


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
        _ENTROPY_OF[entropy],
        entropy_temperature,
    )
    return loss, token_losses, None if entropy is None else entropies, correct


if _library.load_error is None:

    @torch.library.register_fake("llada_kernels::lm_loss")
    def _fake(hidden, lm_head, targets, weights, entropy_of, temperature):  # type: ignore[no-untyped-def]
        tokens = hidden.shape[0]
        return (
            weights.new_empty(()),
            weights.new_empty(tokens),
            weights.new_empty(tokens if entropy_of else 0),
            weights.new_empty(tokens, dtype=torch.bool),
            weights.new_empty((tokens, 4)),
        )

    @torch.library.register_fake("llada_kernels::lm_loss_backward")
    def _fake_backward(  # type: ignore[no-untyped-def]
        grad_loss, grad_token_losses, grad_entropy, hidden, lm_head, targets, weights, correct,
        statistics, entropy_of, temperature, need_hidden, need_lm_head,
    ):  # fmt: skip
        width = hidden.shape[1]
        return (
            hidden.new_empty((hidden.shape[0] if need_hidden else 0, width)),
            hidden.new_empty((lm_head.shape[0] if need_lm_head else 0, width)),
        )

    def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, ctx.entropy_of, ctx.temperature = inputs
        _, _, _, correct, statistics = output
        ctx.mark_non_differentiable(correct, statistics)
        ctx.save_for_backward(*tensors, correct, statistics)

    def _backward(ctx, grad_loss, grad_token_losses, grad_entropy, *_):  # type: ignore[no-untyped-def]
        need_hidden, need_lm_head = ctx.needs_input_grad[:2]
        grad_hidden, grad_lm_head = torch.ops.llada_kernels.lm_loss_backward(
            grad_loss.contiguous(), grad_token_losses.contiguous(), grad_entropy.contiguous(),
            *ctx.saved_tensors, ctx.entropy_of, ctx.temperature, need_hidden, need_lm_head,
        )  # fmt: skip
        return (
            grad_hidden if need_hidden else None,
            grad_lm_head if need_lm_head else None,
            None, None, None, None,
        )  # fmt: skip

    register_autograd("llada_kernels::lm_loss", _backward, _setup_context)


BACKEND = Backend("native", _supports, _native)
