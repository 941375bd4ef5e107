"""Plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Backend
from ..rms_norm.reference import normalised


def _reference(
    q: Tensor, cos: Tensor, sin: Tensor, k: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> Tensor | tuple[Tensor, Tensor]:
    if q_weight is not None:
        q = normalised(q, q_weight, eps)
    if k is None:
        return _turned(q, cos, sin)
    if k_weight is not None:
        k = normalised(k, k_weight, eps)
    return _turned(q, cos[: q.shape[0]], sin[: q.shape[0]]), _turned(k, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary_dim = cos.shape[1]
    turning, passing = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = turning.chunk(2, dim=-1)
    rotated_half = torch.cat((-second, first), dim=-1)
    turned = turning * cos.unsqueeze(1) + rotated_half * sin.unsqueeze(1)
    return torch.cat((turned, passing), dim=-1)


BACKEND: Backend = Backend("reference", lambda *_: None, _reference)
