"""Plain PyTorch: dense scores for a few hundred queries at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ...masks import DiffusionMask
from .._common import compute_dtype
from ..dispatch import Backend

#: Queries whose scores are held at a time; bounds the memory of a forward.
CHUNK = 512


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attention of q [..., n, Hq, D] over k, v [..., m, Hkv, D] where ``visible`` bool [..., n, m]; 0 for a query that sees nothing."""
    dtype = compute_dtype(q)
    n, heads, dim = q.shape[-3:]
    kv_heads = k.shape[-2]
    queries = q.to(dtype).unflatten(-2, (kv_heads, heads // kv_heads))
    scores = torch.einsum("...nhgd,...mhd->...hgnm", queries * scale, k.to(dtype))
    hidden = ~visible[..., None, None, :, :]
    # A finite fill keeps rows without any key free of NaN, forward and backward; their uniform probabilities are cleared below.
    scores = scores.masked_fill(hidden, torch.finfo(dtype).min)
    probabilities = torch.softmax(scores, -1).masked_fill(hidden, 0.0)
    out = torch.einsum("...hgnm,...mhd->...nhgd", probabilities, v.to(dtype))
    return out.reshape(*q.shape[:-3], n, heads, dim).to(q.dtype)


def _block_attention(q: Tensor, k: Tensor, v: Tensor, mask: DiffusionMask | Tensor, scale: float) -> Tensor:
    if isinstance(mask, Tensor):
        batch = max(mask.shape[0], 1) if mask.dim() == 3 else 1
        q, k, v = (x.reshape(batch, x.shape[0] // batch, *x.shape[1:]) for x in (q, k, v))
        return attend(q, k, v, mask.reshape(batch, q.shape[1], k.shape[1]), scale).flatten(0, 1)
    visible = mask.mask_mod()
    key = torch.arange(k.shape[0], device=k.device)[None, :]
    parts = []
    for begin in range(0, max(q.shape[0], 1), CHUNK):
        query = torch.arange(begin, min(begin + CHUNK, q.shape[0]), device=q.device)[:, None]
        parts.append(attend(q[begin : begin + CHUNK], k, v, visible(None, None, query, key), scale))
    return torch.cat(parts)


BACKEND: Backend = Backend("reference", lambda *_: None, _block_attention)
