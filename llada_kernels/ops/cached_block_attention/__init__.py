"""Attention of new tokens over a paged KV cache and the new keys: generation. The cache is read in place and never written."""

from __future__ import annotations

import torch
from torch import Tensor

from ...masks import DiffusionMask
from .._common import check_same, check_shape, check_tensor
from ..block_attention import check_attention_inputs, check_mask, resolve_scale
from ..dispatch import run
from . import native, reference, triton

__all__ = ["cached_block_attention"]

BACKENDS = (native.BACKEND, triton.BACKEND, reference.BACKEND)


def cached_block_attention(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    page_table: Tensor,
    mask: DiffusionMask,
    softmax_scale: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Each new token sees the cached keys of its row, and its row's new keys up to the end of its own block.

    Args:
        q: (T, Hq, D), fp32 or bf16, on a GPU fp16 too (the reference takes any floating dtype); rows packed one after the other.
        k_new: (T, Hkv, D), dtype of q; Hkv divides Hq and query head a uses KV head a // (Hq / Hkv).
        v_new: (T, Hkv, D), dtype of q.
        cache_k: (P, page_size, Hkv, D), dtype of q.
        cache_v: (P, page_size, Hkv, D), dtype of q.
        page_table: int32 (R, max_pages); key i of row r lies in page ``page_table[r, i // page_size]`` at ``i % page_size``. Entries
            and places behind a row's context are never read.
        mask: of kind ``cached``, R rows and T queries.
        softmax_scale: factor of the scores; None: 1 / sqrt(D).
        backend: "native" (D a multiple of 8), "triton" (GPU, D of 64 or 128), both for inference, or "reference"; None takes the first that
            supports the call.

    Returns:
        (T, Hq, D), dtype of q.

    Raises:
        ValueError: wrong shape, dtype or device; mask and inputs differ in length; a context longer than its pages or a page number
            outside the cache (not on a GPU, where reading them would wait); the named backend does not support the call.
        TypeError: an argument has a wrong Python type.

    Precision: scores and sums in fp32 (fp64 for fp64 inputs), one rounding at the end. Native rounds the probabilities of bf16 inputs
        to bf16 before they multiply v where the CPU multiplies bf16, as PyTorch does; triton does so for both 16-bit dtypes.
    Determinism: bitwise repeatable, for any number of threads; a row's result does not depend on the other rows. Native and triton are
        for inference only, the reference is differentiable.
    """
    check_attention_inputs(q, k_new, v_new, "k_new", "v_new")
    if not isinstance(mask, DiffusionMask):
        raise TypeError(f"mask: expected a DiffusionMask, got {type(mask).__name__}")
    if mask.kind != "cached" or mask.context_lens is None:
        raise ValueError(f"mask: expected kind 'cached', got {mask.kind!r} (use block_attention)")
    check_mask(mask, q, k_new, "k_new")
    check_tensor("cache_k", cache_k, 4)
    check_shape("cache_k", cache_k, None, None, k_new.shape[1], k_new.shape[2])
    check_shape("cache_v", check_tensor("cache_v", cache_v, 4), *cache_k.shape)
    check_same("cache_k", cache_k, "q", q)
    check_same("cache_v", cache_v, "q", q)
    check_tensor("page_table", page_table, 2, (torch.int32,))
    check_shape("page_table", page_table, mask.context_lens.shape[0], None)
    check_same("page_table", page_table, "q", q, dtype=False)
    if cache_k.shape[1] < 1:
        raise ValueError(f"cache_k: expected pages of at least one key, got shape {tuple(cache_k.shape)}")
    scale = resolve_scale(softmax_scale, q)
    return run("cached_block_attention", BACKENDS, backend, q, k_new, v_new, cache_k, cache_v, page_table, mask, scale)
