"""One pre-norm layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..masks import DiffusionMask
from .attention import Attention
from .moe import GatedMLP, MoE, RouterOutput
from .norm import RMSNorm
from .plain import is_plain

__all__ = ["Block"]


class Block(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h)); the MLP is dense or a mixture of experts."""

    def __init__(self, config: Config, layer: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.attention = Attention(config, layer, dtype, device)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.has_experts = config.moe_layers[layer]  # what an adapter around the MLP would hide
        self.mlp: MoE | GatedMLP
        if self.has_experts:
            self.mlp = MoE(config, dtype, device)
        else:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, dtype, device)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: DiffusionMask | Tensor,
        cache: Any = None,
        router_outputs: dict[int, RouterOutput] | None = None,
        num_outputs: int | None = None,
    ) -> Tensor:
        """[T, hidden_size] -> the same, or its first ``num_outputs`` rows. Arguments as :class:`Attention`.

        A router's output goes to ``router_outputs[layer]``.

        Precision: sums and norms rounded in the dtype of x.
        Determinism: bitwise repeatable.
        """
        attended = self.attention(self.input_layernorm(x), cos, sin, mask, cache, num_outputs)
        if num_outputs is not None:
            x = x[:num_outputs]
        if is_plain(self.post_attention_layernorm, RMSNorm):
            y, x = self.post_attention_layernorm.add(attended, x)
        else:
            x = attended + x
            y = self.post_attention_layernorm(x)
        if not self.has_experts:
            return x + self.mlp(y)

        def record(output: RouterOutput) -> None:
            if router_outputs is not None:
                # A dict, so that gradient checkpointing, which runs this twice, does not count twice.
                router_outputs[self.layer] = output

        return x + self.mlp(y, record)
