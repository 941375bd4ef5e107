"""Reference of lm_loss: plain PyTorch, one chunk of tokens at a time, recomputed in the backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._common import compute_dtype
from ..dispatch import Backend

#: Logits alive at once: 2**24 fp32 numbers are 64 MiB.
_CHUNK_ELEMENTS = 1 << 24


def _chunk_terms(hidden: Tensor, lm_head: Tensor, targets: Tensor, temperature: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy, entropy (of all) and correctness of one chunk."""
    logits = hidden @ lm_head.T
    picked = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    losses = logits.logsumexp(1) - picked
    if temperature is None:
        entropy = torch.zeros_like(losses)
    else:
        log_p = torch.log_softmax(logits / temperature, dim=1)
        entropy = -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(1)  # 0 * -inf is no number
    return losses, entropy, logits.detach().argmax(1) == targets


def _terms(hidden: Tensor, lm_head: Tensor, targets: Tensor, temperature: float | None) -> tuple[Tensor, Tensor, Tensor]:
    rows = max(1, _CHUNK_ELEMENTS // lm_head.shape[0])
    parts = [
        checkpoint(
            _chunk_terms, hidden[i : i + rows], lm_head, targets[i : i + rows], temperature,
            use_reentrant=False, preserve_rng_state=False,
        )
        for i in range(0, max(1, hidden.shape[0]), rows)
    ]  # fmt: skip
    losses, entropies, corrects = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(entropies), torch.cat(corrects)


def lm_loss_reference(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    weights: Tensor,
    entropy: str | None,
    entropy_temperature: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The fields of LMLoss."""
    dtype = compute_dtype(hidden)
    kept = weights != 0
    compiling = torch.compiler.is_compiling()
    if not compiling and hidden.device.type == "cpu":
        check_targets(targets, kept, lm_head.shape[0])
    temperature = entropy_temperature if entropy is not None else None
    if compiling:
        # A number of rows that depends on data cannot be traced: skipped rows become zeros instead.
        rows = torch.where(kept.unsqueeze(1), hidden, torch.zeros_like(hidden))
        ids = torch.where(kept, targets, torch.zeros_like(targets))
        losses, entropies, correct = _terms(rows.to(dtype), lm_head.to(dtype), ids, temperature)
        losses = torch.where(kept, losses, torch.zeros_like(losses))
        entropies = torch.where(kept, entropies, torch.zeros_like(losses))
        correct = correct & kept
    else:
        index = kept.nonzero().squeeze(1)
        parts = _terms(hidden[index].to(dtype), lm_head.to(dtype), targets[index], temperature)
        losses, entropies, correct = (part.new_zeros(kept.shape).index_copy(0, index, part) for part in parts)
    if entropy == "correct":
        entropies = torch.where(correct, entropies, torch.zeros_like(entropies))
    loss = (weights * losses).sum()
    return loss, losses, entropies if entropy is not None else None, correct


def check_targets(targets: Tensor, kept: Tensor, vocab: int) -> None:
    """Raise if a target of non-zero weight is no id of the vocabulary (reads the tensors)."""
    wrong = (kept & ((targets < 0) | (targets >= vocab))).nonzero()
    if wrong.numel():
        i = int(wrong[0])
        raise ValueError(f"targets: expected ids in [0, {vocab}) where the weight is not 0, got {int(targets[i])} at position {i}")


BACKEND = Backend("reference", lambda *_: None, lm_loss_reference)
