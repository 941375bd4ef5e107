"""Triton kernels: norm and rotation of all heads of queries and keys in one launch; the backward in one, and a sum of weight gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._triton import define, define_autograd, triton_reason
from ..dispatch import Backend
from ..rms_norm.triton import programs, sum_parts

#: Dims of a head: more would not fit a tile's registers.
WIDEST = 1024


def _supports(
    q: Tensor, cos: Tensor, sin: Tensor, k: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> str | None:
    if cos.requires_grad or sin.requires_grad:
        return "triton treats cos and sin as constants, one of them requires a gradient"
    if q.shape[2] > WIDEST:
        return f"triton serves heads of up to {WIDEST} dims, got {q.shape[2]}"
    return triton_reason(q, cos, sin, k, q_weight, k_weight)


def _rope(
    q: Tensor, cos: Tensor, sin: Tensor, k: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> Tensor | tuple[Tensor, Tensor]:
    q_out, k_out, _ = torch.ops.llada_kernels_triton.rope(q, k, cos, sin, q_weight, k_weight, eps)
    return q_out if k is None else (q_out, k_out)


def _blocks(dim: int, rotary: int) -> dict[str, int]:
    """Half of the turning dims, the passing ones, and as many heads as give each of 128 threads 16 elements."""
    half = max(16, 1 << max(rotary // 2 - 1, 0).bit_length())
    rest = max(16, 1 << max(dim - rotary - 1, 0).bit_length())
    rows = max(1, 2048 // (2 * half + rest))
    return {"HALF": half, "REST": rest, "ROWS": 1 << (rows.bit_length() - 1), "num_warps": 4}


def _heads(x: Tensor) -> Tensor:
    """``x`` [T, heads, D] such that the heads of each token lie one after the other."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _forward(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_kernels import rope_kernel

    outs = _forward_fake(q, k, cos, sin, q_weight, k_weight, eps)
    q, cos, sin = _heads(q), cos.contiguous(), sin.contiguous()
    keys = q[:0] if k is None else _heads(k)
    weights = [q if w is None else w.contiguous() for w in (q_weight, k_weight)]
    dim, rotary = q.shape[2], cos.shape[1]
    q_rows, k_rows = q.shape[0] * q.shape[1], keys.shape[0] * keys.shape[1]
    if q_rows + k_rows and dim:
        blocks = _blocks(dim, rotary)
        q_tiles, k_tiles = -(-q_rows // blocks["ROWS"]), -(-k_rows // blocks["ROWS"])
        rope_kernel[(q_tiles + k_tiles,)](
            q, keys, q.stride(0), keys.stride(0), *weights, *outs, cos, sin, q_rows, k_rows, q_tiles, eps,
            NORM=q_weight is not None, Q_HEADS=max(1, q.shape[1]), K_HEADS=max(1, keys.shape[1]), DIM=dim, ROTARY=rotary, **blocks,
            enable_fp_fusion=False,
        )  # fmt: skip
    return outs


def _forward_fake(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = 0 if q_weight is None else q.shape[0] * q.shape[1] + (0 if k is None else k.shape[0] * k.shape[1])
    return q.new_empty(q.shape), q.new_empty(0 if k is None else k.shape), q.new_empty(rows, dtype=torch.float32)


def _backward(
    grad_q: Tensor, grad_k: Tensor | None, q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from .triton_kernels import rope_backward_kernel

    grad_q_in, grad_k_in, *of_weights = _backward_fake(grad_q, grad_k, q, k, cos, sin, q_weight, k_weight, rstd)
    grad_q, cos, sin = _heads(grad_q), cos.contiguous(), sin.contiguous()
    keys = grad_q[:0] if grad_k is None else _heads(grad_k)
    inputs = [grad if x is None else _heads(x) for x, grad in ((q, grad_q), (k, keys))]
    weights = [grad_q if w is None else w.contiguous() for w in (q_weight, k_weight)]
    dim, rotary = grad_q.shape[2], cos.shape[1]
    rows = [x.shape[0] * x.shape[1] for x in (grad_q, keys)]
    for out in of_weights:
        out.zero_()  # without rows nothing writes them
    if sum(rows) and dim:
        blocks = _blocks(dim, rotary)
        normed = q_weight is not None
        tiles = [-(-n // blocks["ROWS"]) for n in rows]
        counts = [programs(n, blocks["ROWS"], grad_q.device) for n in rows] if normed else tiles
        partial = grad_q.new_empty(sum(counts) if normed else 0, dim, dtype=torch.float32)
        rope_backward_kernel[(sum(counts),)](
            grad_q, keys, grad_q.stride(0), keys.stride(0), *inputs, *(x.stride(0) for x in inputs), *weights, rstd,
            grad_q_in, grad_k_in, partial, cos, sin, *rows, *counts,
            NORM=normed, Q_HEADS=max(1, grad_q.shape[1]), K_HEADS=max(1, keys.shape[1]), DIM=dim, ROTARY=rotary, **blocks,
            enable_fp_fusion=False,
        )  # fmt: skip
        if normed:
            of_weights = [sum_parts(part) if len(part) else out for part, out in zip(partial.split(counts), of_weights, strict=True)]
    return grad_q_in, grad_k_in, of_weights[0], of_weights[1]


def _backward_fake(
    grad_q: Tensor, grad_k: Tensor | None, q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    first, second = (grad_q.new_empty(0 if w is None else w.shape, dtype=torch.float32) for w in (q_weight, k_weight))
    return grad_q.new_empty(grad_q.shape), grad_q.new_empty(0 if grad_k is None else grad_k.shape), first, second


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, cos, sin, q_weight, k_weight, _ = inputs
    ctx.with_k, normed = k is not None, q_weight is not None
    ctx.save_for_backward(q if normed else None, k if normed else None, cos, sin, q_weight, k_weight, output[2])
    ctx.mark_non_differentiable(output[2], *([] if ctx.with_k else [output[1]]))


def _autograd(ctx: Any, grad_q: Tensor, grad_k: Tensor, _grad_rstd: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    out_q, out_k, *of_weights = torch.ops.llada_kernels_triton.rope_backward(grad_q, grad_k if ctx.with_k else None, *saved)
    weights = (None if w is None else g.to(w.dtype) for w, g in zip(saved[4:6], of_weights, strict=True))
    return out_q, out_k if ctx.with_k else None, None, None, *weights, None


define(
    "rope(Tensor q, Tensor? k, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, float eps)"
    " -> (Tensor q_out, Tensor k_out, Tensor rstd)",
    _forward, _forward_fake,
)  # fmt: skip
define(
    "rope_backward(Tensor grad_q, Tensor? grad_k, Tensor? q, Tensor? k, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight,"
    " Tensor rstd) -> (Tensor grad_q_in, Tensor grad_k_in, Tensor grad_q_weight, Tensor grad_k_weight)",
    _backward, _backward_fake,
)  # fmt: skip
define_autograd("rope", _autograd, _setup_context)

BACKEND: Backend = Backend("triton", _supports, _rope)
