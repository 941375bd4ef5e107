from __future__ import annotations

import pytest
import torch

from llada_kernels.ops.moe_routing import moe_routing, triton

from ...ops.test_moe_routing import assert_sorted, choose, weigh

CASES = [  # tokens, experts, top_k, n_group, topk_group, block_pool, score, normalize, ties
    (1, 1, 1, 1, 1, None, "sigmoid", True, False),
    (3, 6, 6, 1, 1, None, "softmax", True, False),
    (6, 16, 4, 4, 2, None, "sigmoid", True, True),
    (9, 12, 2, 3, 1, None, "softmax", False, False),
    (9, 12, 2, 3, 2, None, "sigmoid", True, True),
    (3, 256, 8, 8, 4, None, "sigmoid", True, False),
    (3, 256, 8, 8, 4, None, "sigmoid", False, True),
    (5, 8, 2, 2, 2, None, "softmax", True, True),
    (16, 16, 3, 1, 1, (8, 5), "sigmoid", True, True),
    (16, 16, 3, 1, 1, (8, 5), "softmax", True, False),
    (7, 9, 2, 1, 1, (1, 2), "sigmoid", False, False),
    (6, 9, 2, 1, 1, (6, 9), "sigmoid", True, True),
]


@pytest.mark.parametrize("tokens,experts,top_k,n_group,topk_group,block_pool,score,normalize,ties", CASES)
def test_choice_and_weights(device, tokens, experts, top_k, n_group, topk_group, block_pool, score, normalize, ties):
    """Ids exactly, also where nearly all scores tie; weights and their gradients against fp64."""
    logits = torch.randint(-1, 2, (tokens, experts)).float() if ties else torch.randn(tokens, experts) * 2
    bias = None if score == "softmax" else (torch.randint(0, 2, (experts,)) / 4 if ties else torch.randn(experts) * 0.1)
    x = logits.to(device).requires_grad_()
    there = None if bias is None else bias.to(device)
    out = moe_routing(x, there, top_k, n_group, topk_group, 2.5, score, normalize, block_pool, backend="triton")
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    assert out.topk_ids.tolist() == choose(scores, bias, top_k, n_group, topk_group, block_pool)
    assert_sorted(out, experts)
    exact = logits.double().requires_grad_()
    weights = weigh(exact, out.topk_ids.long().cpu(), top_k, 2.5, score, normalize)
    torch.testing.assert_close(out.topk_weights.double().cpu(), weights, atol=1e-6, rtol=2e-6)
    grad = torch.randn(tokens, top_k)
    (ours,) = torch.autograd.grad(out.topk_weights, x, grad.to(device))
    (theirs,) = torch.autograd.grad(weights, exact, grad.double())
    torch.testing.assert_close(ours.double().cpu(), theirs, atol=2e-6, rtol=2e-6)


def test_many_slots_are_sorted_stably(device):
    """Several chunks of slots, some experts without any, the last chunk not full."""
    logits = torch.randn(60, 12, device=device)
    logits[:, 3] = -100
    assert_sorted(moe_routing(logits, None, 5, backend="triton"), 12)


@pytest.mark.parametrize("tokens,experts,top_k", [(60, 12, 5), (260, 12, 8), (50, 1, 1), (9, 40, 8)])
def test_counts_of_many_chunks_are_summed_up_once(device, monkeypatch, tokens, experts, top_k):
    """The same integers as where every program adds up all counts; 260 x 8 slots are 130 chunks, more than one step of the sum."""
    logits = torch.randn(tokens, experts, device=device)
    expected = moe_routing(logits, None, top_k, backend="triton")
    monkeypatch.setattr(triton, "_CHUNK", 16)
    monkeypatch.setattr(triton, "_FEW_CHUNKS", 2)
    out = moe_routing(logits, None, top_k, backend="triton")
    assert_sorted(out, experts)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_saturated_and_special_logits(device):
    """sigmoid is exactly 1 from about 17 on: such experts tie. NaN sorts above everything, -inf is a score of 0."""
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[20.0, 90.0, inf, 30.0, 0.0], [-inf, -inf, -200.0, -inf, -inf], [0.0, nan, 9.0, nan, 1.0]], device=device)
    out = moe_routing(logits, None, 3, backend="triton")
    assert out.topk_ids.tolist() == [[0, 1, 2], [0, 1, 2], [1, 3, 2]]
    assert out.topk_weights[0].tolist() == pytest.approx([1 / 3] * 3)
    assert out.topk_weights[1].tolist() == [0.0] * 3
    assert_sorted(out, 5)


