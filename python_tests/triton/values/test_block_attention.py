from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_kernels.masks import DiffusionMask
from llada_kernels.ops import _triton
from llada_kernels.ops.block_attention import block_attention
from llada_kernels.testing import assert_as_exact_as

from ...ops.test_block_attention import GRID, MASKS, check_overflowing_scores, dense_attention, draw, sdpa, values_and_gradients


def run(inputs, mask, dtype, scale=None):
    return values_and_gradients(lambda q, k, v: block_attention(q, k, v, mask, scale, backend="triton"), dtype, *inputs)


def check(mask, heads, kv_heads, dim, dtype, device, scale=None):
    mask = mask.to(device)
    inputs, visible = [x.to(device) for x in draw(mask, heads, kv_heads, dim, dtype)], mask.dense()
    ours = run(inputs, mask, dtype, scale)
    exact = values_and_gradients(lambda q, k, v: dense_attention(q, k, v, visible, scale), torch.float64, *inputs)
    same = values_and_gradients(lambda q, k, v: sdpa(q, k, v, visible, scale), dtype, *inputs) if mask.num_queries else exact
    for x, y, z, name in zip(ours, same, exact, ("out", "grad_q", "grad_k", "grad_v"), strict=True):
        assert x.dtype == dtype
        assert_as_exact_as(x, y, z, name=name)


@pytest.mark.parametrize("name", MASKS)
def test_values_and_gradients(name, dtype, device):
    check(MASKS[name](), 4, 1, 64, dtype, device)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 64), (2, 2, 128), (8, 1, 64), (4, 2, 64)])
def test_any_group_of_heads(heads, kv_heads, dim, device):
    """Groups of 3, 1, 8 and 2 heads: not a power of two, other numbers of tokens per tile, more heads than one program takes."""
    check(DiffusionMask.block_diffusion([0, 40, 75], 8, views=2), heads, kv_heads, dim, torch.float32, device)


@pytest.mark.parametrize(
    "make", [lambda: DiffusionMask.block_diffusion([0, 300], 32), lambda: DiffusionMask.block_causal([0, 7, 407], 160)]
)
def test_many_tiles_without_masks(make, device):
    check(make(), 4, 1, 64, torch.float16, device, scale=0.05)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 2, 7, 8, 9, 31, 32, 33, 61]), max_size=4),
    st.sampled_from([1, 3, 8, 32]),
    st.integers(1, 2),
    st.sampled_from(["document", "row"]),
)
def test_any_documents(lengths, block_size, views, origin):
    cu = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    device = torch.device(_triton.device_type)
    check(DiffusionMask.block_diffusion(cu, block_size, views, block_origin=origin), 2, 1, 64, torch.float32, device)


@pytest.mark.parametrize("sms", [0, 1000])
def test_shares_of_a_key_tile(sms, dtype, device):
    """One program per key tile, and eight whose sums are added up: the number depends on the device alone."""
    with mock.patch.object(_triton, "num_sms", lambda device: sms):
        check(DiffusionMask.block_diffusion([0, 33, 150], 32), 4, 1, 64, dtype, device)


def test_query_without_keys_gives_zero(device):
    mask = DiffusionMask.from_dense(GRID).to(device)
    q, k, v, grad = (x.to(device) for x in draw(mask, 2, 1, 64, torch.float32))
    out, grad_q, *_ = run((q, k, v, grad), mask, torch.float32)
    assert not out[1].any() and not grad_q[1].any()
    none = DiffusionMask.from_dense(torch.zeros(3, 5, dtype=torch.bool)).to(device)
    assert not any(x.any() for x in run((q[:3], k, v, grad[:3]), none, torch.float32))
    no_keys = DiffusionMask.from_dense(torch.zeros(3, 0, dtype=torch.bool)).to(device)
    assert not any(x.any() for x in run((q[:3], k[:0], v[:0], grad[:3]), no_keys, torch.float32))


def test_large_scores_do_not_overflow(device):
    mask = DiffusionMask.block_diffusion([0, 100], 32).to(device)
    q, k, v, _ = (x.to(device) for x in draw(mask, 2, 2, 64, torch.float32))
    out = block_attention(q * 300, k * 300, v, mask, backend="triton")
    exact = dense_attention(q.double() * 300, k.double() * 300, v.double(), mask.dense())
    # Scores of 10^5 carry an error of about 10^-2 in fp32, wherever they are computed.
    assert torch.isfinite(out).all() and (out - exact).abs().max() < 0.2


