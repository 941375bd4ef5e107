"""Triton kernels at temperature 0: products of a part of 1024 ids at a time, of which only a few numbers per position are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _triton
from .._triton import define, triton_reason
from ..dispatch import Backend
from ..threshold_unmask.arguments import Rules
from ..threshold_unmask.triton import PART, apply_rules, rules_fake, statistics, supports_rules

#: GPUs whose blocks may use 147 KiB of shared memory, and whose tensor cores take both operands from there (8.0's spill registers).
_WIDE = (90, 100, 103)


def _supports(hidden: Tensor, lm_head: Tensor, rules: Rules) -> str | None:
    return supports_rules(hidden, rules) or triton_reason(lm_head)


def _tile(hidden: Tensor, positions: int) -> tuple[dict[str, Any], int]:
    """Tile of the product, and programs per multiprocessor.

    Up to 64 positions the weights' bytes decide: they are the tensor cores' first operand (SWAP), and two programs per
    multiprocessor hold all 154 parts of a vocabulary of 157184 ids at once, each with 4 stages of 16 KiB on their way. Beyond,
    arithmetic decides.
    """
    few = next((n for n in (16, 32, 64) if positions <= n), None)
    # "P": after the product a thread holds 64 logits; with 128 registers spill.
    if hidden.dtype == torch.float32:  # no tensor cores: exact products only
        small = few or 64
        return {"BM": small, "BN": 64, "BK": 32, "SWAP": small < 64, "P": 8, "num_warps": 4, "num_stages": 2}, 2
    if few:
        return {"BM": few, "BN": 128, "BK": 64, "SWAP": True, "P": 8, "num_warps": 4, "num_stages": 4}, 2
    wide = _triton.capability(hidden.device) in _WIDE
    return {"BM": 128, "BN": 256 if wide else 128, "BK": 64, "SWAP": False, "P": 16, "num_warps": 8, "num_stages": 3}, 1


def _launch(hidden: Tensor, lm_head: Tensor, tokens: Tensor, mask_token_id: int, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    from . import triton_kernels

    hidden, lm_head = hidden.contiguous(), lm_head.contiguous()
    vocab, width = lm_head.shape
    positions = tokens.numel()
    largest, total, best = statistics(hidden, positions, vocab, 3)
    ids = torch.empty_like(largest, dtype=torch.int32)
    if positions:
        tile, programs = _tile(hidden, positions)
        tiles = largest.shape[1] * -(-positions // tile["BM"])
        grid = (min(tiles, programs * _triton.num_sms(hidden.device)),)
        scratch = hidden.new_empty(grid[0], tile["BM"], PART)
        triton_kernels.head_parts_kernel[grid](
            hidden, lm_head, scratch, largest, total, best, ids, positions, mask_token_id,
            VOCAB=vocab, WIDTH=width, enable_fp_fusion=False, **tile,
        )  # fmt: skip
    return apply_rules(largest, total, best, ids, None, vocab, tokens, mask_token_id, *others)


define(
    "lm_head_unmask(Tensor hidden, Tensor lm_head, Tensor tokens, int mask_token_id, Tensor threshold, Tensor? editing_threshold, "
    "Tensor min_unmask, Tensor? editable) -> (Tensor, Tensor, Tensor)",
    _launch, lambda hidden, lm_head, tokens, *_: rules_fake(tokens),
)  # fmt: skip


def _lm_head_unmask(hidden: Tensor, lm_head: Tensor, rules: Rules) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.llada_kernels_triton.lm_head_unmask(
        hidden.detach(), lm_head.detach(), *rules.greedy()
    )
    return result


BACKEND = Backend("triton", _supports, _lm_head_unmask)
