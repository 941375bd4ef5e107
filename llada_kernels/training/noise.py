"""Noise of diffusion training as a pure function of (seed, step, sample, block, view).

Nothing here holds a generator. A uniform number is the output of Philox4x32-10 for a counter made of the token's index
in its sample, the sample's global index, the step and what the number is for. So noise does not depend on how samples
are grouped into batches, on workers, on accumulation or on a resume, and two models can be shown the same noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import check_int, check_pair

__all__ = ["Noise", "check_mask_ratio", "check_views", "draw_noise", "embedding_noise", "philox", "uniform"]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_GOLDEN = 0.6180339887498949

# What a number is for: the low byte of the fourth counter word. Two purposes never share a counter.
_MASK, _LEVEL, _PERMUTATION, _EMBEDDING = range(4)


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., 2011): four 32-bit words per counter.

    Args:
        seed: the 64-bit key.
        c0, c1, c2, c3: [...], int64; the low 32 bits are the counter's words.

    Returns:
        Four tensors [...], int64 in [0, 2^32).

    Precision: exact. Determinism: bitwise, on every device.
    """
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1, c2, c3 = (c & _WORD for c in torch.broadcast_tensors(c0, c1, c2, c3))
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product; split in halves because int64 has a sign bit."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    high = high + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def uniform(seed: int, step: int, sample: Tensor, index: Tensor, purpose: int) -> Tensor:
    """Uniform numbers in (0, 1), fp64 with the 32 bits of one Philox word, at the centre of its interval."""
    step_word = torch.tensor(step, dtype=torch.int64, device=sample.device)
    purpose_word = torch.tensor(purpose, dtype=torch.int64, device=sample.device)
    word = philox(seed, index, sample, step_word, purpose_word)[0]
    return (word.double() + 0.5) * 2.0**-32


@dataclass(frozen=True)
class Noise:
    """What one draw did to a pack of L tokens, per view.

    Attributes:
        masked: [views, L], bool; never set at a position that is not supervised.
        weight: [views, L], fp32; the ELBO weight 1/t of the token's block (0 where not masked).
        level: [views, L], fp32; t of the token's block.
    """

    masked: Tensor
    weight: Tensor
    level: Tensor

    @property
    def num_masked(self) -> int:
        """Masked positions of all views."""
        return int(self.masked.sum())


def check_mask_ratio(mask_ratio: tuple[float, float], complementary: bool = False) -> None:
    """Raise ValueError unless 0 < low <= high <= 1; a complementary pair needs high < 1, as its weight is 1/(1-t)."""
    check_pair("mask_ratio", mask_ratio)
    low, high = mask_ratio
    if not 0.0 < low <= high <= 1.0:
        raise ValueError(f"mask_ratio: expected 0 < low <= high <= 1, got {mask_ratio}")
    if complementary and high >= 1.0:
        raise ValueError(f"mask_ratio: expected high < 1 for complementary views, got {mask_ratio}")


def check_views(views: int, complementary: bool = False) -> None:
    """Raise unless ``views`` is an int of at least 1; complementary views come in pairs."""
    check_int("views", views, 1)
    if complementary and views % 2:
        raise ValueError(f"views: expected an even number of complementary views, got {views}")


