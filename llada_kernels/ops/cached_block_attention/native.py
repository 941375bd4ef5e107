"""C++ kernel: reads the pages in place; inference only."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _library
from ...masks import DiffusionMask
from .._common import native_reason
from ..block_attention.native import head_dim_reason
from ..dispatch import Backend


def _supports(
    q: Tensor, k_new: Tensor, v_new: Tensor, cache_k: Tensor, cache_v: Tensor, page_table: Tensor, mask: DiffusionMask, scale: float
) -> str | None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_new, v_new, cache_k, cache_v)):
        return "native is inference only, and an input requires grad (use torch.no_grad, or the reference)"
    return native_reason(q, k_new, v_new, cache_k, cache_v, page_table) or head_dim_reason(q)


def _cached_block_attention(
    q: Tensor, k_new: Tensor, v_new: Tensor, cache_k: Tensor, cache_v: Tensor, page_table: Tensor, mask: DiffusionMask, scale: float
) -> Tensor:
    plan = mask.tile_plan()
    tensors = (q, k_new, v_new, cache_k, cache_v, page_table, mask.own)
    return torch.ops.llada_kernels.cached_block_attention(*(t.contiguous() for t in tensors), plan.tiles, plan.order, plan.rows, scale)


if _library.load_error is None:

    @torch.library.register_fake("llada_kernels::cached_block_attention")
    def _fake(q, *_):  # type: ignore[no-untyped-def]
        return torch.empty_like(q)


BACKEND: Backend = Backend("native", _supports, _cached_block_attention)
