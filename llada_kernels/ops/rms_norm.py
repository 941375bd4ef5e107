"""RMSNorm, with the roundings of the official model: normalise in fp32, round to the dtype of x, then scale."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library
from ._common import check_same, check_shape, check_tensor, compute_dtype, native_reason
from .dispatch import Backend, run

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """Root-mean-square normalisation over the last dimension: ``weight * round(x / sqrt(mean(x^2) + eps))``.

    Args:
        x: (..., H), fp32 or bf16 (the reference takes any floating dtype).
        weight: (H,), dtype of x.
        eps: added to the mean square.
        backend: "native" or "reference"; None takes the first that supports the call.

    Returns:
        (..., H), dtype of x.

    Raises:
        ValueError: wrong shape, dtype or device; the named backend does not support the call.

    Precision: fp32 inside; rounded to the dtype of x before and after the scaling, as the official "cast then scale".
    Determinism: bitwise repeatable, for any number of threads; differentiable in x and weight.
    """
    check_tensor("x", x)
    check_tensor("weight", weight, 1)
    if x.ndim == 0:
        raise ValueError("x: expected at least 1 dimension, got a scalar")
    check_shape("weight", weight, x.shape[-1])
    check_same("weight", weight, "x", x)
    return run("rms_norm", BACKENDS, backend, x, weight, float(eps))


def _reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    z = x.to(compute_dtype(x))
    z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
    return weight * z.to(x.dtype)


def _native_supports(x: Tensor, weight: Tensor, eps: float) -> str | None:
    return native_reason(x, weight)


def _native(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = x.numel() // max(x.shape[-1], 1)
    y, _ = torch.ops.llada_kernels.rms_norm(x.reshape(rows, x.shape[-1]).contiguous(), weight.contiguous(), eps)
    return y.view(x.shape)


if _library.load_error is None:

    @torch.library.register_fake("llada_kernels::rms_norm")
    def _fake(x, weight, eps):  # type: ignore[no-untyped-def]
        return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)

    @torch.library.register_fake("llada_kernels::rms_norm_backward")
    def _fake_backward(grad_y, x, weight, rstd):  # type: ignore[no-untyped-def]
        return torch.empty_like(x), torch.empty_like(weight, dtype=torch.float32)

    def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight, output[1])
        ctx.mark_non_differentiable(output[1])

    def _backward(ctx, grad_y, _grad_rstd):  # type: ignore[no-untyped-def]
        x, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = torch.ops.llada_kernels.rms_norm_backward(grad_y.contiguous(), x, weight, rstd)
        return grad_x, grad_weight.to(weight.dtype), None

    torch.library.register_autograd("llada_kernels::rms_norm", _backward, setup_context=_setup_context)


BACKENDS = (Backend("native", _native_supports, _native), Backend("reference", lambda *_: None, _reference))
