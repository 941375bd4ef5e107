"""RMSNorm, with the roundings of the official model: normalise in fp32, round to the dtype of x, then scale."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from .._common import check_eps, check_same, check_shape, check_tensor
from ..dispatch import run
from . import native, reference, triton

__all__ = ["BACKENDS", "rms_norm"]

BACKENDS = (native.BACKEND, triton.BACKEND, reference.BACKEND)


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
        x: (..., H), fp32 or bf16 (triton: fp16 too; the reference takes any floating dtype).
        weight: (H,), dtype of x.
        eps: added to the mean square; finite, at least 0.
        residual: (..., H), shape and dtype of x, or None.
        backend: use this backend or raise; by default the first that supports the call.

    Returns:
        (..., H), dtype of x; with a residual (that of x + residual, x + residual).

    Raises:
        TypeError: an argument that is not a tensor or a number where one is expected.
        ValueError: wrong shape, dtype, device or eps; the named backend does not support the call.

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
    return run("rms_norm", BACKENDS, backend, x, weight, check_eps(eps), residual)
