"""Masks against direct transcriptions of the LLaDA2.0 report (Eq. 3: block diffusion, Eq. 4: full attention), golden masks, tile plans."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from llada_kernels import _tile_plan, masks
from llada_kernels.masks import DiffusionMask, block_ids

GOLDEN = Path(__file__).parent / "golden" / "train_block_diffusion"

lengths_lists = st.lists(st.sampled_from([0, 1, 2, 3, 5, 7, 8, 9, 13, 16, 17]), max_size=5)
block_sizes = st.sampled_from([1, 2, 3, 4, 8, 32])
origins = st.sampled_from(["document", "row"])


def cumulative(lengths):
    return [0, *np.cumsum(lengths, dtype=int).tolist()]


def tokens_of(lengths, block_size, origin):
    """(document, block number the equations compare) of every token; the block is floor(k / B) of the document or of the row."""
    result, row = [], 0
    for document, length in enumerate(lengths):
        for k in range(length):
            result.append((document, (k if origin == "document" else row) // block_size))
            row += 1
    return result


def equation_3(lengths, block_size, views, origin, kept=None):
    """M[i, j] for i, j in [x_t1; ..; x_tr; x_0], case by case."""
    tokens = tokens_of(lengths, block_size, origin)
    kept = tokens if kept is None else kept
    row = [(view, *t) for view in range(views) for t in tokens if t in kept] + [(-1, *t) for t in tokens]
    matrix = np.zeros((len(row), len(row)), bool)
    for i, (view_i, document_i, block_i) in enumerate(row):
        for j, (view_j, document_j, block_j) in enumerate(row):
            if document_i != document_j:
                continue
            if view_i >= 0 and view_j >= 0:  # x_t -> x_t: the same block of the same copy
                matrix[i, j] = view_i == view_j and block_i == block_j
            elif view_i >= 0:  # x_t -> x_0: strictly earlier blocks
                matrix[i, j] = block_i > block_j
            elif view_j < 0:  # x_0 -> x_0: the same block or earlier ones
                matrix[i, j] = block_i >= block_j
    return torch.from_numpy(matrix)


@settings(max_examples=60, deadline=None)
@given(lengths_lists, block_sizes, st.integers(1, 4), origins, st.data())
def test_block_diffusion_is_equation_3(lengths, block_size, views, origin, data):
    blocks = sorted(set(tokens_of(lengths, block_size, origin)))
    keep = data.draw(st.none() | st.lists(st.booleans(), min_size=len(blocks), max_size=len(blocks)))
    kept = None if keep is None else [b for b, k in zip(blocks, keep, strict=True) if k]
    mask = DiffusionMask.block_diffusion(cumulative(lengths), block_size, views, keep, origin)
    expected = equation_3(lengths, block_size, views, origin, kept)
    assert torch.equal(mask.dense(), expected)
    assert mask.visible_pairs() == int(expected.sum())

    tokens = tokens_of(lengths, block_size, origin)
    index = [i for i, t in enumerate(tokens) if kept is None or t in kept]
    within = [k for length in lengths for k in range(length)]
    assert mask.noisy_index.tolist() == index and mask.num_noisy == len(index) and mask.views == views
    assert mask.position_ids.tolist() == [within[i] for i in index] * views + within
    assert mask.num_keys == mask.num_queries == views * len(index) + len(within)
    assert block_ids(cumulative(lengths), block_size, origin).tolist() == [blocks.index(t) for t in tokens]
    check_plan(mask, 8, 16)


@settings(max_examples=40, deadline=None)
@given(lengths_lists, block_sizes, origins)
def test_one_stream_masks(lengths, block_size, origin):
    cu = cumulative(lengths)
    tokens = tokens_of(lengths, block_size, origin)
    n = len(tokens)
    document = np.array([t[0] for t in tokens], int).reshape(n)
    block = np.array([t[1] for t in tokens], int).reshape(n)
    same = document[:, None] == document[None, :]  # Eq. 4
    expected = {
        "bidirectional": (DiffusionMask.bidirectional(cu), same),
        "block_causal": (DiffusionMask.block_causal(cu, block_size, origin), same & (block[:, None] >= block[None, :])),
        "causal": (DiffusionMask.causal(cu), same & np.tri(n, dtype=bool)),
    }
    for kind, (mask, dense) in expected.items():
        assert mask.kind == kind and torch.equal(mask.dense(), torch.from_numpy(dense))
        assert mask.position_ids.tolist() == [k for length in lengths for k in range(length)]
        check_plan(mask, 4, 8)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=4), st.sampled_from([1, 3, 4]))
def test_cached(rows, block_size):
    context_lens, query_lens = [blocks * block_size for blocks, _ in rows], [n for _, n in rows]
    mask = DiffusionMask.cached(context_lens, query_lens, block_size)
    total = sum(context_lens)
    expected = torch.zeros(sum(query_lens), total + sum(query_lens), dtype=torch.bool)
    positions, query, cached_before, new_before = [], 0, 0, 0
    for cached, new in zip(context_lens, query_lens, strict=True):
        for i in range(new):
            expected[query, cached_before : cached_before + cached] = True
            for j in range(new):
                expected[query, total + new_before + j] = (cached + j) // block_size <= (cached + i) // block_size
            positions.append(cached + i)
            query += 1
        cached_before, new_before = cached_before + cached, new_before + new
    assert torch.equal(mask.dense(), expected) and mask.position_ids.tolist() == positions
    assert mask.visible_pairs() == int(expected.sum())
    assert mask.cu_query_lens.tolist() == cumulative(query_lens)
    plan = mask.tile_plan(4)
    row_of = [r for r, n in enumerate(query_lens) for _ in range(n)]
    for (begin, end, *_), row in zip(plan.tiles.tolist(), plan.rows.tolist(), strict=True):
        assert set(row_of[begin:end]) == {row}
    check_plan(mask, 4, 8)


def check_plan(mask, block_m, block_n):
    """The plan covers each query once, its hulls are exact, its transposed half lists exactly the touching pairs; C++ equals numpy."""
    plan = mask.tile_plan(block_m, block_n)
    context, own, dense = mask.context.tolist(), mask.own.tolist(), mask.mask_mod()
    queries = []
    for begin, end, *hulls, uniform in plan.tiles.tolist():
        assert 0 < end - begin <= block_m
        queries += range(begin, end)
        seen = []
        for which, intervals in enumerate((context, own)):
            some = [(b, e) for b, e in intervals[begin:end] if e > b]
            hull = [min(b for b, _ in some), max(e for _, e in some)] if some else [0, 0]
            assert hulls[2 * which : 2 * which + 2] == hull
            seen.append([(b, e) if e > b else None for b, e in intervals[begin:end]])
        assert uniform == all(len(set(s)) == 1 for s in seen)
    assert queries == list(range(mask.num_queries))
    sizes = [(t[1] - t[0]) * (t[3] - t[2] + t[5] - t[4]) for t in plan.tiles.tolist()]
    assert plan.order.tolist() == sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))

    if mask.kind != "cached":
        listed = []
        offsets = plan.key_offsets.tolist()
        for j in range(len(offsets) - 1):
            for tile_begin, tile_end, which in plan.key_runs[offsets[j] : offsets[j + 1]].tolist():
                listed += [(j, t, which) for t in range(tile_begin, tile_end)]
        touching = []
        for t, tile in enumerate(plan.tiles.tolist()):
            for which in range(2):
                begin, end = tile[2 + 2 * which : 4 + 2 * which]
                touching += [(j, t, which) for j in range(len(offsets) - 1) if max(begin, j * block_n) < min(end, (j + 1) * block_n)]
        assert sorted(listed) == sorted(touching) and len(set(listed)) == len(listed)
        assert sorted(plan.key_order.tolist()) == list(range(len(offsets) - 1))
        visible = dense(None, None, *torch.meshgrid(torch.arange(mask.num_queries), torch.arange(mask.num_keys), indexing="ij"))
        tile_of = {q: t for t, tile in enumerate(plan.tiles.tolist()) for q in range(tile[0], tile[1])}
        assert {(k // block_n, tile_of[q]) for q, k in visible.nonzero().tolist()} <= {(j, t) for j, t, _ in listed}

    if _tile_plan._host is not None:
        rows = None if mask.cu_query_lens is None else mask.cu_query_lens.numpy().astype(np.int64)
        arguments = (mask.context.numpy(), mask.own.numpy(), rows, mask.num_keys, block_m, block_n)
        host, twin = (_tile_plan.build_plan(*arguments, use_host=use) for use in (True, False))
        for name in ("tiles", "order", "rows", "key_offsets", "key_runs", "key_order"):
            ours, theirs = getattr(host, name), getattr(twin, name)
            assert ours.dtype == theirs.dtype == torch.int32 and torch.equal(ours, theirs), name


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 12), st.integers(1, 12), st.sampled_from([None, 1, 3]))
def test_from_dense(data, queries, keys, batch):
    """Rows of up to three intervals: two are represented exactly, a third makes the mask None; plans hold for arbitrary intervals."""
    size = (batch or 1) * queries
    rows = data.draw(st.lists(st.lists(st.sampled_from([0, 0, 0, 1, 1]), min_size=keys, max_size=keys), min_size=size, max_size=size))
    dense = torch.tensor(rows, dtype=torch.bool).reshape(size, keys)
    intervals = [int((np.diff([0, *row, 0]) == 1).sum()) for row in rows]
    mask = DiffusionMask.from_dense(dense if batch is None else dense.reshape(batch, queries, keys))
    if max(intervals, default=0) > 2:
        assert mask is None
        return
    expected = dense if batch is None else torch.block_diag(*dense.reshape(batch, queries, keys)).bool()
    assert torch.equal(mask.dense(), expected.reshape(size, (batch or 1) * keys))
    assert mask.position_ids.tolist() == list(range(queries)) * (batch or 1)
    check_plan(mask, 4, 4)


def test_from_dense_finds_block_diffusion():
    mask = DiffusionMask.block_diffusion([0, 10, 23], 4, 2)
    assert torch.equal(DiffusionMask.from_dense(mask.dense()).dense(), mask.dense())


def test_golden_masks():
    case = json.loads((GOLDEN / "case.json").read_text())
    stored = load_file(GOLDEN / "io.safetensors")
    for run in case["runs"]:
        origin = "row" if run["name"] == "packed_unaligned" else "document"
        expected = stored[f"{run['name']}.mask"]
        for row in range(expected.shape[0]):
            lengths = [run["L"]] if run["docs"] is None else run["docs"][row]
            mask = DiffusionMask.block_diffusion(cumulative(lengths), run["block_size"], block_origin=origin, num_tokens=run["L"])
            assert torch.equal(mask.dense(), expected[row]), run["name"]


@pytest.mark.parametrize(("n", "block"), [(32, 32), (64, 32), (96, 8), (40, 4), (7, 1)])
def test_visible_pairs_closed_form(n, block):
    assert DiffusionMask.block_diffusion([0, n, 2 * n], block).visible_pairs() == 2 * n * (n + block)


def test_plan_of_whole_blocks_is_uniform():
    """One diffusion block is one tile without element masks: what makes the kernels fast, also behind a short first block."""
    for mask in (
        DiffusionMask.block_diffusion([0, 96, 160], 32),
        DiffusionMask.block_diffusion([0, 90, 160], 32, block_origin="row"),
        DiffusionMask.bidirectional([0, 70, 75]),
        DiffusionMask.cached([64, 0], [32, 64], 32),
    ):
        assert mask.tile_plan(32).tiles[:, 6].all()
    assert len(DiffusionMask.block_diffusion([0, 96, 160], 32).tile_plan(32).tiles) == 10
    # Tiny blocks share tiles.
    assert len(DiffusionMask.causal([0, 96]).tile_plan(32).tiles) == 3
    assert len(DiffusionMask.block_diffusion([0, 96], 1).tile_plan(32).tiles) == 6


def test_size_is_linear():
    """128k tokens: no dense mask, plan and transposed plan of a few thousand entries."""
    mask = DiffusionMask.block_diffusion([0, 65536], 32)
    plan = mask.tile_plan()
    assert mask.visible_pairs() == 65536 * (65536 + 32)
    assert len(plan.tiles) == 4096 and len(plan.key_runs) < 3 * 4096


def test_mask_mod_is_flex_attentions():
    from torch.nn.attention.flex_attention import create_mask

    mask = DiffusionMask.block_diffusion([0, 5, 12], 4, noisy_blocks=[True, False, True, True])
    made = create_mask(mask.mask_mod(), None, None, mask.num_queries, mask.num_keys, device="cpu")
    assert torch.equal(made[0, 0], mask.dense())


def test_to_and_plans_are_kept():
    mask = DiffusionMask.cached([4], [3], 4)
    assert mask.to("cpu") is mask and mask.to(torch.device("cpu")) is mask
    assert mask.tile_plan() is mask.tile_plan() and mask.tile_plan(8) is mask.tile_plan(8)
    moved = DiffusionMask.block_diffusion([0, 5], 4).to("meta")
    assert moved.context.device.type == moved.noisy_index.device.type == moved.tile_plan().tiles.device.type == "meta"


@pytest.mark.parametrize("make", [
    lambda cu: DiffusionMask.block_diffusion(cu, 4, 2), lambda cu: DiffusionMask.block_causal(cu, 4), DiffusionMask.causal,
    DiffusionMask.bidirectional, lambda cu: DiffusionMask.cached(cu, torch.tensor([3, 4, 8]), 4),
])  # fmt: skip
def test_a_mask_of_lengths_on_a_device_is_planned_on_the_host(make, monkeypatch):
    """The meta device stands for a GPU: nothing can be read back from it. The lengths are read once, as they must be."""
    expected = make(torch.tensor([0, 4, 16]))
    read = masks._host_array
    monkeypatch.setattr(masks, "_host_array", lambda name, values: (read(name, values)[0], torch.device("meta")))
    mask = make(torch.tensor([0, 4, 16]))
    assert all(getattr(mask, f.name).device.type == "meta" for f in fields(mask) if isinstance(getattr(mask, f.name), torch.Tensor))
    assert mask._host is not None
    assert np.array_equal(mask._host[0], expected.context.numpy()) and np.array_equal(mask._host[1], expected.own.numpy())
    if mask.kind != "cached":
        assert mask.tile_plan(16).tiles.shape == expected.tile_plan(16).tiles.shape, "another plan, later"


def test_accepts_any_integers():
    expected = DiffusionMask.causal([0, 3, 5]).dense()
    for cu in (torch.tensor([0, 3, 5]), torch.tensor([0, 3, 5], dtype=torch.int32), np.array([0, 3, 5], np.int16), (0, 3, 5)):
        assert torch.equal(DiffusionMask.causal(cu).dense(), expected)
    assert DiffusionMask.cached([], [], 4).num_queries == 0
    assert DiffusionMask.block_diffusion([0], 4, noisy_blocks=[]).num_queries == 0


BAD = [
    (ValueError, r"cu_seqlens: expected to start at 0, got \[1\]", lambda: DiffusionMask.causal([1, 3])),
    (ValueError, r"cu_seqlens: expected to start at 0, got \[\]", lambda: DiffusionMask.causal([])),
    (ValueError, r"cu_seqlens: expected values that never fall, got 4 then 3 at index 2", lambda: DiffusionMask.bidirectional([0, 4, 3])),
    (ValueError, r"cu_seqlens: expected 1-D integers, got float32", lambda: DiffusionMask.causal(torch.tensor([0.0, 1.0]))),
    (ValueError, r"cu_seqlens: expected 1-D integers, got int64 of shape \[1, 2\]", lambda: DiffusionMask.causal([[0, 1]])),
    (ValueError, r"cu_seqlens: expected 1-D integers, got bool", lambda: DiffusionMask.causal(torch.tensor([False, True]))),
    (ValueError, r"cu_seqlens: expected a 1-D sequence, got a ragged one", lambda: DiffusionMask.causal([[0], [1, 2]])),
    (ValueError, r"cu_seqlens: expected to end at the number of tokens 9, got 8", lambda: DiffusionMask.causal([0, 8], num_tokens=9)),
    (ValueError, r"block_size: expected at least 1, got 0", lambda: DiffusionMask.block_causal([0, 8], 0)),
    (TypeError, r"block_size: expected an int, got float", lambda: DiffusionMask.block_diffusion([0, 8], 4.0)),
    (ValueError, r"views: expected at least 1, got 0", lambda: DiffusionMask.block_diffusion([0, 8], 4, views=0)),
    (ValueError, r"noisy_blocks: expected bool \[2\].* of shape \[1\]", lambda: DiffusionMask.block_diffusion([0, 8], 4, 1, [True])),
    (ValueError, r"noisy_blocks: expected bool \[2\].* got int64", lambda: DiffusionMask.block_diffusion([0, 8], 4, 1, [1, 0])),
    (ValueError, r"block_origin: expected 'document' or 'row'", lambda: DiffusionMask.block_diffusion([0, 8], 4, block_origin="doc")),
    (ValueError, r"context_lens: expected multiples of block_size 4, got 6 in row 1", lambda: DiffusionMask.cached([4, 6], [1, 1], 4)),
    (ValueError, r"context_lens: expected lengths >= 0, got -4 in row 0", lambda: DiffusionMask.cached([-4], [1], 4)),
    (ValueError, r"query_lens: expected lengths >= 0, got -1 in row 1", lambda: DiffusionMask.cached([0, 0], [1, -1], 4)),
    (ValueError, r"query_lens: expected one entry per row of context_lens \(2\), got 1", lambda: DiffusionMask.cached([0, 0], [1], 4)),
    (ValueError, r"dense: expected a bool tensor", lambda: DiffusionMask.from_dense(torch.zeros(3, 3))),
    (ValueError, r"dense: expected a bool tensor", lambda: DiffusionMask.from_dense(torch.zeros(3, dtype=torch.bool))),
    (ValueError, r"block_m: expected at least 1, got 0", lambda: DiffusionMask.causal([0, 3]).tile_plan(0)),
]


@pytest.mark.parametrize(("error", "text", "call"), BAD, ids=range(len(BAD)))
def test_errors_name_argument_expected_and_got(error, text, call):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("make", [lambda: DiffusionMask.causal([0, 5]), lambda: DiffusionMask.cached([4], [3], 2).to("cpu")])
def test_a_mask_made_in_inference_mode_can_be_trained_with(make):
    with torch.inference_mode():
        mask = make()
        other = mask.tile_plan(4)
    tensors = [getattr(part, f.name) for part in (mask, mask.tile_plan(), other) for f in fields(part)]
    assert not [t for t in tensors if isinstance(t, torch.Tensor) and t.is_inference()]


def test_lengths_that_int32_cannot_count():
    with pytest.raises(ValueError, match=r"cu_seqlens: expected fewer than 2\^31 tokens, got 4611686018427387904"):
        DiffusionMask.causal([0, 2**62])
    with pytest.raises(TypeError, match="dense: expected a torch.Tensor, got list"):
        DiffusionMask.from_dense([[True]])


def test_first_queries():
    mask = DiffusionMask.block_diffusion([0, 5, 9], 4)
    part = mask.first_queries(7)
    assert torch.equal(part.dense(), mask.dense()[:7]) and torch.equal(part.position_ids, mask.position_ids[:7])
    assert mask.first_queries(7) is part
    for wrong, count in ((mask, 19), (DiffusionMask.cached([4], [3], 2), 1)):
        with pytest.raises(ValueError, match="count: expected 0 to"):
            wrong.first_queries(count)
