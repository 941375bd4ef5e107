"""C++ kernels: one pass over the rows, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _library
from .._common import native_reason, register_autograd
from ..dispatch import Backend


def _native_supports(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> str | None:
    return native_reason(x, weight, residual, cuda="rms_norm")


def _native(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    shape = x.shape
    flat = (x.numel() // max(shape[-1], 1), shape[-1])
    more = None if residual is None else residual.reshape(flat).contiguous()
    y, total, _ = torch.ops.llada_kernels.rms_norm(x.reshape(flat).contiguous(), weight.contiguous(), eps, more)
    return y.view(shape) if residual is None else (y.view(shape), total.view(shape))


if _library.load_error is None:

    @torch.library.register_fake("llada_kernels::rms_norm")
    def _fake(x, weight, eps, residual):  # type: ignore[no-untyped-def]
        total = x.new_empty(0) if residual is None else torch.empty_like(x)
        return torch.empty_like(x), total, x.new_empty(x.shape[0], dtype=torch.float32)

    @torch.library.register_fake("llada_kernels::rms_norm_backward")
    def _fake_backward(grad_y, grad_total, x, weight, rstd):  # type: ignore[no-untyped-def]
        return torch.empty_like(x), torch.empty_like(weight, dtype=torch.float32)

    def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, weight, _, residual = inputs
        ctx.with_residual = residual is not None
        ctx.save_for_backward(x if residual is None else output[1], weight, output[2])
        ctx.mark_non_differentiable(output[2], *([] if ctx.with_residual else [output[1]]))

    def _backward(ctx, grad_y, grad_total, _grad_rstd):  # type: ignore[no-untyped-def]
        x, weight, rstd = ctx.saved_tensors
        more = grad_total.contiguous() if ctx.with_residual else None
        grad_x, grad_weight = torch.ops.llada_kernels.rms_norm_backward(grad_y.contiguous(), more, x, weight, rstd)
        return grad_x, grad_weight.to(weight.dtype), None, grad_x if ctx.with_residual else None

    register_autograd("llada_kernels::rms_norm", _backward, _setup_context)


BACKEND: Backend = Backend("native", _native_supports, _native)
