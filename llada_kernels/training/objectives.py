"""Training objectives: next-token (AR), block diffusion (BDLM) and whole-document diffusion (MDLM).

Every loss is a pair (sum, count). Counts are known before the forward, so that a step of several micro-batches divides by
the count of the whole step and never takes a mean of means. The diffusion weight is w(t) = 1/t (linear schedule), and
position i of the noisy stream predicts token i: there is no shift.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..masks import DiffusionMask
from ..model import Model
from ..ops.lm_loss import lm_loss
from ._checks import check_block_size, check_choice, check_kind
from .data import Batch, document_blocks
from .noise import Noise, check_mask_ratio, check_views, draw_noise, embedding_noise
from .schedule import BlockSize

__all__ = [
    "LossTerms", "Objective", "Prepared", "ar_perplexity", "build_ar", "build_diffusion", "elbo_perplexity", "loss_terms",
    "prepare", "unigram_perplexity",
]  # fmt: skip

OBJECTIVES = ("ar", "diffusion")
_NORMS = ("elbo", "masked", "uniform")


@dataclass(frozen=True)
class Objective:
    """Which loss, and how its noise is drawn.

    Attributes:
        kind: "ar" (next token, causal) or "diffusion".
        block_size: block of the block-diffusion layout [x_t ; x_0], or "full": MDLM, x_t alone, attention over its document.
        loss_norm: "elbo": sum of CE/t over the number of supervised tokens; "masked": sum of CE over the number of masked
            tokens (the official trainer's); "uniform": sum of CE over the number of supervised tokens.
        mask_ratio: band of t; [1e-3, 1] for the ELBO, 0.3-0.8 for fine-tuning.
        views: noisy copies that share one clean copy.
        complementary: views come in pairs that mask each supervised token exactly once.

    Raises:
        TypeError, ValueError: an unknown kind or norm, a wrong band, block size or number of views; the argument is named.
    """

    kind: Literal["ar", "diffusion"] = "diffusion"
    block_size: BlockSize = 32
    loss_norm: Literal["elbo", "masked", "uniform"] = "elbo"
    mask_ratio: tuple[float, float] = (1e-3, 1.0)
    views: int = 1
    complementary: bool = False

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, OBJECTIVES)
        check_block_size("block_size", self.block_size)
        check_choice("loss_norm", self.loss_norm, _NORMS)
        check_kind("complementary", self.complementary, bool)
        check_mask_ratio(self.mask_ratio, self.complementary)
        check_views(self.views, self.complementary)


@dataclass(frozen=True)
class Prepared:
    """One micro-batch ready for a forward: T input tokens, of which the first N are predicted from.

    Attributes:
        input_ids: [T], int64.
        mask: what each of the T tokens sees.
        targets: [N], int64.
        weights: [N], fp32; 0 where there is no loss.
        count: this micro-batch's part of the step's denominator.
        noised: [N], bool; input tokens that were replaced by the mask token (none for AR).
        samples, indices, views: [N], int64; where each of the N tokens comes from, the key of its embedding noise.
    """

    input_ids: Tensor
    mask: DiffusionMask
    targets: Tensor
    weights: Tensor
    count: int
    noised: Tensor
    samples: Tensor
    indices: Tensor
    views: Tensor


@dataclass(frozen=True)
class LossTerms:
    """Sums over one micro-batch; divide by the counts of the whole step.

    Attributes:
        loss: scalar fp32, differentiable: weighted sum of cross entropies.
        confidence: scalar fp32, differentiable: sum of entropies over the correctly predicted masked tokens (0 without CAP).
        correct: number of those tokens.
    """

    loss: Tensor
    confidence: Tensor
    correct: Tensor


def prepare(batch: Batch, objective: Objective, mask_token_id: int, *, seed: int, step: int, fixed_count: bool = False) -> Prepared:
    """Noise a pack and lay it out for ``objective``. A pure function of its arguments; see :func:`noise.draw_noise`.

    Raises:
        TypeError: ``batch`` is no Batch or ``objective`` no Objective.
    """
    check_kind("batch", batch, Batch)
    check_kind("objective", objective, Objective)
    if objective.kind == "ar":
        return build_ar(batch)
    noise = draw_noise(
        batch.samples, batch.indices, document_blocks(batch.cu_seqlens, objective.block_size).to(batch.tokens.device),
        batch.supervised, seed=seed, step=step, mask_ratio=objective.mask_ratio, views=objective.views,
        complementary=objective.complementary, fixed_count=fixed_count,
    )  # fmt: skip
    return build_diffusion(batch, noise, objective.block_size, mask_token_id, objective.loss_norm)


def build_ar(batch: Batch) -> Prepared:
    """Next-token layout: the target of a token is its successor in the same document; a document's last token has none."""
    has_target = torch.ones_like(batch.supervised)
    last = batch.cu_seqlens[1:].to(torch.int64) - 1
    has_target[last[last >= 0].to(has_target.device)] = False
    weights = (has_target & batch.supervised.roll(-1)).float()
    return Prepared(
        batch.tokens, DiffusionMask.causal(batch.cu_seqlens).to(batch.tokens.device), batch.tokens.roll(-1), weights,
        int(weights.sum()), torch.zeros_like(has_target), batch.samples, batch.indices, torch.zeros_like(batch.samples),
    )  # fmt: skip


def build_diffusion(
    batch: Batch,
    noise: Noise,
    block_size: BlockSize,
    mask_token_id: int,
    loss_norm: str = "elbo",
    block_origin: Literal["document", "row"] = "document",
) -> Prepared:
    """Lay out a noised pack: [x_t1; ...; x_tr; x_0] for a block size, [x_t1; ...; x_tr] for "full".

    Blocks without a supervised token are left out of the noisy copies: nothing would read them. ``block_origin="row"`` counts
    blocks as the official trainer does, of a pack that is one row: to compare losses with it. :func:`prepare` draws its noise
    per document and has no such choice.
    """
    views, device = noise.masked.shape[0], batch.tokens.device
    index = torch.arange(batch.tokens.numel(), device=device)
    clean = batch.tokens[:0]
    if block_size == "full":
        starts = batch.cu_seqlens.to(torch.int64)
        ends = [starts[1:] + view * int(starts[-1]) for view in range(views)]
        mask = DiffusionMask.bidirectional(torch.cat([starts[:1], *ends]).to(torch.int32))
    else:
        kept = _kept_blocks(batch, block_size) if block_origin == "document" else None
        mask = DiffusionMask.block_diffusion(batch.cu_seqlens, block_size, views=views, noisy_blocks=kept, block_origin=block_origin)
        clean = batch.tokens
        if kept is not None and mask.noisy_index is not None:
            index = mask.noisy_index.to(device)
    masked = noise.masked[:, index]
    tokens = batch.tokens[index].expand(views, -1)
    weights = noise.weight[:, index] if loss_norm == "elbo" else masked.float()
    count = noise.num_masked if loss_norm == "masked" else views * int(batch.supervised.sum())
    view = torch.arange(views, device=device)[:, None].expand_as(masked)
    return Prepared(
        torch.cat([torch.where(masked, mask_token_id, tokens).flatten(), clean]), mask.to(device),
        tokens.flatten(), weights.flatten(), count, masked.flatten(),
        batch.samples[index].repeat(views), batch.indices[index].repeat(views), view.flatten(),
    )  # fmt: skip


def _kept_blocks(batch: Batch, block_size: int) -> Tensor | None:
    """Bool per block: it has a supervised token. None when all have."""
    blocks = document_blocks(batch.cu_seqlens, block_size)
    if not blocks.numel():
        return None
    kept = torch.zeros(int(blocks[-1]) + 1, dtype=torch.bool)
    kept[blocks[batch.supervised.cpu()]] = True
    return None if bool(kept.all()) else kept


def loss_terms(
    model: Model,
    prepared: Prepared,
    *,
    embedding_sigma: float = 0.0,
    seed: int = 0,
    step: int = 0,
    confidence: bool = False,
    confidence_temperature: float = 1.0,
    router_outputs: dict[int, Any] | None = None,
    every_token: bool = False,
) -> LossTerms:
    """Forward one micro-batch; logits exist only where the weight is not zero.

    Args:
        model: the model; its backbone sees the tokens through ``prepared.mask``.
        prepared: the micro-batch.
        embedding_sigma: standard deviation of the normal noise added to the embeddings of masked positions.
        seed, step: key of that noise.
        confidence: also sum the entropy (at ``confidence_temperature``) of masked tokens predicted correctly: CAP.
        router_outputs: filled by the model, layer index -> router logits and routing.
        every_token: also run the last layer for the clean copy, which no loss reads (for losses on the router's outputs).

    Precision: cross entropy and sums in fp32 or wider. Determinism: bitwise for equal arguments.
    """
    inputs: dict[str, Any] = {"input_ids": prepared.input_ids}
    if embedding_sigma > 0.0:
        inputs = {"inputs_embeds": _noisy_embeddings(model, prepared, embedding_sigma, seed, step)}
    outputs = None if every_token or len(prepared.targets) == len(prepared.input_ids) else len(prepared.targets)
    hidden = model.backbone(**inputs, mask=prepared.mask, router_outputs=router_outputs, num_outputs=outputs)
    out = lm_loss(
        hidden[: len(prepared.targets)], model.lm_head_weight, prepared.targets,
        prepared.weights.to(torch.promote_types(torch.float32, hidden.dtype)),
        entropy="correct" if confidence else None, entropy_temperature=confidence_temperature,
    )  # fmt: skip
    if out.entropy is None:
        zero = out.loss.new_zeros(())
        return LossTerms(out.loss, zero, zero)
    return LossTerms(out.loss, out.entropy.sum(), out.correct.sum())


def _noisy_embeddings(model: Model, prepared: Prepared, sigma: float, seed: int, step: int) -> Tensor:
    """Embeddings with normal noise at masked positions, one draw per view."""
    embeddings = model.embed(prepared.input_ids)
    noise = torch.zeros_like(embeddings)
    for view in range(int(prepared.views.max()) + 1 if prepared.views.numel() else 0):
        at = (prepared.noised & (prepared.views == view)).nonzero().squeeze(1)
        values = embedding_noise(prepared.samples[at], prepared.indices[at], embeddings.shape[-1], seed=seed, step=step, view=view)
        noise[at] = (sigma * values).to(noise.dtype)
    return embeddings + noise


@torch.no_grad()
def elbo_perplexity(
    model: Model, batches: Iterable[Batch], block_size: BlockSize, mask_token_id: int, *, draws: int = 2, seed: int = 0
) -> float:
    """exp of the ELBO per token at a block size: an upper bound of the perplexity.

    The weights are read as a diffusion model whatever they were trained as: attention is given by the objective, and
    position i predicts token i. The noise is fixed by ``seed``, so that two models are compared on the same masks; masked
    tokens are counted per block in place of drawn one by one, which has the same expectation and less variance.

    Args:
        draws: noise draws per batch, as views of one forward.
    """
    objective = Objective("diffusion", block_size, "elbo", (1e-9, 1.0), views=draws)
    total, count = 0.0, 0
    for batch in _batches(batches):
        prepared = prepare(batch, objective, mask_token_id, seed=seed, step=0, fixed_count=True)
        total += float(loss_terms(model, prepared).loss)
        count += prepared.count
    return _perplexity(total, count)


@torch.no_grad()
def ar_perplexity(model: Model, batches: Iterable[Batch]) -> float:
    """exp of the next-token loss under causal attention, over all tokens but the first of each document."""
    total, count = 0.0, 0
    for batch in _batches(batches):
        prepared = build_ar(batch)
        total += float(loss_terms(model, prepared).loss)
        count += prepared.count
    return _perplexity(total, count)


def _batches(batches: Iterable[Batch]) -> Iterable[Batch]:
    if isinstance(batches, Batch) or not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected a list of Batch, got {type(batches).__name__}")
    for batch in batches:
        check_kind("batches", batch, Batch)
        yield batch


def unigram_perplexity(train: Tensor, held_out: Tensor, vocab_size: int) -> float:
    """Perplexity of held-out ids under the training ids' frequencies, each count plus one: what no context at all gives.

    Args:
        train, held_out: [n], int64.
    """
    counts = torch.bincount(train, minlength=vocab_size).double() + 1.0
    return _perplexity(float(-(counts / counts.sum()).log()[held_out].sum()), held_out.numel())


def _perplexity(total: float, count: int) -> float:
    if count == 0:
        raise ValueError("batches: expected at least one supervised token, got none")
    return math.exp(min(total / count, 700.0))
