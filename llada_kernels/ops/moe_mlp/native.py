"""moe_mlp in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _library
from .._common import native_reason, register_autograd
from ..dispatch import Backend
from ..moe_routing.routing import Routing
from ..quantized_experts import QuantizedExperts


def _supports(x: Tensor, routing: Routing, w_gate_up: Tensor | QuantizedExperts, w_down: Tensor | QuantizedExperts) -> str | None:
    if any(isinstance(w, QuantizedExperts) and w.kind == "fp8" for w in (w_gate_up, w_down)):
        return "native serves int8 and int4 experts, got fp8"
    if routing.topk_weights.dtype != torch.float32:
        return f"native serves topk_weights in float32, got {routing.topk_weights.dtype}"
    return native_reason(x, *routing, *_tensors(w_gate_up), *_tensors(w_down))


def _tensors(weight: Tensor | QuantizedExperts) -> tuple[Tensor, ...]:
    return (weight.data, weight.scales) if isinstance(weight, QuantizedExperts) else (weight,)


def moe_mlp(x: Tensor, routing: Routing, w_gate_up: Tensor | QuantizedExperts, w_down: Tensor | QuantizedExperts) -> Tensor:
    """See :func:`llada_kernels.ops.moe_mlp`."""
    tokens = (x, routing.topk_weights, routing.offsets, routing.permutation)
    tensors = [t.contiguous() for t in (*tokens, *_tensors(w_gate_up), *_tensors(w_down))]
    if isinstance(w_gate_up, QuantizedExperts):
        return torch.ops.llada_kernels.moe_mlp_quantized(*tensors)
    # Gate and up are kept only where a backward may follow.
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return torch.ops.llada_kernels.moe_mlp(*tensors, save)[0]


if _library.load_error is None:

    @torch.library.register_fake("llada_kernels::moe_mlp")
    def _fake(
        x: Tensor, topk_weights: Tensor, offsets: Tensor, permutation: Tensor, w_gate_up: Tensor, w_down: Tensor, save: bool
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), x.new_empty(permutation.shape[0] if save else 0, w_gate_up.shape[1])

    @torch.library.register_fake("llada_kernels::moe_mlp_quantized")
    def _fake_quantized(x: Tensor, *others: Tensor) -> Tensor:
        return torch.empty_like(x)

    @torch.library.register_fake("llada_kernels::moe_mlp_backward")
    def _fake_backward(
        grad_out: Tensor,
        x: Tensor,
        topk_weights: Tensor,
        offsets: Tensor,
        permutation: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        pre_activation: Tensor,
        *need: bool,
    ) -> tuple[Tensor, ...]:
        x_grad, *weight_grads = (
            torch.empty_like(t) if wanted else t.new_empty(0) for t, wanted in zip((x, w_gate_up, w_down), need, strict=True)
        )
        return x_grad, torch.empty_like(topk_weights), *weight_grads

    def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:6], output[1])
        ctx.mark_non_differentiable(output[1])

    def _backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, weights, _, _, w_gate_up, w_down, _ = ctx.needs_input_grad
        grads = torch.ops.llada_kernels.moe_mlp_backward(grad_out.contiguous(), *ctx.saved_tensors, x, w_gate_up, w_down)
        return (
            grads[0] if x else None,
            grads[1] if weights else None,
            None,
            None,
            grads[2] if w_gate_up else None,
            grads[3] if w_down else None,
            None,
        )

    register_autograd("llada_kernels::moe_mlp", _backward, _setup_context)


BACKEND = Backend("native", _supports, moe_mlp)
