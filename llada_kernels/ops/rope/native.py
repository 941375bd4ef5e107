"""C++ kernels: queries and keys of a layer, norms and rotation in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _library
from .._common import native_reason, register_autograd
from ..dispatch import Backend


def _native_supports(
    q: Tensor, cos: Tensor, sin: Tensor, k: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> str | None:
    if cos.requires_grad or sin.requires_grad:
        return "native treats cos and sin as constants, one of them requires a gradient"
    if q.device.type == "cuda" and q.shape[-1] > 480:
        return f"native serves head dims up to 480 on a GPU, got {q.shape[-1]}"
    return native_reason(q, cos, sin, k, q_weight, k_weight, cuda="rope")


def _native(
    q: Tensor, cos: Tensor, sin: Tensor, k: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> Tensor | tuple[Tensor, Tensor]:
    weights = (w if w is None else w.contiguous() for w in (q_weight, k_weight))
    parts = (_heads(q), None if k is None else _heads(k), cos.contiguous(), sin.contiguous(), *weights, eps)
    q_out, k_out, _ = torch.ops.llada_kernels.rope(*parts)
    return q_out if k is None else (q_out, k_out)


def _heads(x: Tensor) -> Tensor:
    """``x`` [T, heads, D] such that the heads of each token lie one after the other."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


if _library.load_error is None:

    @torch.library.register_fake("llada_kernels::rope")
    def _fake(q, k, cos, sin, q_weight, k_weight, eps):  # type: ignore[no-untyped-def]
        rows = 0 if q_weight is None else q.shape[0] * q.shape[1] + (0 if k is None else k.shape[0] * k.shape[1])
        return q.new_empty(q.shape), q.new_empty(0 if k is None else k.shape), q.new_empty(rows, dtype=torch.float32)

    @torch.library.register_fake("llada_kernels::rope_backward")
    def _fake_backward(grad_q, grad_k, q, k, cos, sin, q_weight, k_weight, rstd):  # type: ignore[no-untyped-def]
        weights = (grad_q.new_empty(0 if w is None else w.shape, dtype=torch.float32) for w in (q_weight, k_weight))
        return grad_q.new_empty(grad_q.shape), grad_q.new_empty(0 if grad_k is None else grad_k.shape), *weights

    def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        q, k, cos, sin, q_weight, k_weight, _ = inputs
        ctx.with_k, normed = k is not None, q_weight is not None
        ctx.save_for_backward(q if normed else None, k if normed else None, cos, sin, q_weight, k_weight, output[2])
        ctx.mark_non_differentiable(output[2], *([] if ctx.with_k else [output[1]]))

    def _backward(ctx, grad_q, grad_k, _grad_rstd):  # type: ignore[no-untyped-def]
        grads, saved = (_heads(grad_q), _heads(grad_k) if ctx.with_k else None), ctx.saved_tensors
        out_q, out_k, *of_weights = torch.ops.llada_kernels.rope_backward(*grads, *saved)
        weights = (None if w is None else g.to(w.dtype) for w, g in zip(saved[4:6], of_weights, strict=True))
        return out_q, out_k if ctx.with_k else None, None, None, *weights, None

    register_autograd("llada_kernels::rope", _backward, _setup_context)


BACKEND: Backend = Backend("native", _native_supports, _native)
