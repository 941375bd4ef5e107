from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_kernels.ops.moe_mlp import moe_mlp
from llada_kernels.ops.moe_routing import Routing
from llada_kernels.ops.quantized_experts import QuantizedExperts
from llada_kernels.testing import assert_as_exact_as

from ...ops.test_moe_mlp import gradients, inputs, official, op
from ...ops.test_quantized_experts import relative

triton = op("triton")
CASES = [  # tokens, experts, top_k, hidden, width, experts in use
    (1, 1, 1, 1, 1, None),
    (1, 8, 4, 96, 64, None),
    (0, 4, 2, 8, 8, None),
    (9, 6, 2, 8, 4, None),
    (33, 16, 4, 70, 37, None),
    (40, 5, 2, 130, 66, [1, 3]),
    (24, 4, 2, 128, 128, None),
    (110, 3, 1, 64, 72, [2]),
    (100, 3, 2, 128, 72, None),
]


def on(device, args):
    return [t.to(device) for t in args]


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype, device):
    args = on(device, inputs(*case[:5], dtype, case[5]))
    grad = torch.randn(case[0], case[3]).to(device, dtype)
    ours = gradients(triton, *args, grad)
    same, exact = gradients(official, *args, grad), gradients(official, *args, grad, torch.float64)
    for name, *values in zip(("out", "grad_x", "grad_weights", "grad_w_gate_up", "grad_w_down"), ours, same, exact, strict=True):
        assert values[0].dtype == (torch.float32 if name == "grad_weights" else dtype)
        assert_as_exact_as(*values, name=name)
    unused = set(range(case[1])) - set(args[1].unique().tolist())
    assert not any(ours[i][e].any() for i in (3, 4) for e in unused)


def test_rounds_as_the_official_code(dtype, device):
    """fp16 and bf16: equal to the official order but for rare last bits of silu, and not to orders that round elsewhere."""
    if dtype == torch.float32:
        dtype = torch.float16
    args = on(device, inputs(64, 4, 4, 128, 64, dtype))
    x, ids, weights, w_gate_up, w_down = args
    out = triton(*args)
    assert (out != official(*args)).float().mean() < 0.02
    unrounded = official(x.float(), ids, weights, w_gate_up.float(), w_down.float()).to(dtype)
    assert (out != unrounded).float().mean() > 0.1


@pytest.mark.parametrize("tokens", [5, 50, 150])
def test_selections_are_exact(tokens, dtype, device):
    """One-hot gates that saturate silu, integer ups and downs: gather, experts' rows and the combine show any wrong index."""
    experts, top_k, hidden, width = 6, 3, 40, 24
    x, ids, _, w_gate_up, w_down = inputs(tokens, experts, top_k, hidden, width, torch.float32)
    x, weights = torch.randint(-2, 3, x.shape).float(), torch.tensor([1.0, 2.0, 4.0]).expand(tokens, top_k).contiguous()
    x[:, 0] = 1
    w_gate_up = torch.randint(-1, 2, w_gate_up.shape).float()
    w_gate_up[:, :width] = 0
    w_gate_up[:, :width, 0] = 32.0  # silu(32) == 32 in every dtype
    w_gate_up[:, width:] *= (torch.rand(experts, width, hidden) < 0.1).float()
    w_down = torch.randint(-1, 2, w_down.shape).float() * (torch.rand(w_down.shape) < 0.2).float()
    up = torch.einsum("th,eih->tei", x, w_gate_up[:, width:])
    outputs = torch.einsum("tei,ehi->teh", 32 * up, w_down)
    expected = (outputs.gather(1, ids.long()[..., None].expand(-1, -1, hidden)) * weights[..., None]).sum(1)
    out = triton(*(t.to(device) for t in (x.to(dtype), ids, weights, w_gate_up.to(dtype), w_down.to(dtype))))
    assert torch.equal(out.cpu(), expected.to(dtype))


