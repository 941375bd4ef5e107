"""Rotary position embedding with the rotate-half pairing, on the first part of each head's dims."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from .._common import check_eps, check_same, check_shape, check_tensor
from ..dispatch import run
from . import native, reference, triton

__all__ = ["BACKENDS", "rope", "rope_tables"]

BACKENDS = (native.BACKEND, triton.BACKEND, reference.BACKEND)


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


@overload
def rope(q: Tensor, cos: Tensor, sin: Tensor, k: None = ..., q_weight: Tensor | None = ..., k_weight: None = ..., eps: float = ...,
         *, backend: str | None = ...) -> Tensor: ...  # fmt: skip
@overload
def rope(q: Tensor, cos: Tensor, sin: Tensor, k: Tensor, q_weight: Tensor | None = ..., k_weight: Tensor | None = ..., eps: float = ...,
         *, backend: str | None = ...) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def rope(
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    k: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Turn the first R dims of every head by the angle of its token's position; queries and keys of a layer in one call.

    Dim i pairs with dim i + R/2: ``y = x * cos + rotate_half(x) * sin``; dims R.. pass through. With weights every head is normed
    before it turns, as by :func:`rms_norm`.

    Args:
        q: [N, heads, D] fp32 or bf16 (triton: fp16 too; reference: any floating dtype): queries, or any heads. Views of a fused QKV
            product are used as they lie.
        cos: [T, R] dtype of q, R even and at most D: see :func:`rope_tables`.
        sin: [T, R] dtype of q.
        k: [T, KV heads, D] dtype of q, or None. With k, q may be of its first N tokens only; without, N is T.
        q_weight: [D] dtype of q: scale of the norm of each head of q; None: no norm.
        k_weight: [D] dtype of q: likewise of k. With k, both weights or none.
        eps: added to the mean squares of the norms; finite, at least 0.
        backend: use this backend or raise; by default the first that supports the call.

    Returns:
        [N, heads, D] dtype of q; with k a pair, [N, heads, D] and [T, KV heads, D].

    Precision: norms as :func:`rms_norm`; each product and each sum of the rotation is rounded to the dtype of q, as in the
        official code. Rotations, forward and backward, are bitwise equal in all backends; a norm's bits are those of
        :func:`rms_norm` of the same backend (native and reference; triton sums in another order).
    Determinism: bitwise, on any number of threads; differentiable in q, k and the weights.

    Raises:
        TypeError: an argument that is not a tensor or a number where one is expected.
        ValueError: a shape, dtype, device or eps differs from the above, or one weight of two is missing.
    """
    check_tensor("q", q, 3)
    tokens, _, head_dim = q.shape
    if k is not None:
        check_tensor("k", k, 3)
        check_shape("k", k, None, None, head_dim)
        check_same("k", k, "q", q)
        if tokens > k.shape[0]:
            raise ValueError(f"q: expected at most {k.shape[0]} tokens (those of k), got {tokens}")
        tokens = k.shape[0]
    check_tensor("cos", cos, 2)
    rotary_dim = cos.shape[1]
    if rotary_dim > head_dim or rotary_dim % 2:
        raise ValueError(f"cos: expected an even number of columns, at most head_dim {head_dim}, got {rotary_dim}")
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, 2)
        check_shape(name, table, tokens, rotary_dim)
        check_same(name, table, "q", q)
    if (k_weight is not None) != (q_weight is not None and k is not None):
        raise ValueError("k_weight: expected one exactly when there are k and q_weight")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_tensor(name, weight, 1)
            check_shape(name, weight, head_dim)
            check_same(name, weight, "q", q)
    return run("rope", BACKENDS, backend, q, cos, sin, k, q_weight, k_weight, check_eps(eps))
