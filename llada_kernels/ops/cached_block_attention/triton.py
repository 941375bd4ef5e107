"""Triton kernels: pages are read in place, a long context is cut into chunks that fill the GPU; inference only."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...masks import GPU_BLOCK_M, DiffusionMask
from .. import _triton
from .._triton import define
from ..block_attention.triton import attention_reason, heads_per_tile, programs_per_tile, shared_memory, tokens_contiguous
from ..dispatch import Backend

#: A context is cut into at most this many chunks, of at least so many keys: 256 keys are 131 KB to read, where a chunk of 128 rows writes
#: 66 KB, and 4 KV heads with 32 chunks fill a GPU of 132 multiprocessors with one block at a context of 8192.
MOST_CHUNKS = 32
LEAST_KEYS = 256


def _sizes(dtype: torch.dtype, arch: int) -> dict[str, int]:
    if dtype == torch.float32 and not _triton.interpreting:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    if shared_memory(arch) >= 227:
        return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}


def _supports(
    q: Tensor, k_new: Tensor, v_new: Tensor, cache_k: Tensor, cache_v: Tensor, page_table: Tensor, mask: DiffusionMask, scale: float
) -> str | None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_new, v_new, cache_k, cache_v)):
        return "triton is inference only, and an input requires grad (use torch.no_grad, or the reference)"
    return attention_reason(scale, q, k_new, v_new, cache_k, cache_v, page_table)


def _cached_block_attention(
    q: Tensor, k_new: Tensor, v_new: Tensor, cache_k: Tensor, cache_v: Tensor, page_table: Tensor, mask: DiffusionMask, scale: float
) -> Tensor:
    block_m = _sizes(q.dtype, _triton.capability(q.device))["BLOCK_M"]
    tokens = block_m // heads_per_tile(q.shape[1] // k_new.shape[1], block_m)
    plan = mask.tile_plan(max(tokens, GPU_BLOCK_M[0]))
    return torch.ops.llada_kernels_triton.cached_block_attention(
        q, k_new, v_new, cache_k, cache_v, page_table, mask.own, plan.tiles, plan.order, plan.rows, plan.block_m, scale
    )


def _keys_contiguous(cache: Tensor) -> Tensor:
    """cache [P, page_size, Hkv, D] in which keys follow each other at one stride through all pages."""
    steps = cache.stride()
    fits = (
        steps[3] == 1 and steps[2] == cache.shape[3] and steps[0] == steps[1] * cache.shape[1] and steps[1] * cache.element_size() % 16 == 0
    )
    return cache if fits and cache.data_ptr() % 16 == 0 else cache.contiguous()


def _launch(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, page_table: Tensor, own: Tensor, tiles: Tensor, order: Tensor,
    rows: Tensor, tokens: int, scale: float,
) -> Tensor:  # fmt: skip
    from . import triton_kernels

    q, k, v = (tokens_contiguous(x) for x in (q, k, v))
    cache_k, cache_v = _keys_contiguous(cache_k), _keys_contiguous(cache_v)
    page_table = page_table if page_table.stride(1) == 1 else page_table.contiguous()
    heads, dim, kv_heads, page_size = q.shape[1], q.shape[2], k.shape[1], cache_k.shape[1]
    out = q.new_empty(q.shape)
    if len(tiles) == 0:
        return out
    sizes = _sizes(q.dtype, _triton.capability(q.device))
    packed, programs = programs_per_tile(heads // kv_heads, tokens, sizes["BLOCK_M"])
    programs *= len(tiles) * kv_heads
    constants = {
        "Q_HEADS": heads,
        "KV_HEADS": kv_heads,
        "D": dim,
        "HEADS": packed,
        "TOKENS": tokens,
        "MOST": MOST_CHUNKS,
        "LEAST": LEAST_KEYS,
    }
    most_chunks = min(MOST_CHUNKS, -(-page_table.shape[1] * page_size // LEAST_KEYS))
    # One program walks all chunks of its rows where there are programs enough to fill the GPU.
    split = most_chunks > 1 and 4 * programs < 3 * _triton.num_sms(q.device)
    parts: tuple[Tensor, ...] = (out, out, out)
    if split:
        shape = (programs, most_chunks + 1, sizes["BLOCK_M"])
        parts = tuple(q.new_empty(*shape, *last, dtype=torch.float32) for last in ((dim,), (), ()))
    triton_kernels.cached_kernel[(programs, most_chunks + 1 if split else 1)](
        q, k, v, cache_k, cache_v, page_table, own, tiles, order, rows, out, *parts,
        q.stride(0), k.stride(0), v.stride(0), cache_k.stride(1), cache_v.stride(1), page_table.stride(0), most_chunks,
        scale * math.log2(math.e), PAGE_SIZE=page_size, SPLIT=split, **constants, **sizes,
    )  # fmt: skip
    if split:
        merge = {"BLOCK_M": sizes["BLOCK_M"], "ROWS": 4, "num_warps": 4}
        triton_kernels.merge_chunks_kernel[(programs, sizes["BLOCK_M"] // merge["ROWS"])](
            *parts, out, tiles, order, most_chunks, **constants, **merge
        )
    return out


def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


define(
    "cached_block_attention(Tensor q, Tensor k_new, Tensor v_new, Tensor cache_k, Tensor cache_v, Tensor page_table, Tensor own, "
    "Tensor tiles, Tensor order, Tensor rows, int tokens, float scale) -> Tensor",
    _launch,
    _fake,
)

BACKEND: Backend = Backend("triton", _supports, _cached_block_attention)
