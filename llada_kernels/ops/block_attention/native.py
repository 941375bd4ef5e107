"""C++ kernels: tiles of the mask's plan, an online softmax, a query-stationary and a key-stationary half of the backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _library
from ...masks import DiffusionMask
from .._common import native_reason, register_autograd
from ..dispatch import Backend


def head_dim_reason(q: Tensor) -> str | None:
    """Why the native kernels cannot serve q's head dim, or None."""
    return None if q.shape[-1] % 8 == 0 else f"native serves head dims that are multiples of 8, got {q.shape[-1]}"


def _supports(q: Tensor, k: Tensor, v: Tensor, mask: DiffusionMask | Tensor, scale: float) -> str | None:
    if isinstance(mask, Tensor):
        return "a dense mask is served by the reference only (DiffusionMask.from_dense finds the intervals)"
    return native_reason(q, k, v) or head_dim_reason(q)


def _block_attention(q: Tensor, k: Tensor, v: Tensor, mask: DiffusionMask, scale: float) -> Tensor:
    # The C++ op takes the plan as plain tensors: a mask object never enters a compiled graph.
    plan = mask.tile_plan()
    out, _ = torch.ops.llada_kernels.block_attention(
        q.contiguous(), k.contiguous(), v.contiguous(), mask.context, mask.own, plan.tiles, plan.order,
        plan.key_offsets, plan.key_runs, plan.key_order, plan.block_n, scale,
    )  # fmt: skip
    return out


if _library.load_error is None:

    @torch.library.register_fake("llada_kernels::block_attention")
    def _fake(q, k, v, context, own, tiles, order, key_offsets, key_runs, key_order, block_n, scale):  # type: ignore[no-untyped-def]
        return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)

    @torch.library.register_fake("llada_kernels::block_attention_backward")
    def _fake_backward(grad_out, q, k, v, *_):  # type: ignore[no-untyped-def]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, ctx.block_n, ctx.scale = inputs
        out, lse = output
        ctx.save_for_backward(*tensors, out, lse)
        ctx.mark_non_differentiable(lse)

    def _backward(ctx, grad_out, _grad_lse):  # type: ignore[no-untyped-def]
        q, k, v, *plan, out, lse = ctx.saved_tensors
        grads = torch.ops.llada_kernels.block_attention_backward(grad_out.contiguous(), q, k, v, out, lse, *plan, ctx.block_n, ctx.scale)
        return *grads, *[None] * 9

    register_autograd("llada_kernels::block_attention", _backward, _setup_context)


BACKEND: Backend = Backend("native", _supports, _block_attention)
