"""Attention as PyTorch users do it, and exact values to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llada_kernels.masks import DiffusionMask

__all__ = ["additive", "exact_rows", "flex", "sdpa", "sdpa_per_document", "with_gradients"]


def additive(mask: DiffusionMask, dtype: torch.dtype) -> Tensor:
    """[1, 1, Tq, Tk], 0 where visible and -inf elsewhere: the mask of the official code, built once per batch."""
    return torch.zeros(mask.num_queries, mask.num_keys, dtype=dtype, device=mask.device).masked_fill_(~mask.dense(), float("-inf"))[
        None, None
    ]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, repeat: bool = True) -> Tensor:
    """[T, heads, D] through F.scaled_dot_product_attention; KV heads are repeated as in the official code, or left to its enable_gqa."""
    groups = q.shape[1] // k.shape[1]
    if repeat:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=not repeat)[0].transpose(0, 1)


def sdpa_per_document(q: Tensor, k: Tensor, v: Tensor, index: list[Tensor], masks: list[Tensor]) -> Tensor:
    """SDPA for the rows ``index`` of each document in turn: no work between documents, the best that a dense mask allows."""
    out = torch.empty_like(q)
    for rows, mask in zip(index, masks, strict=True):
        out[rows] = sdpa(q[rows], k[rows], v[rows], mask)
    return out


def flex(q: Tensor, k: Tensor, v: Tensor, mask: DiffusionMask) -> Callable[[], Tensor]:
    """FlexAttention, compiled when it is first called, which takes most of a minute; forward only, as its CPU kernel."""
    state: dict[str, Any] = {}

    def run() -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if not state:
            state["mask"] = create_block_mask(mask.mask_mod(), None, None, mask.num_queries, mask.num_keys, device="cpu")
            state["call"] = torch.compile(flex_attention)
        parts = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
        with torch.no_grad():
            return state["call"](*parts, block_mask=state["mask"], enable_gqa=True)[0].transpose(0, 1)

    return run


def exact_rows(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention of a few queries [n, Hq, D] under bool ``visible`` [n, Tk], scores and sums in ``dtype``."""
    scale = q.shape[-1] ** -0.5
    groups = q.shape[1] // k.shape[1]
    out = []
    for head in range(q.shape[1]):  # one head at a time: the scores of all would take gigabytes
        scores = (q[:, head].to(dtype) @ k[:, head // groups].to(dtype).T) * scale
        out.append(scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v[:, head // groups].to(dtype))
    return torch.stack(out, 1)


def with_gradients(call: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """The output of ``call(*inputs)`` and the gradient of each input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))
