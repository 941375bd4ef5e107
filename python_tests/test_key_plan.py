"""The key plan against the dense mask: every visible pair lies in exactly one stretch, and full stretches hold nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_kernels.masks import DiffusionMask


def check(mask, block_n):
    plan, dense = mask.key_plan(block_n), mask.dense().numpy()
    seen = np.zeros(dense.shape, int)
    for tile, (first, middle, last) in enumerate(plan.offsets.tolist()):
        begin, end = tile * block_n, min((tile + 1) * block_n, mask.num_keys)
        key = np.arange(begin, end)
        for i in range(first, last):
            q_begin, q_end, which = plan.stretches[i].tolist()
            interval = (mask.own if which else mask.context).numpy()[q_begin:q_end]
            visible = (key >= interval[:, :1]) & (key < interval[:, 1:])
            assert i >= middle or (visible.all() and end - begin == block_n)
            seen[q_begin:q_end, begin:end] += visible
    assert (seen == dense).all()
    assert sorted(plan.order.tolist()) == list(range(-(-mask.num_keys // block_n)))
    queries = [sum(int(b - a) for a, b, _ in plan.stretches[first:last]) for first, _, last in plan.offsets.tolist()]
    assert [queries[i] for i in plan.order.tolist()] == sorted(queries, reverse=True)


MASKS = [
    lambda: DiffusionMask.block_diffusion([0, 7, 7, 20, 90], 4),
    lambda: DiffusionMask.block_diffusion([0, 300, 500], 32, views=2),
    lambda: DiffusionMask.block_diffusion([0, 300, 500], 100, block_origin="row"),
    lambda: DiffusionMask.block_diffusion([0, 40, 100], 32, noisy_blocks=[False, True, True, False]),
    lambda: DiffusionMask.causal([0, 300, 500]),
    lambda: DiffusionMask.bidirectional([0, 1, 300, 500]),
    lambda: DiffusionMask.causal([0, 0]),
    lambda: DiffusionMask.block_diffusion([0, 300], 32).first_queries(300),
    lambda: DiffusionMask.from_dense(torch.zeros(40, 90, dtype=torch.bool)),
]


@pytest.mark.parametrize("block_n", [16, 64, 128])
@pytest.mark.parametrize("make", MASKS)
def test_covers_every_visible_pair_once(make, block_n):
    check(make(), block_n)


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 90), st.sampled_from([8, 32]))
@settings(max_examples=30, deadline=None)
def test_any_intervals(seed, queries, keys, block_n):
    edges = np.sort(np.random.default_rng(seed).integers(0, keys + 1, (queries, 4)))
    key = np.arange(keys)
    dense = ((key >= edges[:, :1]) & (key < edges[:, 1:2])) | ((key >= edges[:, 2:3]) & (key < edges[:, 3:]))
    check(DiffusionMask.from_dense(torch.from_numpy(dense)), block_n)


def test_most_tiles_need_no_mask():
    """One document: all but the stretches beside the diagonal are full."""
    plan = DiffusionMask.block_diffusion([0, 4096], 32).key_plan()
    counts = np.diff(plan.offsets.numpy(), axis=1).sum(0)
    lengths = (plan.stretches[:, 1] - plan.stretches[:, 0]).numpy()
    full = np.concatenate([np.arange(a, b) for a, b, _ in plan.offsets.tolist()])
    assert counts.sum() < 4 * len(plan.order) and lengths[full].sum() > 0.9 * lengths.sum()


def test_is_built_once_and_moves_with_the_mask():
    mask = DiffusionMask.causal([0, 300])
    assert mask.key_plan() is mask.key_plan()
    assert mask.to("meta").key_plan().offsets.device.type == "meta"
    with pytest.raises(ValueError, match="block_n: expected at least 1, got 0"):
        mask.key_plan(0)
    with pytest.raises(ValueError, match="mask: expected a mask without a cache"):
        DiffusionMask.cached([8], [8], 8).key_plan()


def test_plans_of_a_moved_mask_read_nothing_back():
    """What is asked for later is planned from the host's copy: the device has no data here."""
    mask = DiffusionMask.block_diffusion([0, 33, 70], 32)
    moved = mask.to("meta")
    part = moved.first_queries(70)
    for there, here in ((moved, mask), (part, mask.first_queries(70))):
        assert there.device.type == "meta"
        assert there.tile_plan(16).tiles.shape == here.tile_plan(16).tiles.shape
        assert there.key_plan(16).stretches.shape == here.key_plan(16).stretches.shape
