"""Plain PyTorch: the pages of all rows and the new keys side by side, under a dense mask for a few hundred queries at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ...masks import DiffusionMask
from ..block_attention.reference import CHUNK, attend
from ..dispatch import Backend


def _cached_block_attention(
    q: Tensor, k_new: Tensor, v_new: Tensor, cache_k: Tensor, cache_v: Tensor, page_table: Tensor, mask: DiffusionMask, scale: float
) -> Tensor:
    assert mask.context_lens is not None and mask.cu_query_lens is not None
    rows, max_pages = page_table.shape
    page_size, num_pages = cache_k.shape[1], cache_k.shape[0]
    capacity = max_pages * page_size
    if not torch.compiler.is_compiling():  # reads values: not for a compiled graph
        check_pages(page_table, mask.context_lens, page_size, num_pages)
    place = torch.arange(capacity, device=q.device)
    committed = place[None, :] < mask.context_lens[:, None]  # [R, capacity]
    if num_pages == 0:
        cached_k, cached_v = (x.new_zeros(rows * capacity, *x.shape[2:]) for x in (cache_k, cache_v))
    else:
        pages = page_table.long().clamp(0, num_pages - 1)
        # What lies behind the context may be uninitialised: 0 * NaN must not reach the sums.
        behind = ~committed.flatten()[:, None, None]
        cached_k, cached_v = (x[pages].flatten(0, 2).masked_fill(behind, 0.0) for x in (cache_k, cache_v))
    k, v = torch.cat([cached_k, k_new]), torch.cat([cached_v, v_new])

    row_of_key = torch.arange(rows, device=q.device).repeat_interleave(capacity)
    new_key = torch.arange(k_new.shape[0], device=q.device)
    parts = []
    for begin in range(0, max(q.shape[0], 1), CHUNK):
        query = torch.arange(begin, min(begin + CHUNK, q.shape[0]), device=q.device)
        row_of_query = torch.searchsorted(mask.cu_query_lens, query.to(torch.int32), right=True) - 1
        in_context = (row_of_query[:, None] == row_of_key[None, :]) & committed.flatten()[None, :]
        own = mask.own[query]
        in_own = (new_key[None, :] >= own[:, :1]) & (new_key[None, :] < own[:, 1:])
        parts.append(attend(q[begin : begin + CHUNK], k, v, torch.cat([in_context, in_own], 1), scale))
    return torch.cat(parts)


def check_pages(page_table: Tensor, context_lens: Tensor, page_size: int, num_pages: int) -> None:
    """Raise unless every row's context fits its pages and names pages that exist."""
    capacity = page_table.shape[1] * page_size
    too_long = (context_lens > capacity).nonzero()
    if len(too_long):
        row = int(too_long[0])
        raise ValueError(f"page_table: expected pages for the {int(context_lens[row])} cached keys of row {row}, got {capacity} places")
    used = torch.arange(page_table.shape[1], device=page_table.device)[None, :] * page_size < context_lens[:, None]
    bad = (used & ((page_table < 0) | (page_table >= num_pages))).nonzero()
    if len(bad):
        row, page = bad[0].tolist()
        raise ValueError(f"page_table: expected pages below {num_pages}, got {int(page_table[row, page])} in row {row}")


BACKEND: Backend = Backend("reference", lambda *_: None, _cached_block_attention)