def test_nan_among_groups_and_blocks(device):
    """A group or a block with NaN counts as the best, as in the reference."""
    logits = torch.randn(8, 12)
    logits[3, 7], logits[5, 2], logits[5, 4] = torch.nan, torch.nan, torch.nan
    for options in ((2, 3, 1), (2, 3, 2), (2, 1, 1, 1.0, "sigmoid", True, (4, 3))):
        out = moe_routing(logits.to(device), None, *options, backend="triton")
        assert torch.equal(out.topk_ids.cpu(), moe_routing(logits, None, *options, backend="reference").topk_ids)


def test_negative_biases_and_single_choice(device):
    logits, bias = torch.randn(9, 10), torch.randn(10) * 3 - 4
    bias[4] = -torch.inf
    out = moe_routing(logits.to(device), bias.to(device), 10, backend="triton")
    assert torch.equal(out.topk_ids.cpu(), moe_routing(logits, bias, 10, backend="reference").topk_ids)
    out = moe_routing(torch.tensor([[0.0, -1.0]], device=device), None, 1, scale=2.0, backend="triton")
    assert out.topk_weights.tolist() == [[1.0]]  # 2 * sigmoid(0), not 2


def test_no_tokens(device):
    logits = torch.empty(0, 6, requires_grad=True, device=device)
    out = moe_routing(logits, torch.zeros(6, device=device), 2, 3, 2, backend="triton")
    assert out.topk_ids.shape == out.topk_weights.shape == (0, 2) and out.offsets.tolist() == [0] * 7
    out.topk_weights.sum().backward()
    assert logits.grad.shape == (0, 6)
    assert moe_routing(logits, None, 2, block_pool=(4, 3), backend="triton").permutation.shape == (0,)


def test_same_bits_twice_and_in_any_batch(device):
    logits, bias = torch.randn(20, 64, device=device), torch.randn(64, device=device) * 0.1
    a, b = (moe_routing(logits, bias, 8, 8, 4, 2.5, backend="triton") for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    c = moe_routing(logits[5:6], bias, 8, 8, 4, 2.5, backend="triton")
    assert torch.equal(c.topk_ids, a.topk_ids[5:6]) and torch.equal(c.topk_weights, a.topk_weights[5:6])


def test_strides_do_not_matter(device):
    logits, bias = torch.randn(12, 40, device=device).T, torch.randn(24, dtype=torch.float64, device=device)[::2]
    a = moe_routing(logits, bias, 3, backend="triton")
    b = moe_routing(logits.contiguous(), bias.float(), 3, backend="triton")
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("options", [(2, 4, 2, 2.5, False, True, 0, 0), (3, 1, 1, 1.0, True, False, 4, 5)])
def test_operator_contract(options, device):
    args = torch.randn(4, 16, requires_grad=True, device=device), torch.randn(16, device=device), *options
    torch.library.opcheck(torch.ops.llada_kernels_triton.moe_routing, args)


def test_compiles_without_graph_breaks(device):
    logits, bias = torch.randn(8, 16, requires_grad=True, device=device), torch.randn(16, device=device)
    compiled = torch.compile(lambda x: moe_routing(x, bias, 4, 4, 2, 2.5, backend="triton"), fullgraph=True, backend="aot_eager")
    out, expected = compiled(logits), moe_routing(logits, bias, 4, 4, 2, 2.5, backend="reference")
    for ours, theirs in zip(out, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(r.topk_weights.square().sum(), logits)[0] for r in (out, expected)]
    torch.testing.assert_close(*grads)
