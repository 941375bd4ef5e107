"""Noise: known answers of the generator, purity, stratification, complementary views, unbiased weights."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch

from llada_kernels.training.data import PackedDataset, collate, document_blocks
from llada_kernels.training.noise import draw_noise, embedding_noise, philox, uniform

# Known-answer vectors of Random123 (kat_vectors, philox4x32 10 rounds): counter, key, result.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def dataset(row_tokens=24, documents=40, supervised=False):
    lengths = [1 + (7 * i * i + 3 * i) % 23 for i in range(documents)]
    from llada_kernels.training.data import Document

    docs = [Document([i] * n, [j >= n // 2 for j in range(n)] if supervised else None) for i, n in enumerate(lengths)]
    return PackedDataset(docs, row_tokens)


def draw(batch, block_size=4, **options):
    blocks = document_blocks(batch.cu_seqlens, block_size)
    return draw_noise(batch.samples, batch.indices, blocks, batch.supervised, **{"seed": 5, "step": 3, **options})


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected):
    words = philox(key[0] | key[1] << 32, *(torch.tensor([c]) for c in counter))
    assert [int(w) for w in words] == expected


def test_uniform_is_uniform():
    zero = torch.zeros(100_000, dtype=torch.int64)
    u = uniform(1, 2, zero, torch.arange(100_000), 0)
    assert float(u.min()) > 0.0 and float(u.max()) < 1.0
    counts = torch.histc(u.float(), 50, 0, 1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 100  # chi-squared, 49 degrees of freedom


@pytest.mark.parametrize("block_size", [1, 4, 7, "full"])
@pytest.mark.parametrize(
    "options", [{}, {"views": 3}, {"views": 2, "complementary": True, "mask_ratio": (0.1, 0.9)}, {"fixed_count": True}]
)
def test_independent_of_batch_composition(block_size, options):
    data = dataset()
    together = draw(data.batch(2, 6), block_size, **options)
    order = [7, 3, 5, 2]
    mixed = draw(collate([(s, data.row(s)) for s in order]), block_size, **options)
    whole, parts = data.batch(2, 6), collate([(s, data.row(s)) for s in order])
    for sample in order:
        a, b = whole.samples == sample, parts.samples == sample
        alone = draw(data.batch(sample, 1), block_size, **options)
        for name in ("masked", "weight", "level"):
            assert torch.equal(getattr(together, name)[:, a], getattr(mixed, name)[:, b])
            assert torch.equal(getattr(together, name)[:, a], getattr(alone, name))


def test_changes_with_seed_step_sample_and_view():
    batch = dataset(row_tokens=64).batch(0, 1)
    base = draw(batch).masked
    assert not torch.equal(base, draw(batch, seed=6).masked)
    assert not torch.equal(base, draw(batch, step=4).masked)
    other = collate([(9, [(batch.tokens, batch.supervised)])])
    assert not torch.equal(draw(collate([(0, [(batch.tokens, batch.supervised)])])).masked, draw(other).masked)
    views = draw(batch, views=2).masked
    assert torch.equal(views[:1], base) and not torch.equal(views[0], views[1])


def test_levels_differ_between_seeds_steps_and_views_and_so_does_their_order():
    batch = dataset(row_tokens=64).batch(0, 2)
    noise = draw(batch, 4, views=2)
    others = {"view": noise.level[1], "step": draw(batch, 4, step=4).level[0], "seed": draw(batch, 4, seed=6).level[0]}
    blocks = document_blocks(batch.cu_seqlens, 4)[batch.samples == 0]
    first = torch.cat([torch.ones(1, dtype=torch.bool), blocks.diff() != 0])
    for name, level in others.items():
        # Not only shifted: the same shift everywhere would keep the order of the blocks round the circle.
        shift = (level - noise.level[0])[batch.samples == 0][first]
        assert shift.abs().max() > 1e-3, name
        assert len(torch.unique((shift % 0.999).round(decimals=4))) > 2, name


def test_one_level_per_block_and_stratified_in_the_sample():
    data = dataset(row_tokens=96, documents=60)
    batch = data.batch(0, 5)
    blocks, noise = document_blocks(batch.cu_seqlens, 4), draw(batch, 4, mask_ratio=(0.2, 0.7))
    levels = defaultdict(dict)
    for block, sample, t in zip(blocks.tolist(), batch.samples.tolist(), noise.level[0].tolist(), strict=True):
        assert levels[sample].setdefault(block, t) == t
    for per_block in levels.values():
        n = len(per_block)
        position = sorted((t - 0.2) / 0.5 for t in per_block.values())
        gaps = [b - a for a, b in zip(position, position[1:], strict=False)]
        assert n > 5 and all(abs(g - 1 / n) < 1e-5 for g in gaps)  # evenly spread: a shifted grid
        assert position != [(t - 0.2) / 0.5 for t in per_block.values()]  # in an order of its own


def test_complementary_views_cover_each_supervised_token_once():
    batch = dataset(supervised=True).batch(0, 8)
    noise = draw(batch, views=4, complementary=True, mask_ratio=(0.1, 0.9))
    for k in (0, 2):
        assert torch.equal(noise.masked[k] ^ noise.masked[k + 1], batch.supervised)
        assert not (noise.masked[k] & noise.masked[k + 1]).any()
        torch.testing.assert_close(noise.level[k] + noise.level[k + 1], torch.ones_like(noise.level[k]))
    masked = noise.masked[1]
    torch.testing.assert_close(noise.weight[1][masked], 1 / (1 - noise.level[0])[masked], rtol=1e-5, atol=0)
    assert not torch.equal(noise.masked[0], noise.masked[2])


def test_prompts_are_never_masked_and_empty_blocks_stay():
    batch = dataset(supervised=True, documents=200, row_tokens=200).batch(0, 20)
    noise = draw(batch, 4)
    assert not noise.masked[0][~batch.supervised].any() and noise.masked.any()
    assert not noise.weight[0][~noise.masked[0]].any()
    low = draw(batch, 4, mask_ratio=(1e-3, 2e-3))
    assert low.num_masked < 0.01 * int(batch.supervised.sum())  # no block was forced to have a mask


@pytest.mark.parametrize("block_size", [1, 4, "full"])
@pytest.mark.parametrize("fixed_count", [False, True])
def test_weights_are_unbiased(block_size, fixed_count):
    """The expected weight of every token is 1, so a uniform predictor scores log V."""
    data = dataset(row_tokens=48)
    batch = data.batch(0, 8)
    band = (1e-9, 1.0) if fixed_count else (1e-3, 1.0)
    total = torch.zeros(batch.tokens.numel())
    draws = 400
    for step in range(draws):
        total += draw(batch, block_size, step=step, mask_ratio=band, fixed_count=fixed_count).weight[0]
    assert abs(float(total.mean()) / draws - 1.0) < 0.05


def test_fixed_count_equals_the_elbo_in_expectation():
    """E over t of (1/t) sum over masked of f(mask) against all masks of a block of 3, f that depends on the whole mask."""
    batch = collate([(s, [(torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool))]) for s in range(4000)])
    noise = draw(batch, 3, mask_ratio=(1e-9, 1.0), fixed_count=True)
    masked = noise.masked[0].view(-1, 3).double()
    value = (noise.weight[0].view(-1, 3).double() * masked * (masked @ torch.tensor([1.0, 2.0, 4.0]).double())[:, None] ** 2).sum(1)
    exact = 0.0
    for bits in range(1, 8):
        m = [bits >> i & 1 for i in range(3)]
        size = sum(m)
        # integral of (1/t) t^size (1-t)^(3-size) dt = Beta(size, 4 - size)
        exact += math.gamma(size) * math.gamma(4 - size) / math.gamma(4) * size * sum(b * 2**i for i, b in enumerate(m)) ** 2
    assert abs(float(value.mean()) - exact) < 4 * float(value.std()) / math.sqrt(4000)


def test_embedding_noise_is_standard_normal_and_pure():
    samples, indices = torch.full((500,), 7), torch.arange(500)
    noise = embedding_noise(samples, indices, 30, seed=1, step=2)
    assert noise.shape == (500, 30) and abs(float(noise.mean())) < 0.03 and abs(float(noise.std()) - 1) < 0.03
    assert abs(float(noise[:, 0].dot(noise[:, 1])) / 500) < 0.2
    assert torch.equal(noise[40:50], embedding_noise(samples[40:50], indices[40:50], 30, seed=1, step=2))
    assert not torch.equal(noise, embedding_noise(samples, indices, 30, seed=1, step=2, view=1))
    assert not torch.equal(noise, embedding_noise(samples, indices, 30, seed=1, step=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": (0.0, 1.0)}, "mask_ratio: expected 0 < low <= high <= 1"),
        ({"mask_ratio": (0.5, 0.4)}, "mask_ratio"),
        ({"views": 2, "complementary": True}, "high < 1"),
        ({"views": 3, "complementary": True, "mask_ratio": (0.1, 0.9)}, "views: expected an even number"),
        ({"views": 0}, "views: expected at least 1, got 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        draw(dataset().batch(0, 1), **options)
