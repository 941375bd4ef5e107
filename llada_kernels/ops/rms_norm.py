"""RMSNorm, with the roundings of the official model: normalise in fp32, round to the dtype of x, then scale."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from .. import _library
from ._common import check_same, check_shape, check_tensor, compute_dtype, native_reason
from .dispatch import Backend, run

__all__ = ["normalised", "rms_norm"]


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = ..., residual: None = ..., *, backend: str | None = ...) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor, *, backend: str | None = ...) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None, *, backend: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square normalisation over the last dimension: ``weight * round(x / sqrt(mean(x^2) + eps))``.

    With a residual it is added first, and the sum, the residual of what follows, is returned as well.

    Args:
        x: (..., H), fp32 or bf16 (the reference takes any floating dtype).
        weight: (H,), dtype of x.
        eps: added to the mean square.
        residual: (..., H), shape and dtype of x, or None.
        backend: "native" or "reference"; None takes the first that supports the call.

    Returns:
        (..., H), dtype of x; with a residual (that of x + residual, x + residual).

    Raises:
        ValueError: wrong shape, dtype or device; the named backend does not support the call.

    Precision: fp32 inside; rounded to the dtype of x before and after the scaling, as the official "cast then scale"; the sum is
        rounded before it is normalised, so that the result is bitwise that of two steps, its gradients as well.
    Determinism: bitwise repeatable, for any number of threads; differentiable in x, weight and residual.
    """
    check_tensor("x", x)
    check_tensor("weight", weight, 1)
    if x.ndim == 0:
        raise ValueError("x: expected at least 1 dimension, got a scalar")
    check_shape("weight", weight, x.shape[-1])
    check_same("weight", weight, "x", x)
    if residual is not None:
        check_tensor("residual", residual)
        check_shape("residual", residual, *x.shape)
        check_same("residual", residual, "x", x)
    return run("rms_norm", BACKENDS, backend, x, weight, float(eps), residual)


def normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The reference without a residual."""
    z = x.to(compute_dtype(x))
    z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
    return weight * z.to(x.dtype)


def _reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    if residual is None:
        return normalised(x, weight, eps)
    total = x + residual
    return normalised(total, weight, eps), total


def _native_supports(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> str | None:
    return native_reason(x, weight, residual)


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

    torch.library.register_autograd("llada_kernels::rms_norm", _backward, setup_context=_setup_context)


BACKENDS = (Backend("native", _native_supports, _native), Backend("reference", lambda *_: None, _reference))
