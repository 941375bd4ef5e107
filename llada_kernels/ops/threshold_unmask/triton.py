"""Triton kernels at temperature 0: one pass over the logits by warps that take a few parts each, then one program per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._triton import define, triton_reason
from ..dispatch import Backend
from .arguments import Rules

#: Ids of a part: see reference.py.
PART = 1024
#: Positions and parts that the second kernel combines at once. Without a limit ptxas takes 64 registers on 8.0 and spills.
_RULES = {"BL": 32, "BP": 32, "num_warps": 8, "maxnreg": 255, "enable_fp_fusion": False}


def supports_rules(x: Tensor, rules: Rules) -> str | None:
    """Why the Triton backends of threshold_unmask and lm_head_unmask cannot serve the call, or None."""
    if rules.temperature is not None:
        return "triton draws no tokens, which takes top_k and top_p of whole rows: temperature must be the number 0"
    return triton_reason(x, rules.tokens)


def apply_rules(
    largest: Tensor,
    total: Tensor,
    best: Tensor,
    ids: Tensor | None,
    logits: Tensor | None,
    vocab: int,
    tokens: Tensor,
    mask_token_id: int,
    threshold: Tensor,
    editing_threshold: Tensor | None,
    min_unmask: Tensor,
    editable: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics [R * L, parts] to the fields of Unmasked; the chosen ids come from ``ids`` [R * L, parts] or the logits."""
    from . import triton_kernels

    out, confidence, counts = rules_fake(tokens)
    if not tokens.numel():
        return out, confidence, counts.zero_()
    rows, length = tokens.shape
    triton_kernels.rules_kernel[(rows,)](
        largest, total, best, ids, logits, tokens.contiguous(), threshold.contiguous(),
        None if editing_threshold is None else editing_threshold.contiguous(), min_unmask.contiguous(),
        None if editable is None else editable.contiguous(), out, confidence, counts, length, mask_token_id,
        VOCAB=vocab, SNAP=1.5 * 2.0 ** max(2, vocab.bit_length()), **_RULES,
    )  # fmt: skip
    return out, confidence, counts


def rules_fake(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty fields of Unmasked."""
    rows, length = tokens.shape
    return (
        tokens.new_empty((rows, length)),
        tokens.new_empty((rows, length), dtype=torch.float32),
        tokens.new_empty((rows, 2), dtype=torch.int32),
    )


def statistics(x: Tensor, positions: int, vocab: int, count: int) -> list[Tensor]:
    """``count`` empty fp32 tensors [positions, parts]."""
    return [x.new_empty((positions, -(-vocab // PART)), dtype=torch.float32) for _ in range(count)]


def _launch(logits: Tensor, tokens: Tensor, mask_token_id: int, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    from . import triton_kernels

    logits = logits.contiguous()
    vocab, positions = logits.shape[2], tokens.numel()
    largest, total, best = statistics(logits, positions, vocab, 3)
    if positions:
        # A warp takes 8 KiB of logits: all its loads are in flight before the first is used, and its sums need no other warp.
        parts = 8 // logits.element_size()
        grid = (positions * -(-largest.shape[1] // parts),)
        triton_kernels.parts_kernel[grid](
            logits, largest, total, best, mask_token_id, VOCAB=vocab, P=parts, num_warps=1, enable_fp_fusion=False
        )
    return apply_rules(largest, total, best, None, logits, vocab, tokens, mask_token_id, *others)


define(
    "threshold_unmask(Tensor logits, Tensor tokens, int mask_token_id, Tensor threshold, Tensor? editing_threshold, Tensor min_unmask, "
    "Tensor? editable) -> (Tensor, Tensor, Tensor)",
    _launch, lambda logits, tokens, *_: rules_fake(tokens),
)  # fmt: skip


def _threshold_unmask(logits: Tensor, rules: Rules) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.llada_kernels_triton.threshold_unmask(logits.detach(), *rules.greedy())
    return result


BACKEND = Backend("triton", supports_rules, _threshold_unmask)
