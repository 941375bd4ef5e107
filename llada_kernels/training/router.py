"""Keeping experts equally loaded: the bias update of the Ling recipe, and auxiliary losses for routers without a bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..model import Model

__all__ = ["ExpertLoads", "router_losses", "update_expert_bias"]


class ExpertLoads:
    """Tokens per expert and layer, summed over the micro-batches of one step."""

    def __init__(self) -> None:
        self.counts: dict[int, Tensor] = {}

    def add(self, router_outputs: Mapping[int, Any]) -> None:
        """Add the routing of one forward. It is keyed by layer, so a forward run again by checkpointing counts once."""
        for layer, output in router_outputs.items():
            count = output.routing.offsets.detach().diff().to(torch.int64)
            self.counts[layer] = self.counts[layer] + count if layer in self.counts else count

    def imbalance(self) -> float | None:
        """Largest load of an expert over the mean load, the worst of all layers; None without MoE layers."""
        if not self.counts:
            return None
        return max(float(c.max() / c.double().mean().clamp(min=1e-9)) for c in self.counts.values())


@torch.no_grad()
def update_expert_bias(model: Model, loads: ExpertLoads, rate: float) -> None:
    """``b += rate * (d - mean(d))`` with ``d = sign(mean(c) - c)`` for the loads c of each layer that has an expert bias.

    Precision: fp32. Determinism: bitwise.
    """
    for layer, count in loads.counts.items():
        bias = model.get_submodule(f"layers.{layer}.mlp.router").expert_bias
        if not isinstance(bias, Tensor):
            continue
        load = count.double()
        direction = torch.sign(load.mean() - load)
        bias.add_((rate * (direction - direction.mean())).to(bias))


def router_losses(router_outputs: Mapping[int, Any]) -> tuple[Tensor, Tensor]:
    """(load balance, z) of one forward, each the mean over MoE layers; fp32 scalars, differentiable in the router logits.

    Load balance is ``E * sum_e f_e P_e`` with f_e the experts' token counts over tokens * top_k and P_e the mean
    probability (softmax): 1 when both are uniform. z is the mean of logsumexp squared.
    """
    balance, z = torch.zeros(()), torch.zeros(())
    for output in router_outputs.values():
        logits = output.logits.float()
        counts = output.routing.offsets.diff().float()
        share = counts / counts.sum().clamp(min=1.0)
        balance = balance.to(logits.device) + logits.shape[-1] * (share * logits.softmax(-1).mean(0)).sum()
        z = z.to(logits.device) + logits.logsumexp(-1).pow(2).mean()
    layers = max(1, len(router_outputs))
    return balance / layers, z / layers
