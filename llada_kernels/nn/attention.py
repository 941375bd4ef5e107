"""Self-attention of the family: fused QKV, per-head norms, partial rotary embedding, grouped KV heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config
from ..masks import DiffusionMask
from ..ops.block_attention import block_attention
from ..ops.cached_block_attention import cached_block_attention
from ..ops.rope import rope
from .norm import RMSNorm
from .plain import is_plain

__all__ = ["Attention"]


class Attention(nn.Module):
    """Attention over packed tokens.

    The rows of ``qkv`` are all query heads, then all key heads, then all value heads, as in the official checkpoints.
    """

    def __init__(self, config: Config, layer: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        self.qkv = nn.Linear(config.hidden_size, config.qkv_size, config.use_qkv_bias, device, dtype)
        self.dense = nn.Linear(width, config.hidden_size, config.use_bias, device, dtype)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype, device) if config.use_qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype, device) if config.use_qk_norm else None

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: DiffusionMask | Tensor,
        cache: Any = None,
        num_outputs: int | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: [T, hidden_size], dtype of the weights.
            cos, sin: [T, rotary_dim], dtype of x.
            mask: visibility of the T tokens; of kind "cached" exactly when there is a cache.
            cache: a KVCache whose pages hold the context. New keys and values are recorded in it, not written.
            num_outputs: attend from the first N tokens only; the others give keys and values. Needs a DiffusionMask, no cache.

        Returns:
            [T, hidden_size], or [N, hidden_size] with ``num_outputs``, dtype of x.

        Precision: norms before the rotation; scores scaled by 1 / sqrt(head_dim); softmax in fp32.
        Determinism: bitwise repeatable.
        """
        if num_outputs is None:
            q, k, v = self._all(x)
        else:
            assert isinstance(mask, DiffusionMask) and cache is None
            q, k, v = self._fewer_queries(x, num_outputs)
            mask = mask.first_queries(num_outputs)
        if is_plain(self.q_norm, RMSNorm) and is_plain(self.k_norm, RMSNorm) and self.q_norm.eps == self.k_norm.eps:
            q, k = rope(q, cos, sin, k, self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        else:
            q = q if self.q_norm is None else self.q_norm(q)
            k = k if self.k_norm is None else self.k_norm(k)
            q, k = rope(q, cos, sin, k)
        if cache is None:
            out = block_attention(q, k, v, mask)
        else:
            if not isinstance(mask, DiffusionMask):
                raise TypeError(f"mask: expected a DiffusionMask with a cache, got {type(mask).__name__}")
            out = cached_block_attention(q, k, v, cache.keys[self.layer], cache.values[self.layer], cache.page_table, mask)
            cache.record(self.layer, k, v)
        return self.dense(out.reshape(q.shape[0], -1))

    def _all(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all tokens."""
        q, k, v = self.qkv(x).view(x.shape[0], sum(self.heads), self.head_dim).split(self.heads, dim=1)
        return q, k, v

    def _fewer_queries(self, x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the first ``count`` tokens, keys and values of all."""
        if not is_plain(self.qkv, nn.Linear):
            q, k, v = self._all(x)
            return q[:count], k, v
        sizes = [self.heads[0] * self.head_dim, 2 * self.heads[1] * self.head_dim]
        weights = self.qkv.weight.split(sizes)
        biases = (None, None) if self.qkv.bias is None else self.qkv.bias.split(sizes)
        q = F.linear(x[:count], weights[0], biases[0]).view(count, self.heads[0], self.head_dim)
        k, v = F.linear(x, weights[1], biases[1]).view(x.shape[0], 2 * self.heads[1], self.head_dim).chunk(2, dim=1)
        return q, k, v