def draw_noise(
    samples: Tensor,
    indices: Tensor,
    block_ids: Tensor,
    supervised: Tensor,
    *,
    seed: int,
    step: int,
    mask_ratio: tuple[float, float] = (1e-3, 1.0),
    views: int = 1,
    complementary: bool = False,
    fixed_count: bool = False,
) -> Noise:
    """Choose the masked tokens of a pack.

    Levels are stratified over a sample's blocks: block b of the N of sample s has
    ``t = low + (high - low) * frac(u + 0.618034 s + pi(b)/N)``, with u of (seed, step, view) and pi a permutation of
    (seed, step, s, view). A block that comes out without masked tokens stays so: redrawing it would bias the ELBO.

    Args:
        samples: [L], int64; global index of each token's sample. Tokens of a sample are contiguous.
        indices: [L], int64; the token's index within its sample.
        block_ids: [L], int64, rising; the token's block, numbered through the whole pack.
        supervised: [L], bool; other positions are never masked.
        seed, step: with the sample's index, all that the draw depends on.
        mask_ratio: the band (low, high) of t.
        views: independent draws; with ``complementary``, view 2k+1 masks what view 2k leaves, at level 1-t.
        complementary: draw pairs; ``views`` is then even.
        fixed_count: mask exactly ``ceil(t n)`` of a block's n supervised tokens, weight n over that count. With the band
            (0, 1] it has the same expectation as the ELBO and far less variance: for evaluation.

    Returns:
        The noise on the device of the inputs.

    Precision: levels in fp64, rounded once to fp32. Determinism: bitwise, independent of batch composition.

    Raises:
        ValueError: a wrong band, ``views`` below 1, an odd number of complementary views.
    """
    check_mask_ratio(mask_ratio, complementary)
    check_views(views, complementary)
    if complementary and fixed_count:
        raise ValueError("fixed_count: expected False with complementary views, got True")
    masked, weight, level = [], [], []
    for view in range(0, views, 2 if complementary else 1):
        t = _levels(samples, block_ids, seed, step, view, mask_ratio)
        u = uniform(seed, step, samples, indices, _MASK | view << 8)
        if fixed_count:
            chosen, inverse = _choose_counts(u, t, block_ids, supervised)
        else:
            chosen, inverse = (u < t) & supervised, 1.0 / t
        masked.append(chosen)
        weight.append(torch.where(chosen, inverse, 0.0))
        level.append(t)
        if complementary:
            rest = ~(u < t) & supervised
            masked.append(rest)
            weight.append(torch.where(rest, 1.0 / (1.0 - t), 0.0))
            level.append(1.0 - t)
    return Noise(torch.stack(masked), torch.stack(weight).float(), torch.stack(level).float())


def _levels(samples: Tensor, block_ids: Tensor, seed: int, step: int, view: int, mask_ratio: tuple[float, float]) -> Tensor:
    """t of each token, fp64."""
    if samples.numel() == 0:
        return torch.zeros_like(samples, dtype=torch.float64)
    _, block_of_token, tokens = torch.unique_consecutive(block_ids, return_inverse=True, return_counts=True)
    sample = samples[tokens.cumsum(0) - tokens]
    _, row, count = torch.unique_consecutive(sample, return_inverse=True, return_counts=True)
    first = (count.cumsum(0) - count)[row]
    number = torch.arange(len(sample), device=sample.device) - first
    # The permutation is the order of random keys; a stable sort by sample over a sort by key keeps samples together.
    order = torch.argsort(uniform(seed, step, sample, number, _PERMUTATION | view << 8))
    order = order[torch.argsort(row[order], stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    zero = torch.zeros((), dtype=torch.int64, device=sample.device)
    shift = uniform(seed, step, zero, zero, _LEVEL | view << 8)
    position = (shift + _GOLDEN * sample + (rank - first) / count[row]).frac()
    low, high = mask_ratio
    return (low + (high - low) * position)[block_of_token]


def _choose_counts(u: Tensor, t: Tensor, block_ids: Tensor, supervised: Tensor) -> tuple[Tensor, Tensor]:
    """The ceil(t n) supervised tokens of each block with the smallest u, and each token's weight n / count."""
    if u.numel() == 0:
        return torch.zeros_like(supervised), torch.zeros_like(u)
    _, block, tokens = torch.unique_consecutive(block_ids, return_inverse=True, return_counts=True)
    available = torch.zeros(len(tokens), dtype=torch.float64, device=u.device)
    available.index_add_(0, block, supervised.double())
    count = torch.ceil(t * available[block])
    order = torch.argsort(torch.where(supervised, u, 2.0))
    order = order[torch.argsort(block[order], stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - (tokens.cumsum(0) - tokens)[block[order]]
    return (rank < count) & supervised, available[block] / count.clamp(min=1.0)


def embedding_noise(samples: Tensor, indices: Tensor, width: int, *, seed: int, step: int, view: int = 0) -> Tensor:
    """Standard normal numbers [N, width], fp32, for N tokens given by sample and index; Box-Muller over Philox.

    Precision: fp64 rounded once. Determinism: a pure function of the arguments, element by element.
    """
    chunks = torch.arange((width + 3) // 4, device=samples.device)
    step_word = torch.tensor(step, dtype=torch.int64, device=samples.device)
    words = philox(seed, indices[:, None], samples[:, None], step_word, _EMBEDDING | view << 8 | chunks[None] << 16)
    a, b, c, d = ((w.double() + 0.5) * 2.0**-32 for w in words)
    r, s = torch.sqrt(-2.0 * torch.log(a)), torch.sqrt(-2.0 * torch.log(c))
    angle, turn = 2.0 * math.pi * b, 2.0 * math.pi * d
    normal = torch.stack([r * angle.cos(), r * angle.sin(), s * turn.cos(), s * turn.sin()], dim=-1)
    return normal.flatten(1)[:, :width].float()
