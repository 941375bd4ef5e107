"""Triton kernels: sums over splits of the vocabulary forward; gradients of the logits of 4096 ids at a time backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _triton
from .._triton import define, define_autograd, triton_reason
from ..dispatch import Backend
from .operator import ENTROPY_OF, derivative, gradients, results, setup_context

#: Ids that one program of the forward takes, and of which gradients exist at once: [N, 4096] is twice the size of hidden.
_IDS = 4096


def _supports(hidden: Tensor, lm_head: Tensor, targets: Tensor, weights: Tensor, *_: object) -> str | None:
    if weights.requires_grad:
        return "triton does not differentiate weights, which require a gradient"
    return triton_reason(hidden, lm_head, targets, weights)


def _tile(hidden: Tensor, reduced: bool) -> dict[str, int]:
    """Tile of a product, 96 KiB of shared memory at most. Before 9.0 a forward's sums (``reduced``) leave no registers for 128 columns."""
    if hidden.dtype == torch.float32:  # no tensor cores: exact products only
        return {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 2}
    columns = 64 if reduced and _triton.capability(hidden.device) < 90 else 128
    return {"BM": 128, "BN": columns, "BK": 64, "num_warps": 8, "num_stages": 3}


def _index(weights: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [N]: the tokens of non-zero weight in order, then the others; and how many the former are [1]. No synchronisation."""
    skipped = weights == 0
    index = skipped.to(torch.uint8).sort(stable=True).indices.to(torch.int32)
    return index, (~skipped).sum(dtype=torch.int32).view(1)


def _forward(
    hidden: Tensor, lm_head: Tensor, targets: Tensor, weights: Tensor, entropy_of: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from . import triton_kernels

    hidden, lm_head, targets = hidden.contiguous(), lm_head.contiguous(), targets.contiguous()
    loss, losses, entropy, correct, statistics = results(hidden, lm_head, targets, weights, entropy_of, temperature)
    for x in (losses, entropy, correct, statistics):  # of skipped tokens they stay so
        x.zero_()
    (tokens, width), vocab = hidden.shape, lm_head.shape[0]
    if tokens:
        index, count = _index(weights)
        splits, tile = -(-vocab // _IDS), _tile(hidden, True)
        parts = losses.new_empty(6 if entropy_of else 4, splits, tokens)
        grid = (-(-tokens // tile["BM"]) * splits,)
        triton_kernels.loss_parts_kernel[grid](
            hidden, lm_head, targets, index, count, parts, tokens, 1 / temperature,
            VOCAB=vocab, WIDTH=width, SPLIT=_IDS, ENTROPY=bool(entropy_of), **tile,
        )  # fmt: skip
        triton_kernels.loss_kernel[(-(-tokens // 32),)](
            parts, targets, index, count, losses, entropy, correct, statistics, tokens, 1 / temperature,
            SPLITS=splits, ENTROPY=bool(entropy_of), ONLY_CORRECT=entropy_of == 2, BM=32, num_warps=1,
        )  # fmt: skip
    return (weights * losses).sum(), losses, entropy, correct, statistics


def _backward(
    grad_loss: Tensor, grad_losses: Tensor, grad_entropy: Tensor, hidden: Tensor, lm_head: Tensor, targets: Tensor, weights: Tensor,
    correct: Tensor, statistics: Tensor, entropy_of: int, temperature: float, need_hidden: bool, need_lm_head: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from . import triton_kernels

    hidden, lm_head, targets = hidden.contiguous(), lm_head.contiguous(), targets.contiguous()
    (tokens, width), vocab = hidden.shape, lm_head.shape[0]
    grad_hidden = hidden.new_zeros((tokens if need_hidden else 0, width), dtype=torch.float32)
    grad_lm_head = hidden.new_empty((vocab if need_lm_head else 0, width))
    if not hidden.numel():
        return grad_hidden.to(hidden.dtype), grad_lm_head.zero_()
    index, count = _index(weights)
    grad = grad_loss * weights + grad_losses
    if entropy_of == 2:
        grad_entropy = grad_entropy * correct
    grad_entropy = grad_entropy.contiguous()
    tile = _tile(hidden, False)
    chunk = min(_IDS, -(-vocab // 64) * 64)
    of_logits = hidden.new_empty(tokens, chunk)
    sizes = {"WIDTH": width, "CHUNK": chunk, **tile}
    row_tiles, columns_tiles, width_tiles = (-(-n // tile[side]) for n, side in ((tokens, "BM"), (chunk, "BN"), (width, "BN")))
    for first in range(0, vocab, chunk):
        own = lm_head[first : first + chunk]
        columns = own.shape[0]
        triton_kernels.logit_gradients_kernel[(row_tiles * columns_tiles,)](
            hidden, own, targets, index, count, statistics, grad, grad_entropy, of_logits, first, columns, 1 / temperature,
            ENTROPY=bool(entropy_of), **sizes,
        )  # fmt: skip
        if need_hidden:
            triton_kernels.hidden_gradient_kernel[(row_tiles * width_tiles,)](of_logits, own, index, count, grad_hidden, columns, **sizes)
        if need_lm_head:
            triton_kernels.head_gradient_kernel[(-(-columns // tile["BM"]) * width_tiles,)](
                of_logits, hidden, index, count, grad_lm_head[first : first + chunk], columns, **sizes
            )
    return grad_hidden.to(hidden.dtype), grad_lm_head


def _autograd(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return derivative(torch.ops.llada_kernels_triton.lm_loss_backward, ctx, *grads[:3])


define(
    "lm_loss(Tensor hidden, Tensor lm_head, Tensor targets, Tensor weights, int entropy_of, float temperature) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward, results,
)  # fmt: skip
define(
    "lm_loss_backward(Tensor grad_loss, Tensor grad_losses, Tensor grad_entropy, Tensor hidden, Tensor lm_head, Tensor targets, "
    "Tensor weights, Tensor correct, Tensor statistics, int entropy_of, float temperature, bool need_hidden, bool need_lm_head) "
    "-> (Tensor, Tensor)",
    _backward, gradients,
)  # fmt: skip
define_autograd("lm_loss", _autograd, setup_context)


def _lm_loss(
    hidden: Tensor, lm_head: Tensor, targets: Tensor, weights: Tensor, entropy: str | None, entropy_temperature: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    arguments = hidden, lm_head, targets, weights, ENTROPY_OF[entropy], entropy_temperature
    loss, losses, entropies, correct, _ = torch.ops.llada_kernels_triton.lm_loss(*arguments)
    return loss, losses, None if entropy is None else entropies, correct


BACKEND = Backend("triton", _supports, _lm_loss)
