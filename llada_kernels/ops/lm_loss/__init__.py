"""Cross entropy (and entropy) of the LM head's distribution without the [N, V] logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._common import check_same, check_shape, check_tensor, compute_dtype
from ..dispatch import run
from . import native, reference, triton

__all__ = ["LMLoss", "lm_loss"]


class LMLoss(NamedTuple):
    """What :func:`lm_loss` returns; fp32 stands for max(fp32, dtype of hidden).

    Attributes:
        loss: [] fp32: sum of weights * token_losses.
        token_losses: [N] fp32: cross entropy of each token, 0 where the weight is 0.
        entropy: [N] fp32, 0 where not selected; None if it was not asked for.
        correct: [N] bool: the most probable token (lowest id among equals) is the target; False
            where the weight is 0. Not differentiated.
    """

    loss: Tensor
    token_losses: Tensor
    entropy: Tensor | None
    correct: Tensor


def lm_loss(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    weights: Tensor,
    entropy: str | None = None,
    entropy_temperature: float = 1.0,
    *,
    backend: str | None = None,
) -> LMLoss:
    """Weighted cross entropy of ``hidden @ lm_head.T`` against targets, in chunks.

    ``loss``, ``token_losses`` and ``entropy`` may be used together and are differentiable in
    ``hidden`` and ``lm_head``. A position of weight 0 is skipped entirely: its target may be
    anything (-100), its hidden state too, and it costs nothing.

    Args:
        hidden: [N, H] fp32 or bf16 (reference: any floating dtype): final hidden states.
        lm_head: [V, H] dtype of hidden.
        targets: [N] int64: ids in [0, V) where the weight is not 0.
        weights: [N] fp32 (fp64 if hidden is).
        entropy: None; "all": entropy of softmax(logits / entropy_temperature) at every position
            of non-zero weight; "correct": of those whose most probable token is the target (CAP).
        entropy_temperature: above 0.
        backend: use this backend or raise; by default the first that supports the call.

    Precision: logits, probabilities and sums in fp32 (fp64 for fp64 inputs), gradients
        accumulated in fp32 and rounded once. Logits are not rounded to bf16; native and triton
        round the gradients of bf16 logits to bf16, as autograd does, before they multiply them.
    Determinism: native: bitwise, on any number of threads; triton: bitwise; reference: that of
        torch.matmul.

    Returns:
        An LMLoss (loss, token_losses, entropy, correct).

    Raises:
        ValueError: a shape, dtype or device differs from the above, a target of non-zero weight
            is outside [0, V) (checked on a CPU), or an option is unknown.
    """
    check_tensor("hidden", hidden, 2)
    check_tensor("lm_head", lm_head, 2)
    check_shape("lm_head", lm_head, None, hidden.shape[1])
    check_same("lm_head", lm_head, "hidden", hidden)
    if not hidden.is_floating_point():
        raise ValueError(f"hidden: expected a floating dtype, got {hidden.dtype}")
    if lm_head.shape[0] == 0:
        raise ValueError("lm_head: expected at least one row, got 0")
    check_tensor("targets", targets, 1, (torch.int64,))
    check_shape("targets", targets, hidden.shape[0])
    check_same("targets", targets, "hidden", hidden, dtype=False)
    check_tensor("weights", weights, 1, (compute_dtype(hidden),))
    check_shape("weights", weights, hidden.shape[0])
    check_same("weights", weights, "hidden", hidden, dtype=False)
    if entropy not in (None, "all", "correct"):
        raise ValueError(f"entropy: expected None, 'all' or 'correct', got {entropy!r}")
    if not (entropy_temperature > 0 and math.isfinite(entropy_temperature)):
        raise ValueError(f"entropy_temperature: expected a finite number above 0, got {entropy_temperature}")
    arguments = (hidden, lm_head, targets, weights, entropy, float(entropy_temperature))
    return LMLoss(*run("lm_loss", BACKENDS, backend, *arguments))


BACKENDS = (native.BACKEND, triton.BACKEND, reference.BACKEND)