def test_nan_stays_in_its_document(device):
    mask = DiffusionMask.block_diffusion([0, 50, 128], 32).to(device)
    q, k, v, _ = (x.to(device) for x in draw(mask, 2, 2, 64, torch.float32))
    k[130], v[131] = float("nan"), float("nan")  # clean tokens of the first document
    out = block_attention(q, k, v, mask, backend="triton")
    assert torch.isfinite(out[50:128]).all() and torch.isfinite(out[178:]).all()
    assert not torch.isfinite(out[128:178]).all()


def test_same_bits_twice_and_for_slices(dtype, device):
    """The model's q, k, v are slices of one fused projection; they are read where they lie."""
    mask = DiffusionMask.block_diffusion([0, 33, 70], 32).to(device)
    qkv = torch.randn(140, 8, 64, dtype=dtype, device=device)
    grad = torch.randn(140, 64, 4, dtype=dtype, device=device).transpose(1, 2)
    slices = qkv.split((4, 2, 2), 1)
    results = [run((*x, grad), mask, dtype) for x in (slices, slices, [x.contiguous() for x in slices])]
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def arguments(mask):
    plan, keys = mask.tile_plan(), mask.key_plan()
    return mask.context, mask.own, plan.tiles, plan.order, keys.offsets, keys.stretches, keys.order, plan.block_m, 0.25


def test_operator_contract(device):
    mask = DiffusionMask.block_diffusion([0, 5, 12], 4).to(device)
    q, k, v, grad = (x.to(device) for x in draw(mask, 4, 1, 64, torch.float32))
    ops = torch.ops.llada_kernels_triton
    torch.library.opcheck(ops.block_attention, (*(x.requires_grad_() for x in (q, k, v)), *arguments(mask)))
    out, lse = ops.block_attention(q, k, v, *arguments(mask))
    saved = [x.detach() for x in (grad, q, k, v, out, lse)]
    torch.library.opcheck(ops.block_attention_backward, (*saved, *arguments(mask)))


def test_compiles_without_graph_breaks(device):
    mask = DiffusionMask.block_diffusion([0, 5, 12], 4).to(device)
    mask.key_plan()
    q, k, v, _ = (x.to(device) for x in draw(mask, 4, 1, 64, torch.float32))
    compiled = torch.compile(lambda q, mask: block_attention(q, k, v, mask, backend="triton").sin(), fullgraph=True)
    expected = block_attention(q, k, v, mask, backend="reference").sin()
    torch.testing.assert_close(compiled(q.requires_grad_(), mask), expected)
    compiled(q, mask).sum().backward()
    assert q.grad is not None


def test_inference_and_partial_gradients(device):
    mask = DiffusionMask.causal([0, 9]).to(device)
    q, k, v, grad = (x.to(device) for x in draw(mask, 4, 2, 64, torch.float32))
    with torch.inference_mode():
        out = block_attention(q, k, v, mask, backend="triton")
    grad_v = torch.autograd.grad(block_attention(q, k, v.requires_grad_(), mask, backend="triton"), v, grad)[0]
    exact = dense_attention(q, k, v, mask.dense())
    torch.testing.assert_close(out, exact.detach())
    torch.testing.assert_close(grad_v, torch.autograd.grad(exact, v, grad)[0])


def test_reasons(device):
    mask = DiffusionMask.causal([0, 6]).to(device)
    q, k = torch.randn(6, 4, 64, device=device), torch.randn(6, 2, 64, device=device)
    wide = torch.randn(6, 32, 64, device=device)
    cases = [
        ("head dims 64 and 128, got 32", (q[..., :32], k[..., :32], k[..., :32], mask)),
        ("a softmax_scale above 0, got 0.0", (q, k, k, mask, 0.0)),
        ("at most 16 query heads per KV head, got 32", (wide, k[:, :1], k[:, :1], mask)),
        ("float32, bfloat16, float16, got torch.float64", (q.double(), k.double(), k.double(), mask)),
        ("a dense mask is served by the reference only", (q, k, k, mask.dense())),
    ]
    for text, call in cases:
        with pytest.raises(ValueError, match=text):
            block_attention(*call, backend="triton")


def test_overflowing_scores(device):
    check_overflowing_scores(lambda *args: block_attention(*args, backend="triton"), device)
