"""`Routing`: which experts serve which token, and where each expert's tokens are found."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._common import check_same, check_tensor


class Routing(NamedTuple):
    """The result of :func:`moe_routing`, and what :func:`moe_mlp` takes.

    A slot is one (token, choice) pair, numbered ``t * K + k``. Sorted by expert, and within an
    expert by slot number, the slots of expert ``e`` are ``permutation[offsets[e]:offsets[e + 1]]``.

    Attributes:
        topk_ids: int32 [T, K]. The chosen experts of each token.
        topk_weights: fp32 [T, K] (fp64 for fp64 logits). Their weights, the only differentiable
            part.
        offsets: int32 [E + 1]. Rising from 0 to T * K.
        permutation: int32 [T * K]. Slot numbers sorted by expert (stable).
    """

    topk_ids: Tensor
    topk_weights: Tensor
    offsets: Tensor
    permutation: Tensor

    @property
    def num_experts(self) -> int:
        """E, the number of experts (also those without tokens)."""
        return self.offsets.shape[0] - 1

    @staticmethod
    def from_topk(ids: Tensor, weights: Tensor, num_experts: int) -> Routing:
        """Routing of choices made elsewhere.

        Args:
            ids: integer [T, K], each in [0, num_experts). One token may name an expert more than
                once.
            weights: floating point [T, K]; kept in fp64 if it is fp64, else cast to fp32
                (differentiably).
            num_experts: E.

        Raises:
            ValueError: a wrong shape, dtype or device, or an id out of range (checked on CPU
                tensors outside torch.compile; elsewhere such an id is the caller's error).
        """
        check_tensor("ids", ids, 2, (torch.int32, torch.int64, torch.int16, torch.uint8))
        check_tensor("weights", weights, 2, (torch.float32, torch.float64, torch.bfloat16, torch.float16))
        check_same("weights", weights, "ids", ids, dtype=False)
        if ids.shape != weights.shape:
            raise ValueError(f"weights: expected shape {tuple(ids.shape)} (that of ids), got {tuple(weights.shape)}")
        if num_experts < 1:
            raise ValueError(f"num_experts: expected at least 1, got {num_experts}")
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
            low, high = (int(v) for v in ids.aminmax())
            if low < 0 or high >= num_experts:
                raise ValueError(f"ids: expected values in [0, {num_experts}), got {low if low < 0 else high}")
        ids = ids.to(torch.int32)
        weights = weights.to(torch.promote_types(torch.float32, weights.dtype))
        return Routing(ids, weights, *sort_by_expert(ids, num_experts))


def sort_by_expert(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """int32 offsets [E + 1] and permutation [T * K] of chosen experts ``ids`` [T, K]. No syncs, no
    atomics."""
    experts, permutation = ids.reshape(-1).sort(stable=True)
    bounds = torch.arange(num_experts + 1, dtype=experts.dtype, device=experts.device)
    offsets = torch.searchsorted(experts, bounds, out_int32=True)
    return offsets, permutation.to(torch.int32)
