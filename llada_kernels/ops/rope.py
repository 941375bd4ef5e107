"""Rotary position embedding with the rotate-half pairing, on the first part of each head's dims."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library
from ._common import check_same, check_shape, check_tensor, native_reason
from .dispatch import Backend, run

__all__ = ["rope", "rope_tables"]


def rope_tables(position_ids: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The cos and sin tables that :func:`rope` takes.

    Args:
        position_ids: [...] int64: positions, usually [T].
        rotary_dim: R, the number of dims that turn; even.
        theta: base of the frequencies.
        dtype: dtype of the tables: that of the tensor they will be applied to.

    Returns:
        cos and sin, [..., R] ``dtype``; the second half repeats the first.

    Precision: angles, cos and sin in fp32 whatever ``dtype`` is, then one rounding, as in the
        official code.

    Raises:
        ValueError: ``rotary_dim`` is not even and positive, or ``theta`` is not positive.
    """
    check_tensor("position_ids", position_ids)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim: expected an even number above 0, got {rotary_dim}")
    if not theta > 0:
        raise ValueError(f"theta: expected a number above 0, got {theta}")
    exponent = torch.arange(0, rotary_dim, 2, device=position_ids.device).float() / rotary_dim
    angles = position_ids.unsqueeze(-1).float() * (1.0 / theta**exponent)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> Tensor:
    """Turn the first R dims of every head by the angle of its token's position.

    Dim i pairs with dim i + R/2: ``y = x * cos + rotate_half(x) * sin``; dims R.. pass through.

    Args:
        x: [T, heads, D] fp32 or bf16 (reference: any floating dtype): queries or keys.
        cos: [T, R] dtype of x, R even and at most D: see :func:`rope_tables`.
        sin: [T, R] dtype of x.
        backend: use this backend or raise; by default the first that supports the call.

    Returns:
        [T, heads, D] dtype of x.

    Precision: each product and each sum is rounded to the dtype of x, as in the official code;
        forward and backward are bitwise equal in all backends.
    Determinism: bitwise, on any number of threads.

    Raises:
        ValueError: a shape, dtype or device differs from the above.
    """
    check_tensor("x", x, 3)
    tokens, _, head_dim = x.shape
    check_tensor("cos", cos, 2)
    rotary_dim = cos.shape[1]
    if rotary_dim > head_dim or rotary_dim % 2:
        raise ValueError(f"cos: expected an even number of columns, at most head_dim {head_dim}, got {rotary_dim}")
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, 2)
        check_shape(name, table, tokens, rotary_dim)
        check_same(name, table, "x", x)
    return run("rope", BACKENDS, backend, x, cos, sin)


def _reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary_dim = cos.shape[1]
    turning, passing = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = turning.chunk(2, dim=-1)
    rotated_half = torch.cat((-second, first), dim=-1)
    turned = turning * cos.unsqueeze(1) + rotated_half * sin.unsqueeze(1)
    return torch.cat((turned, passing), dim=-1)


def _native_supports(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    if cos.requires_grad or sin.requires_grad:
        return "native treats cos and sin as constants, one of them requires a gradient"
    return native_reason(x, cos, sin)


def _native(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y: Tensor = torch.ops.llada_kernels.rope(x.contiguous(), cos.contiguous(), sin.contiguous())
    return y


if _library.load_error is None:

    @torch.library.register_fake("llada_kernels::rope")
    def _fake(x, cos, sin):  # type: ignore[no-untyped-def]
        return torch.empty_like(x)

    @torch.library.register_fake("llada_kernels::rope_backward")
    def _fake_backward(grad_y, cos, sin):  # type: ignore[no-untyped-def]
        return torch.empty_like(grad_y)

    def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs[1:])

    def _backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return torch.ops.llada_kernels.rope_backward(grad_y.contiguous(), cos, sin), None, None

    torch.library.register_autograd("llada_kernels::rope", _backward, setup_context=_setup_context)


BACKENDS = (
    Backend("native", _native_supports, _native),
    Backend("reference", lambda *_: None, _reference),
)
