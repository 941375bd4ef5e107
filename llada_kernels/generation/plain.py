"""The decoding loops without cache, batch or rule objects: one prompt, the whole prefix in every forward.

Direct transcriptions of the official loops, kept as the oracle of the engine and for reading. Where the official code
has a fault (see docs/compatibility.md) they do the sane thing: the mask token is never chosen, EOS ids in the prompt do
not count. Each returns the new tokens through the first EOS, int64 [n], and the number of forwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..masks import DiffusionMask
from ..ops.threshold_unmask import threshold_unmask
from ..ops.threshold_unmask.reference import philox_uniform
from .engine import GenerationModel

__all__ = ["GREEDY", "Sampling", "llada20", "llada21", "llada_moe"]


class Sampling(NamedTuple):
    """How tokens are drawn; at temperature 0 the rest does not matter."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


GREEDY = Sampling()


@torch.no_grad()
def llada20(
    model: GenerationModel,
    prompt: Tensor,
    *,
    mask_id: int,
    eos_id: int,
    gen_length: int = 2048,
    block_length: int = 32,
    steps: int = 32,
    threshold: float = 0.95,
    eos_early_stop: bool = False,
    minimal_topk: int = 1,
    sampling: Sampling = GREEDY,
) -> tuple[Tensor, int]:
    """LLaDA2.0, greedy or sampled."""
    start, forwards = len(prompt), 0
    steps = min(steps, gen_length // minimal_topk)
    schedule = [block_length // steps + (s < block_length % steps) for s in range(steps)]
    x = _window(prompt, gen_length, block_length, mask_id)
    for end in range((start // block_length + 1) * block_length, len(x) + 1, block_length):
        block = x[end - block_length : end]  # a view: writes go to x
        for n in schedule:
            masked = block == mask_id
            if not masked.any():
                break
            token, p = _choose(model, x, end, block_length, mask_id, sampling, forwards)
            forwards += 1
            confidence = p.masked_fill(~masked, -torch.inf)
            take = confidence > threshold
            if take.sum() < n:
                take = _top(confidence, min(n, int(masked.sum())))
            block[take] = token[take]
            if eos_early_stop and (token[take] == eos_id).any():
                first = start + int((x[start:end] == eos_id).nonzero()[0])
                if not (x[start:first] == mask_id).any():
                    return x[start : start + gen_length][: first - start + 1], forwards
        if (x[start:end] == eos_id).any():
            break
    return _cut(x[start : start + gen_length], eos_id), forwards


@torch.no_grad()
def llada21(
    model: GenerationModel,
    prompt: Tensor,
    *,
    mask_id: int,
    eos_id: int,
    gen_length: int = 2048,
    block_length: int = 32,
    threshold: float = 0.95,
    editing_threshold: float | None = 0.9,
    max_post_steps: int = 16,
    num_to_transfer: int = 1,
    eos_early_stop: bool = False,
    sampling: Sampling = GREEDY,
) -> tuple[Tensor, int]:
    """LLaDA2.1 with token editing; without eos_early_stop it denoises all blocks, whatever is then cut off."""
    start, forwards = len(prompt), 0
    x = _window(prompt, gen_length, block_length, mask_id)
    is_prompt = torch.arange(len(x), device=x.device) < start
    for end in range((start // block_length + 1) * block_length, len(x) + 1, block_length):
        block, post = x[end - block_length : end], 0
        while True:
            old = block.clone()
            masked = old == mask_id
            if not masked.any():
                post += 1
                if post > max_post_steps:
                    break
            token, p = _choose(model, x, end, block_length, mask_id, sampling, forwards)
            forwards += 1
            take = masked & (p > threshold)
            if take.sum() < num_to_transfer:
                take = _top(p.masked_fill(~masked, -torch.inf), min(num_to_transfer, int(masked.sum())))
            edit = torch.zeros_like(take)
            if editing_threshold is not None:
                edit = ~masked & ~is_prompt[end - block_length : end] & (p > editing_threshold) & (token != old)
            block[take | edit] = token[take | edit]
            if not masked.any() and not edit.any():
                break
        if eos_early_stop and (x[start:end] == eos_id).any():
            break
    return _cut(x[start : start + gen_length], eos_id), forwards


@torch.no_grad()
def llada_moe(
    model: GenerationModel,
    prompt: Tensor,
    *,
    mask_id: int,
    eos_id: int,
    gen_length: int = 128,
    block_length: int = 128,
    steps: int = 128,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    sampling: Sampling = GREEDY,
) -> tuple[Tensor, int]:
    """LLaDA and LLaDA-MoE: every forward sees the whole window; all blocks are denoised, whatever is then cut off."""
    start, forwards, num_blocks = len(prompt), 0, gen_length // block_length
    steps //= num_blocks
    x = torch.cat([prompt, prompt.new_full((gen_length,), mask_id)])
    position = torch.arange(len(x), device=x.device)
    for end in range(start + block_length, len(x) + 1, block_length):
        for s in range(min(steps, block_length)):  # further steps would be forwards without effect
            logits = _whole_window(model, x)
            if cfg_scale > 0:
                unconditional = x.clone()
                unconditional[:start] = mask_id
                u = _whole_window(model, unconditional)
                logits = u + (cfg_scale + 1) * (logits - u)
            token, _ = _draw(logits, position, mask_id, sampling, forwards)
            p = logits.softmax(-1).gather(1, token[:, None])[:, 0]
            if remasking == "random":
                p = philox_uniform(torch.full_like(x, sampling.seed), position, torch.full_like(x, ~forwards))
            forwards += 1
            confidence = torch.where((x == mask_id) & (position < end), p, -torch.inf)
            take = _top(confidence, block_length // steps + (s < block_length % steps))
            x[take] = token[take]
    return _cut(x[start:], eos_id), forwards


def _window(prompt: Tensor, gen_length: int, block_length: int, mask_id: int) -> Tensor:
    blocks = -(-(len(prompt) + gen_length) // block_length)
    return torch.cat([prompt, prompt.new_full((blocks * block_length - len(prompt),), mask_id)])


def _choose(
    model: GenerationModel, x: Tensor, end: int, block_length: int, mask_id: int, sampling: Sampling, forward: int
) -> tuple[Tensor, Tensor]:
    """A forward over x[:end] under the block-causal mask: token and confidence of each position of the last block."""
    mask = DiffusionMask.block_causal([0, end], block_length).to(x.device)
    position = torch.arange(end - block_length, end, device=x.device)
    logits = model.forward(x[:end], mask=mask, cache=None, logits_to_keep=position).logits
    return _draw(logits, position, mask_id, sampling, forward)


def _whole_window(model: GenerationModel, x: Tensor) -> Tensor:
    mask = DiffusionMask.bidirectional([0, len(x)]).to(x.device)
    logits: Tensor = model.forward(x, mask=mask, cache=None, logits_to_keep=torch.arange(len(x), device=x.device)).logits
    return logits


def _draw(logits: Tensor, position: Tensor, mask_id: int, sampling: Sampling, forward: int) -> tuple[Tensor, Tensor]:
    """Greedy, or what the sampler draws for a block of masks all of which are to be unmasked."""
    if sampling.temperature == 0.0:
        token = logits.index_fill(-1, torch.tensor([mask_id], device=logits.device), -torch.inf).argmax(-1)
        return token, logits.softmax(-1).gather(-1, token[:, None])[:, 0]
    masks, settings = torch.full_like(position, mask_id)[None], sampling._asdict()
    drawn = threshold_unmask(
        logits[None], masks, mask_id, 1.0, min_unmask=len(position), positions=position[None], forward_index=forward,
        backend="reference", **settings,
    )  # fmt: skip
    return drawn.tokens[0], drawn.confidence[0]


def _top(confidence: Tensor, n: int) -> Tensor:
    """bool: the n largest, lowest positions first among equals."""
    take = torch.zeros_like(confidence, dtype=torch.bool)
    take[confidence.argsort(descending=True, stable=True)[:n]] = True
    return take


def _cut(tokens: Tensor, eos_id: int) -> Tensor:
    found = (tokens == eos_id).nonzero()
    return tokens[: int(found[0]) + 1] if len(found) else tokens
