"""The paged cache by itself: what it holds after commits, frees and reuse, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llada_kernels.generation import KVCache


def make(**changes: Any) -> KVCache:
    sizes = {"num_layers": 2, "num_rows": 3, "max_tokens": 10, "block_size": 4, "num_kv_heads": 2, "head_dim": 8}
    return KVCache(**{**sizes, **changes})


def held(cache: KVCache, layer: int, row: int) -> torch.Tensor:
    pages = cache.page_table[row, : cache.context_lens[row] // cache.block_size].long()
    return cache.keys[layer][pages].flatten(0, 1)


def forward(cache: KVCache, query_lens: list[int]) -> tuple[Any, list[torch.Tensor]]:
    mask = cache.mask(query_lens)
    keys = [torch.randn(sum(query_lens), 2, 8) for _ in cache.keys]
    for layer, k in enumerate(keys):
        cache.record(layer, k, -k)
    return mask, keys


def test_commits_append_and_denoising_steps_do_not_write() -> None:
    cache = make()
    assert cache.max_pages == 3 and cache.keys[0].shape == (9, 4, 2, 8) and cache.page_table.shape == (3, 3)
    mask, first = forward(cache, [12, 4, 0])
    assert mask.context_lens.tolist() == [0, 0, 0] and mask.query_lens.tolist() == [12, 4, 0]
    assert mask.position_ids.tolist() == [*range(12), *range(4)]
    cache.commit([8, 0, 0])
    mask, second = forward(cache, [4, 8, 4])
    assert mask.context_lens.tolist() == [8, 0, 0] and mask.position_ids.tolist() == [*range(8, 12), *range(8), *range(4)]
    before = [x.clone() for x in cache.keys]
    cache.commit([0, 0, 0])
    for now, then in zip(cache.keys, before, strict=True):
        assert torch.equal(now.view(torch.int32), then.view(torch.int32)), "bitwise, unwritten memory included"
    _, third = forward(cache, [4, 8, 4])
    cache.commit([4, 4, 4])
    for layer in range(2):
        assert torch.equal(held(cache, layer, 0), torch.cat([first[layer][:8], third[layer][:4]]))
        assert torch.equal(held(cache, layer, 1), third[layer][4:8])
        assert torch.equal(held(cache, layer, 2), third[layer][12:16])
    assert cache.context_lens == [12, 4, 4]
    pages = cache.page_table[0, :3].tolist() + cache.page_table[1, :1].tolist() + cache.page_table[2, :1].tolist()
    assert len(set(pages)) == 5, "no page belongs to two rows"
    values = cache.values[1][cache.page_table[1, :1].long()].flatten(0, 1)
    assert torch.equal(values, -held(cache, 1, 1))


def test_free_and_reuse() -> None:
    cache = make(num_pages=3, max_tokens=12)
    forward(cache, [8, 0, 0])
    cache.commit([8, 0, 0])
    forward(cache, [0, 8, 0])
    with pytest.raises(RuntimeError, match="2 pages are needed and 1 are free"):
        cache.commit([0, 8, 0])
    assert cache.context_lens == [8, 0, 0] and cache.num_free_pages == 1, "a refused commit changes nothing"
    cache.free(0)
    assert cache.num_free_pages == 3 and cache.context_lens[0] == 0
    _, keys = forward(cache, [0, 12, 0])
    cache.commit([0, 12, 0])
    assert torch.equal(held(cache, 0, 1), keys[0])
    cache.free(1)
    assert cache.num_free_pages == 3 and cache.context_lens == [0, 0, 0]


def test_stores_in_its_dtype_without_graph() -> None:
    cache = make(dtype=torch.bfloat16)
    cache.mask([4, 0, 0])
    k = torch.randn(4, 2, 8, requires_grad=True)
    for layer in range(2):
        cache.record(layer, k, k)
    cache.commit([4, 0, 0])
    assert torch.equal(held(cache, 0, 0), k.detach().bfloat16()) and not cache.keys[0].requires_grad


def test_errors_name_argument_expected_and_got() -> None:
    with pytest.raises(ValueError, match="block_size: expected at least 1, got 0"):
        make(block_size=0)
    cache = make()
    with pytest.raises(ValueError, match="query_lens: expected 3 lengths, one per row, got 2"):
        cache.mask([4, 4])
    with pytest.raises(ValueError, match="at least 0"):
        cache.mask([4, -4, 4])
    with pytest.raises(RuntimeError, match="no forward has recorded"):
        cache.commit([4, 0, 0])
    cache.mask([8, 4, 0])
    with pytest.raises(ValueError, match=r"k: expected shape \(12, 2, 8\), got \(11, 2, 8\)"):
        cache.record(0, torch.zeros(11, 2, 8), torch.zeros(12, 2, 8))
    cache.record(0, torch.zeros(12, 2, 8), torch.zeros(12, 2, 8))
    with pytest.raises(RuntimeError, match="every layer"):
        cache.commit([4, 0, 0])
    cache.record(1, torch.zeros(12, 2, 8), torch.zeros(12, 2, 8))
    for lengths, message in (([3, 0, 0], "multiple of 4"), ([12, 0, 0], "up to the row's 8"), ([-4, 0, 0], "got -4")):
        with pytest.raises(ValueError, match=rf"lengths\[0\].*{message}"):
            cache.commit(lengths)
    cache.commit([8, 4, 0])
    forward(cache, [8, 0, 0])
    with pytest.raises(ValueError, match=r"at most 12 tokens in the row, got 8 \+ 8"):
        cache.commit([8, 0, 0])


def test_the_steps_of_a_block_share_one_mask() -> None:
    """Its tile plan is built once per block; other lengths and other contexts get another."""
    cache = KVCache(1, 2, 16, 4, 1, 8)
    first = cache.mask([4, 0])
    assert cache.mask([4, 0]) is first
    assert cache.mask([0, 4]).query_lens.tolist() == [0, 4]  # type: ignore[union-attr]
    again = cache.mask([4, 0])
    cache.record(0, torch.zeros(4, 1, 8), torch.zeros(4, 1, 8))
    cache.commit([4, 0])
    after = cache.mask([4, 0])
    assert after is not again and after.context_lens.tolist() == [4, 0]  # type: ignore[union-attr]