@given(tokens=st.integers(0, 30), experts=st.integers(1, 6), hidden=st.integers(1, 40), width=st.integers(1, 40), data=st.data())
@settings(max_examples=12, deadline=None)
def test_any_shape(tokens, experts, hidden, width, data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = on(device, inputs(tokens, experts, data.draw(st.integers(1, experts)), hidden, width, torch.float32))
    grad = torch.randn(tokens, hidden, device=device)
    for ours, exact in zip(gradients(triton, *args, grad), gradients(official, *args, grad), strict=True):
        torch.testing.assert_close(ours, exact, atol=3e-5, rtol=1e-5)


def test_every_output_is_written(dtype, device, monkeypatch):
    """Fresh memory is all NaN: whatever a kernel leaves out, or reads before it is written, would show."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        t = new_empty(self, *args, **kwargs)
        return t.fill_(torch.nan) if t.is_floating_point() else t

    x, ids, weights, w_gate_up, w_down = on(device, inputs(20, 6, 2, 40, 36, dtype, [1, 2, 5]))
    routing = Routing.from_topk(ids, weights, 6)
    args = (x, weights, routing.offsets, routing.permutation, w_gate_up, w_down)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    out, kept = torch.ops.llada_kernels_triton.moe_mlp(*args, True)
    grads = torch.ops.llada_kernels_triton.moe_mlp_backward(x, *args, kept, True, True, True)
    assert x.new_empty(1).isnan() and all(t.isfinite().all() for t in (out, kept, *grads))


def test_same_bits_twice_and_any_strides(dtype, device):
    x, ids, weights, w_gate_up, w_down = on(device, inputs(20, 4, 2, 32, 16, dtype))
    strided = x.T.contiguous().T, ids, weights.T.contiguous().T, w_gate_up.mT.contiguous().mT, w_down.mT.contiguous().mT
    assert not any(t.is_contiguous() for i, t in enumerate(strided) if i != 1)
    grad = torch.randn(20, 32).to(device, dtype)
    first = gradients(triton, x, ids, weights, w_gate_up, w_down, grad)
    for args in (strided, (x, ids, weights, w_gate_up, w_down)):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(triton, *args, grad), strict=True))


def test_a_token_may_name_an_expert_twice(device):
    x, _, _, w_gate_up, w_down = on(device, inputs(3, 4, 1, 16, 8, torch.float32))
    ids, weights = torch.tensor([[2, 2]] * 3, dtype=torch.int32, device=device), torch.tensor([[0.25, 0.5]] * 3, device=device)
    twice = triton(x, ids, weights, w_gate_up, w_down)
    torch.testing.assert_close(twice, triton(x, ids[:, :1], weights.sum(1, keepdim=True), w_gate_up, w_down))


def test_keeps_only_x_and_the_pre_activation(dtype, device):
    args = on(device, inputs(12, 4, 2, 32, 24, dtype))
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in args]
    routing = Routing.from_topk(leaves[1], leaves[2], 4)
    given, kept = {t.data_ptr() for t in (*leaves, *routing)}, []

    def pack(t):
        if t.data_ptr() not in given:
            kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = moe_mlp(leaves[0], routing, *leaves[3:], backend="triton")
    assert kept == [(24, 48)]
    with torch.inference_mode():  # nothing at all
        inference, pre_activation = torch.ops.llada_kernels_triton.moe_mlp(leaves[0], *routing[1:], *leaves[3:], False)
        assert pre_activation.shape == (0, 48)
    assert torch.equal(out, inference)


def test_frozen_weights_get_no_gradient(device):
    x, ids, weights, w_gate_up, w_down = on(device, inputs(12, 4, 2, 32, 24, torch.float32))
    for wanted in (x, w_down, w_gate_up, weights):
        wanted.requires_grad_()
        results = [torch.autograd.grad(run(x, ids, weights, w_gate_up, w_down).square().sum(), wanted)[0] for run in (triton, official)]
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
        wanted.requires_grad_(False)


def test_operator_contract_and_compile(device):
    x, ids, weights, w_gate_up, w_down = on(device, inputs(6, 4, 2, 16, 8, torch.float32))
    leaves = [t.requires_grad_() for t in (x, weights, w_gate_up, w_down)]
    routing = Routing.from_topk(ids, weights, 4)
    args = (x, weights, routing.offsets, routing.permutation, w_gate_up, w_down, True)
    torch.library.opcheck(torch.ops.llada_kernels_triton.moe_mlp, args)

    def run(x, weights, w_gate_up, w_down):
        return triton(x, ids, weights, w_gate_up, w_down).sin()

    out, exact = torch.compile(run, fullgraph=True)(*leaves), official(x, ids, weights, w_gate_up, w_down).sin()
    torch.testing.assert_close(out, exact, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (out, exact)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def fp8(tokens, dtype, device, experts=6, top_k=2, hidden=256, width=128):
    x, ids, weights, *pair = inputs(tokens, experts, top_k, hidden, width, dtype)
    x[: tokens // 4, :128] = 0  # zero has a scale too
    routing = Routing.from_topk(ids.to(device), weights.to(device), experts)
    quantized = [QuantizedExperts.quantize(w, "fp8") for w in pair]
    return x.to(device), routing, *(q._replace(data=q.data.to(device), scales=q.scales.to(device)) for q in quantized)


@pytest.mark.parametrize("tokens", [0, 1, 9, 70])
def test_fp8_follows_the_reference(tokens, dtype, device):
    """Both round the same values; sums in another order move few of them to another e4m3 value."""
    args = fp8(tokens, dtype, device)
    y, expected = (moe_mlp(*args, backend=name) for name in ("triton", "reference"))
    assert y.shape == expected.shape and y.dtype == dtype
    assert float((y.double() - expected.double()).norm()) <= (2e-3 if device.type == "cpu" else 1e-2) * float(expected.double().norm())
    if tokens:
        assert torch.equal(y, moe_mlp(*args, backend="triton"))
        plain = [q.dequantize(dtype) for q in args[2:]]  # without quantised activations it would be these weights' result
        assert relative(y, moe_mlp(*args[:2], *plain, backend="reference")) > 0.02


def test_fp8_rounds_as_e4m3(device):
    """Scales of 1, an identity as w_gate_up's up rows and silu(64) = 64: what comes out is x's nearest e4m3 value times 64."""
    x = torch.randn(5, 128, device=device) * torch.logspace(-4, 2, 128, device=device)
    x.clamp_(-448, 448)
    x[:, 0], x[:, 1], x[:, 2], x[:, 3] = 448.0, 64.0, 17.0, 3 * 2.0**-10  # largest; gate; 17 is between 16 and 18, 1.5 steps of 2^-9
    gate_up = torch.cat([torch.zeros(128, 128), torch.eye(128) * 448])[None].to(device)
    gate_up[0, :128, 1] = 448
    down = torch.eye(128, device=device)[None] * 448
    quantized = [
        QuantizedExperts.quantize(w, "fp8")._replace(scales=torch.ones(1, w.shape[1] // 128, 1, device=device) / 448)
        for w in (gate_up, down)
    ]
    routing = Routing.from_topk(torch.zeros(5, 1, dtype=torch.int32, device=device), torch.ones(5, 1, device=device), 1)
    out = moe_mlp(x, routing, *quantized, backend="triton") / 64
    expected = x.to(torch.float8_e4m3fn).float()
    assert expected[0, 2] == 16 and expected[0, 3] == 2.0**-8
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)


def test_fp8_operator_contract(device):
    x, routing, gate_up, down = fp8(3, torch.float32, device)
    args = (x, *routing[1:], gate_up.data, gate_up.scales, down.data, down.scales)
    op = torch.ops.llada_kernels_triton.moe_mlp_fp8
    torch.library.opcheck(op, args, test_utils="test_faketensor")  # the others compare arguments, which float8 cannot do


INTEGERS = [("int8", "int4"), ("int4", "int8")]
INTEGER_CASES = [  # tokens, experts, top_k, hidden, width, experts in use, group
    (1, 1, 1, 32, 32, None, 32),
    (1, 8, 4, 128, 64, None, 64),
    (0, 4, 2, 64, 64, None, 32),
    (9, 6, 2, 256, 128, None, 32),
    (9, 4, 2, 128, 256, None, 64),
    (33, 16, 4, 96, 32, None, 32),
    (40, 5, 2, 160, 96, [1, 3], 32),
    (40, 5, 2, 192, 64, [1, 3], 64),
    (110, 3, 1, 128, 128, [2], 128),
    (100, 3, 2, 96, 128, None, 32),
]


def integers(case, dtype, device, kinds):
    tokens, experts, top_k, hidden, width, only, group = case
    x, ids, weights, *pair = (t.to(device) for t in inputs(tokens, experts, top_k, hidden, width, dtype, only))
    quantized = [QuantizedExperts.quantize(w, kind, group) for w, kind in zip(pair, kinds, strict=True)]
    return x, Routing.from_topk(ids, weights, experts), *quantized


@pytest.mark.parametrize("kinds", INTEGERS)
@pytest.mark.parametrize("case", INTEGER_CASES)
def test_integers_follow_the_reference(case, kinds, dtype, device):
    """As exact as PyTorch with weights rounded to the dtype of x; the same bits twice."""
    x, routing, *pair = integers(case, dtype, device, kinds)
    out = moe_mlp(x, routing, *pair, backend="triton")
    same = moe_mlp(x, routing, *pair, backend="reference")
    rounded = [q.dequantize(dtype).double() for q in pair]
    exact = official(x.double(), routing.topk_ids, routing.topk_weights.double(), *rounded)
    assert out.dtype == dtype and out.shape == x.shape
    assert_as_exact_as(out, same, exact)
    assert torch.equal(out, moe_mlp(x, routing, *pair, backend="triton"))


def stored(kind, levels, scales):
    """QuantizedExperts of these integers [E, N, K]."""
    if kind == "int8":
        return QuantizedExperts(kind, levels.to(torch.int8), scales)
    low, high = (levels + 8).to(torch.uint8).unflatten(-1, (-1, 2, 16)).unbind(-2)
    return QuantizedExperts(kind, (low | high << 4).flatten(-2), scales)


@pytest.mark.parametrize("tokens", [3, 100])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_each_integer_weight_is_rounded_once(kind, group, tokens, dtype, device):
    """Tokens that select a feature each, whose activation is 32: what comes out is 32 times a column of w_down, in its last bit.

    All integers there are, with scales of either sign, in fp16 down to subnormal results and else over 200 powers of two.
    """
    width, hidden = 192, 256
    lowest = -8 if kind == "int4" else -128
    gate_up = torch.zeros(1, 2 * width, hidden)
    gate_up[0, :width, hidden - 1] = 4
    gate_up[0, width:, :width] = torch.eye(width)
    scales = torch.ones(1, 2 * width, hidden // group)
    scales[0, :width] = 8.0  # gates are 32 = silu(32) in every dtype
    w_gate_up = stored(kind, gate_up, scales.bfloat16())
    levels = torch.randint(lowest, -lowest, (1, hidden, width)).float()
    low, high = (-26, 3) if dtype == torch.float16 else (-100, 100)
    powers = torch.randint(low, high, (1, hidden, width // group)).float()
    w_down = stored(kind, levels, (torch.exp2(powers) * (1 + torch.rand(powers.shape)) * (torch.randn(powers.shape).sign())).bfloat16())
    features = torch.randperm(width)[:tokens]
    x = torch.zeros(tokens, hidden)
    x[:, hidden - 1] = 1
    x[torch.arange(tokens), features] = 1
    routing = Routing.from_topk(torch.zeros(tokens, 1, dtype=torch.int32), torch.ones(tokens, 1), 1)
    pair = [q._replace(data=q.data.to(device), scales=q.scales.to(device)) for q in (w_gate_up, w_down)]
    out = moe_mlp(x.to(device, dtype), Routing(*(t.to(device) for t in routing)), *pair, backend="triton")
    expected = levels.unflatten(-1, (-1, group)) * w_down.scales.float()[..., None]
    expected = expected.flatten(-2).to(dtype)[0, :, features].T * 32
    assert torch.equal(out.cpu(), expected)


def test_integers_of_any_strides(device):
    x, routing, *pair = integers((20, 4, 2, 64, 64, None, 32), torch.float32, device, INTEGERS[1])
    out = moe_mlp(x, routing, *pair, backend="triton")
    strided = [q._replace(data=q.data.mT.contiguous().mT, scales=q.scales.mT.contiguous().mT) for q in pair]
    assert not any(t.is_contiguous() for q in strided for t in q[1:])
    assert torch.equal(out, moe_mlp(x.T.contiguous().T, routing, *strided, backend="triton"))


def test_integers_write_every_output(dtype, device, monkeypatch):
    x, routing, *pair = integers((20, 6, 2, 96, 64, [1, 2, 5], 32), dtype, device, INTEGERS[0])
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        t = new_empty(self, *args, **kwargs)
        return t.fill_(torch.nan) if t.is_floating_point() else t

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    assert moe_mlp(x, routing, *pair, backend="triton").isfinite().all() and x.new_empty(1).isnan()


@pytest.mark.parametrize("kinds", INTEGERS)
def test_integers_operator_contract_and_compile(kinds, device):
    x, routing, *pair = integers((6, 4, 2, 64, 32, None, 32), torch.float32, device, kinds)
    tensors = [t for q in pair for t in (q.data, q.scales)]
    torch.library.opcheck(torch.ops.llada_kernels_triton.moe_mlp_integers, (x, *routing[1:], *tensors))
    run = torch.compile(lambda x, *pair: moe_mlp(x, routing, *pair, backend="triton").sin(), fullgraph=True)
    torch.testing.assert_close(run(x, *pair), moe_mlp(x, routing, *pair, backend="triton").sin(), rtol=1e-6, atol=1e-6)


def test_integers_that_are_not_served(device):
    x, routing, *pair = integers((3, 4, 2, 96, 96, None, 32), torch.float32, device, INTEGERS[0])
    wide = pair[0]._replace(scales=pair[0].scales[..., :1].contiguous())
    with pytest.raises(ValueError, match="triton serves groups of 32, 64, 128 columns, got 96"):
        moe_mlp(x, routing, wide, pair[1], backend="triton")
    with pytest.raises(ValueError, match="x: expected no gradient to be wanted with quantised experts"):
        moe_mlp(x.requires_grad_(), routing, *pair, backend="triton")
