"""Inputs on the device, and exact values computed there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llada_kernels.masks import DiffusionMask

__all__ = ["generator", "normal", "one_kv_head", "qkv"]


def generator(device: torch.device, seed: int) -> torch.Generator:
    """A seeded generator of the device."""
    return torch.Generator(device).manual_seed(seed)


def normal(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers: zeros or constants would run faster than real data."""
    return torch.randn(*shape, device=device, dtype=torch.float32, generator=generator(device, seed)).mul_(scale).to(dtype)


def qkv(
    device: torch.device, dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q [T, Hq, D], k and v [T, Hkv, D]."""
    q, k, v = (normal(device, dtype, tokens, h, head_dim, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads)))
    return q, k, v


def one_kv_head(
    q: Tensor, k: Tensor, v: Tensor, mask: DiffusionMask, grad: Tensor | None, dtype: torch.dtype, chunk: int = 1024
) -> list[Tensor]:
    """Output of the query heads of KV head 0 in ``dtype``, and with ``grad`` the gradients of q, k and v as well.

    Queries are taken ``chunk`` at a time, so that 64k tokens fit.
    """
    groups = q.shape[1] // k.shape[1]
    queries, keys, values = (x.detach().to(dtype).requires_grad_(grad is not None) for x in (q[:, :groups], k[:, 0], v[:, 0]))
    visible: Callable[..., Any] = mask.mask_mod()
    index = torch.arange(len(k), device=k.device)[None]
    outs = []
    for begin in range(0, len(q), chunk):
        rows = torch.arange(begin, min(begin + chunk, len(q)), device=q.device)
        hidden = ~visible(None, None, rows[:, None], index)
        scores = torch.einsum("nhd,md->hnm", queries[rows], keys) * q.shape[2] ** -0.5
        out = torch.einsum("hnm,md->nhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)
        outs.append(out.detach())
        if grad is not None:
            out.backward(grad[rows, :groups].to(dtype))
    result = [torch.cat(outs)]
    if grad is not None:
        result += [x.grad for x in (queries, keys, values) if x.grad is not None]
    return result
