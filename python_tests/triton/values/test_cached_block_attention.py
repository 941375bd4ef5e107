from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_kernels.ops import _triton
from llada_kernels.ops.cached_block_attention import cached_block_attention
from llada_kernels.testing import assert_as_exact_as

from ...ops.test_cached_block_attention import ROWS, Case, check_overflowing_scores, exact, sdpa


def make(device, *arguments, dim=64, **options):
    case = Case(*arguments, dim=dim, **options)
    case.page_table[case.page_table == 10**6] = 2**31 - 1  # no such page, wherever the cache lies
    for name, value in vars(case).items():
        if hasattr(value, "to"):
            setattr(case, name, value.to(device))
    case.context = [tuple(x.to(device) for x in pair) for pair in case.context]
    return case


def check(case):
    reference = [case.by_rows(f, dtype) for f, dtype in ((sdpa, case.q.dtype), (exact, torch.float64))]
    assert_as_exact_as(case.run("triton"), *reference, name="out")


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 1, 64), (3, 1, 128), (2, 2, 64)])
@pytest.mark.parametrize("rows", ROWS)
def test_values(rows, heads, kv_heads, dim, dtype, device):
    check(make(device, *ROWS[rows], heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype))


@pytest.mark.parametrize("page_size", [1, 7, 16, 64, 256])
def test_page_size_is_free(page_size, device):
    check(make(device, [80, 0, 144], [16, 16, 20], 16, page_size=page_size))


@pytest.mark.parametrize("length", [256, 264, 1040, 9000])
def test_chunks_by_one_program_or_by_many(length, dtype, device):
    """Whether the GPU is full decides who walks the chunks of a context, and changes no bit of the result."""
    case = make(device, [length, 40], [8, 40], 8, heads=2, kv_heads=1, dtype=dtype)
    case.k *= 4  # scores of new keys large or small beside those of the context: the chunks' maxima differ
    check(case)
    together = []
    for sms in (1, 10**6):
        with mock.patch.object(_triton, "num_sms", lambda device, sms=sms: sms):
            together.append(case.run("triton"))
            assert torch.equal(case.run("triton"), together[-1])
    assert torch.equal(*together)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0, 1, 2, 7, 8, 9, 31, 33])), max_size=4), st.sampled_from([1, 3, 8, 32]))
def test_any_rows(rows, block_size):
    lengths = [n * block_size for n, _ in rows], [n for _, n in rows]
    check(make(torch.device(_triton.device_type), *lengths, block_size, heads=2, kv_heads=1))


def test_same_bits_alone_and_in_a_batch(dtype, device):
    """A row's result depends neither on the rows beside it nor on which pages it got."""
    lengths, news = [96, 0, 544], [32, 7, 45]
    case = make(device, lengths, news, 32, dtype=dtype)
    together, begin = case.run("triton"), 0
    for row, (length, n) in enumerate(zip(lengths, news, strict=True)):
        alone = make(device, [length], [n], 32, dtype=dtype)
        alone.q, alone.k, alone.v = (x[begin : begin + n] for x in (case.q, case.k, case.v))
        order = torch.arange(length // 32, device=device).flip(0)
        pages = case.page_table[row, : length // 32].long()
        alone.cache_k, alone.cache_v = (torch.cat([x[pages[order]], x[:1]]) for x in (case.cache_k, case.cache_v))
        alone.page_table = order.int()[None]
        assert torch.equal(alone.run("triton"), together[begin : begin + n])
        begin += n


def test_non_contiguous_inputs(device):
    case = make(device, [16, 8], [8, 8], 8)
    expected = case.run("triton")
    case.q, case.k, case.v = torch.cat([case.q, case.k, case.v], 1).split((4, 2, 2), 1)
    both = torch.stack([case.cache_k, case.cache_v], 2)  # one cache for keys and values: read where they lie
    case.cache_k, case.cache_v = both[:, :, 0], both[:, :, 1]
    case.page_table = torch.stack([case.page_table, case.page_table], -1)[..., 0]
    assert not any(x.is_contiguous() for x in case.arguments()[:-1])
    assert torch.equal(case.run("triton"), expected)
    case.cache_k, case.cache_v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.cache_k, case.cache_v))
    assert torch.equal(case.run("triton"), expected)


def test_softmax_scale(device):
    case = make(device, [8], [8], 8)
    expected = case.run("triton", scale=0.3)
    case.q = case.q * 0.3 * 8  # 1 / sqrt(64) is the default
    torch.testing.assert_close(case.run("triton"), expected)


def test_is_inference_only(device):
    case = make(device, [8], [8], 8)
    case.q.requires_grad_()
    with pytest.raises(ValueError, match="triton is inference only"):
        cached_block_attention(*case.arguments(), backend="triton")


def test_operator_contract(device):
    case = make(device, [8, 0], [8, 3], 8)
    plan = case.mask.tile_plan()
    arguments = [*case.arguments()[:-1], case.mask.own, plan.tiles, plan.order, plan.rows, plan.block_m, 0.25]
    torch.library.opcheck(torch.ops.llada_kernels_triton.cached_block_attention, arguments)


def test_compiles_without_graph_breaks(device):
    @torch.no_grad()
    def f(*arguments):
        return cached_block_attention(*arguments, backend="triton").sin()

    compiled = torch.compile(f, fullgraph=True)
    for context in ([16, 8], [24, 0]):
        case = make(device, context, [8, 8], 8)
        torch.testing.assert_close(compiled(*case.arguments()), case.run("reference").sin())


def test_overflowing_scores(device):
    check_overflowing_scores(make(device, [4096], [32], 32), "triton")
