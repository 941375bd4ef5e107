from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from llada_kernels.ops.moe_routing import BACKENDS, Routing, moe_routing

from ..backends import cpu_backends, everywhere
from ..conftest import GOLDEN

NAMES = cpu_backends(BACKENDS)


def best(values, count):
    """Indices of the largest values, ties to the lowest index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def choose(scores, bias, top_k, n_group=1, topk_group=1, block_pool=None):
    """The rule of the official router (and of block routing), token by token on Python numbers. fp32 sums, as theirs."""
    tokens, experts = scores.shape
    biased = scores if bias is None else scores + bias
    rows = biased.tolist()
    allowed = [set(range(experts)) for _ in range(tokens)]
    if n_group > 1:
        size = experts // n_group
        for t in range(tokens):
            pairs = [sorted(rows[t][g * size : (g + 1) * size])[-2:] for g in range(n_group)]
            group_scores = torch.tensor(pairs).sum(-1).tolist()
            groups = best(group_scores, topk_group)
            allowed[t] = {e for e in range(experts) if e // size in groups}
    if block_pool is not None:
        block_size, capacity = block_pool
        for begin in range(0, tokens, block_size):
            pool = best([max(row[e] for row in rows[begin : begin + block_size]) for e in range(experts)], capacity)
            allowed[begin : begin + block_size] = [set(pool)] * block_size
    return [best([r if e in ok else -math.inf for e, r in enumerate(row)], top_k) for row, ok in zip(rows, allowed, strict=True)]


def weigh(logits, ids, top_k, scale, score, normalize):
    """Weights of chosen experts in the dtype of logits, differentiable."""
    scores = 1 / (1 + torch.exp(-logits)) if score == "sigmoid" else torch.softmax(logits, -1)
    weights = torch.gather(scores, 1, ids)
    if normalize and top_k > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale


def assert_sorted(routing, experts):
    """offsets and permutation against a plain stable sort."""
    flat = routing.topk_ids.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda slot: flat[slot])
    assert routing.permutation.tolist() == order
    assert routing.offsets.tolist() == [sum(e < bound for e in flat) for bound in range(experts + 1)]
    assert {t.dtype for t in (routing.topk_ids, routing.offsets, routing.permutation)} == {torch.int32}
    assert routing.num_experts == experts


@everywhere(BACKENDS)
@pytest.mark.parametrize("name", ["e256", "e256_bf16in", "e16"])
def test_golden(backend, device, name):
    where = "cuda" if device == "cuda" else "cpu"
    data, case = load_file(GOLDEN / "router" / "io.safetensors", device=where), json.loads((GOLDEN / "router" / "case.json").read_text())
    run = next(r for r in case["runs"] if r["name"] == name)
    groups = run["n_group"], run["topk_group"], run["routed_scaling_factor"]
    out = moe_routing(data[f"{name}.logits"], data[f"{name}.expert_bias"], run["num_experts_per_tok"], *groups, backend=backend)
    assert torch.equal(out.topk_ids.long().sort(-1).values, data[f"{name}.topk_idx"].long().sort(-1).values)
    ours = torch.zeros_like(data[f"{name}.logits"]).scatter(1, out.topk_ids.long(), out.topk_weights)
    official = torch.zeros_like(ours).scatter(1, data[f"{name}.topk_idx"].long(), data[f"{name}.topk_weight"])
    torch.testing.assert_close(ours, official, **case["tolerance"]["topk_weight"])
    assert_sorted(out, run["num_experts"])


SIZES = [  # tokens, experts, top_k, n_group, topk_group, block_pool
    (1, 1, 1, 1, 1, None),
    (5, 6, 6, 1, 1, None),
    (40, 16, 4, 4, 2, None),
    (33, 12, 2, 3, 1, None),
    (17, 256, 8, 8, 4, None),
    (9, 8, 2, 2, 2, None),
    (24, 16, 3, 1, 1, (8, 5)),
    (7, 9, 2, 1, 1, (1, 2)),
    (6, 9, 2, 1, 1, (6, 9)),
]


@everywhere(BACKENDS)
@pytest.mark.parametrize("score,normalize", [("sigmoid", True), ("softmax", False), ("softmax", True), ("sigmoid", False)])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tokens,experts,top_k,n_group,topk_group,block_pool", SIZES)
def test_choice_and_weights(backend, device, score, normalize, ties, tokens, experts, top_k, n_group, topk_group, block_pool):
    """Ids exactly, also where nearly all scores tie; weights and their gradients against fp64."""
    logits = torch.randint(-1, 2, (tokens, experts)).float() if ties else torch.randn(tokens, experts) * 2
    bias = None if score == "softmax" else (torch.randint(0, 2, (experts,)) / 4 if ties else torch.randn(experts) * 0.1)
    logits.requires_grad_()
    out = moe_routing(logits, bias, top_k, n_group, topk_group, 2.5, score, normalize, block_pool, backend=backend)
    scores = (logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)).detach()
    if not (ties and score == "softmax" and block_pool):  # there the order of a token's sum decides between tokens
        assert out.topk_ids.tolist() == choose(scores, bias, top_k, n_group, topk_group, block_pool)
    assert_sorted(out, experts)

    exact = logits.detach().double().requires_grad_()
    weights = weigh(exact, out.topk_ids.long(), top_k, 2.5, score, normalize)
    torch.testing.assert_close(out.topk_weights.double(), weights, atol=1e-6, rtol=2e-6)
    grad = torch.randn(tokens, top_k)
    (ours,) = torch.autograd.grad(out.topk_weights, logits, grad)
    (theirs,) = torch.autograd.grad(weights, exact, grad.double())
    torch.testing.assert_close(ours.double(), theirs, atol=2e-6, rtol=2e-6)


@given(
    tokens=st.integers(0, 12),
    groups=st.integers(1, 5),
    size=st.integers(2, 7),
    data=st.data(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_any_size(tokens, groups, size, data, seed):
    experts = groups * size
    topk_group = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, topk_group * size))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 4, (tokens, experts), generator=generator).float()
    bias = torch.randint(0, 3, (experts,), generator=generator) / 8
    expected = choose(logits.sigmoid(), bias, top_k, groups, topk_group)
    for backend in NAMES:
        out = moe_routing(logits, bias, top_k, groups, topk_group, backend=backend)
        assert out.topk_ids.tolist() == expected
        assert_sorted(out, experts)


@everywhere(BACKENDS)
def test_bias_selects_but_does_not_weigh(backend, device):
    logits, bias = torch.zeros(1, 4), torch.tensor([0.0, 5.0, 0.0, 1.0])
    out = moe_routing(logits, bias, 2, scale=2.5, backend=backend)
    assert out.topk_ids.tolist() == [[1, 3]]
    assert out.topk_weights.tolist() == [[1.25, 1.25]]


@everywhere(BACKENDS)
def test_single_choice_is_not_normalised(backend, device):
    out = moe_routing(torch.tensor([[0.0, -1.0]]), None, 1, scale=2.0, backend=backend)
    assert out.topk_weights.tolist() == [[1.0]]  # 2 * sigmoid(0), not 2


@everywhere(BACKENDS)
def test_saturated_and_special_logits(backend, device):
    """sigmoid is exactly 1 from about 17 on: such experts tie. NaN sorts above everything, -inf is a score of 0."""
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[20.0, 90.0, inf, 30.0, 0.0], [-inf, -inf, -200.0, -inf, -inf], [0.0, nan, 9.0, nan, 1.0]])
    out = moe_routing(logits, None, 3, backend=backend)
    assert out.topk_ids.tolist() == [[0, 1, 2], [0, 1, 2], [1, 3, 2]]
    assert out.topk_weights[0].tolist() == pytest.approx([1 / 3] * 3)
    assert out.topk_weights[1].tolist() == [0.0] * 3
    assert_sorted(out, 5)


@everywhere(BACKENDS)
def test_no_tokens(backend, device):
    logits = torch.empty(0, 6, requires_grad=True)
    out = moe_routing(logits, torch.zeros(6), 2, 3, 2, backend=backend)
    assert out.topk_ids.shape == out.topk_weights.shape == (0, 2) and out.offsets.tolist() == [0] * 7
    out.topk_weights.sum().backward()
    assert logits.grad.shape == (0, 6)
    assert moe_routing(logits, None, 2, block_pool=(4, 3), backend=backend).permutation.shape == (0,)


def test_same_bits_for_any_number_of_threads_and_any_batch(num_threads):
    logits, bias = torch.randn(700, 64, requires_grad=True), torch.randn(64) * 0.1
    grad = torch.randn(700, 8)

    def results(x, g):
        out = moe_routing(x, bias, 8, 8, 4, 2.5, backend="native")
        return *out[:2], torch.autograd.grad(out.topk_weights, x, g)[0]

    torch.set_num_threads(1)
    expected = results(logits, grad)
    torch.set_num_threads(num_threads)
    for ours, theirs in zip(results(logits, grad), expected, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(results(logits[5:6], grad[5:6]), expected, strict=True):
        assert torch.equal(ours, theirs[5:6])


def test_non_contiguous_and_wide_bias():
    logits, bias = torch.randn(12, 40).T, torch.randn(24, dtype=torch.float64)[::2]
    native, reference = (moe_routing(logits, bias, 3, backend=b) for b in ("native", "reference"))
    assert torch.equal(native.topk_ids, reference.topk_ids)
    torch.testing.assert_close(native.topk_weights, reference.topk_weights)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_gradcheck(score):
    logits = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: moe_routing(x, None, 3, 4, 2, 2.5, score, backend="reference").topk_weights, (logits,))


@pytest.mark.parametrize("options", [(2, 4, 2, 2.5, False, True, 0, 0), (3, 1, 1, 1.0, True, False, 4, 5)])
def test_operator_contract(options):
    args = torch.randn(8, 16, requires_grad=True), torch.randn(16), *options
    torch.library.opcheck(torch.ops.llada_kernels.moe_routing, args)


@pytest.mark.parametrize("backend", NAMES)
def test_compiles_without_graph_breaks(backend):
    logits, bias = torch.randn(8, 16, requires_grad=True), torch.randn(16)
    compiled = torch.compile(lambda x: moe_routing(x, bias, 4, 4, 2, 2.5, backend=backend), fullgraph=True)
    out, expected = compiled(logits), moe_routing(logits, bias, 4, 4, 2, 2.5, backend="reference")
    for ours, theirs in zip(out, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(r.topk_weights.square().sum(), logits)[0] for r in (out, expected)]
    torch.testing.assert_close(*grads)


def test_from_topk():
    ids, weights = torch.tensor([[2, 0], [2, 2], [1, 2]]), torch.rand(3, 2, dtype=torch.bfloat16, requires_grad=True)
    routing = Routing.from_topk(ids, weights, 4)
    assert routing.permutation.tolist() == [1, 4, 0, 2, 3, 5] and routing.offsets.tolist() == [0, 1, 2, 6, 6]
    assert torch.equal(routing.topk_weights, weights.float()) and routing.topk_weights.requires_grad
    assert_sorted(routing, 4)
    assert_sorted(Routing.from_topk(ids[:0], weights[:0], 3), 3)
    with pytest.raises(ValueError, match=r"ids: expected values in \[0, 2\), got 2"):
        Routing.from_topk(ids, weights, 2)
    with pytest.raises(ValueError, match=r"weights: expected shape \(3, 2\) \(that of ids\), got \(2, 2\)"):
        Routing.from_topk(ids, weights[:2], 4)


def test_errors():
    logits = torch.randn(4, 12)
    for text, args, kwargs in [
        (r"logits: expected dtype float32 or float64, got bfloat16", (logits.bfloat16(), None, 2), {}),
        (r"logits: expected 2 dimensions, got shape \(12,\)", (logits[0], None, 2), {}),
        (r"expert_bias: expected shape \(12,\), got \(11,\)", (logits, torch.zeros(11), 2), {}),
        (r"top_k: expected 1 to 12 \(the number of experts\), got 13", (logits, None, 13), {}),
        (r"n_group: expected a divisor of 12 \(the number of experts\), got 5", (logits, None, 2, 5), {}),
        (r"topk_group: expected 1 to 3 \(n_group\), got 4", (logits, None, 2, 3, 4), {}),
        (r"n_group: expected at least two experts per group, got 12 groups of 1", (logits, None, 2, 12, 6), {}),
        (r"topk_group: expected groups with at least 5 experts \(top_k\), got 1 of 4 experts each", (logits, None, 5, 3, 1), {}),
        (r"score: expected 'sigmoid' or 'softmax', got 'relu'", (logits, None, 2), {"score": "relu"}),
        (r"block_pool: expected a block size that divides 4 tokens, got 3", (logits, None, 2), {"block_pool": (3, 4)}),
        (r"block_pool: expected an expert capacity of 2 \(top_k\) to 12, got 1", (logits, None, 2), {"block_pool": (4, 1)}),
        (r"n_group: expected 1 together with block_pool, got 3", (logits, None, 2, 3, 1), {"block_pool": (4, 4)}),
    ]:
        with pytest.raises(ValueError, match=text):
            moe_routing(*args, **kwargs)
    with pytest.raises(TypeError, match="logits: expected a torch.Tensor, got list"):
        moe_routing([[1.0]], None, 1)
    with pytest.raises(ValueError, match="native serves float32, got torch.float64"):
        moe_routing(logits.double(), None, 2, backend="native")
    with pytest.raises(ValueError, match=r"topk_ids: expected values in \[0, 12\), got 12"):
        backward = torch.ops.llada_kernels.moe_routing_backward
        backward(torch.zeros(4, 1), logits, torch.full((4, 1), 12, dtype=torch.int32), 1.0, False, True)


def test_counts_must_be_ints():
    with pytest.raises(TypeError, match="top_k: expected an int, got float"):
        moe_routing(torch.randn(2, 8), None, 2.0)


def test_block_pool_is_a_pair_of_ints():
    for wrong in (3, (4,), (4, 2, 1), (4, 2.0), (True, 2), "42"):
        with pytest.raises(TypeError, match=r"block_pool: expected None or two ints \(block_size, expert_capacity\), got"):
            moe_routing(torch.zeros(8, 4), None, 2, block_pool=wrong)
