from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_kernels.ops.moe_mlp import BACKENDS, moe_mlp
from llada_kernels.ops.moe_routing import Routing
from llada_kernels.testing import assert_as_exact_as

from ..backends import cpu_backends

NAMES = cpu_backends(BACKENDS)
DTYPES = [torch.float32, torch.bfloat16]


def official(x, ids, weights, w_gate_up, w_down):
    """The rule of the official modelling code, expert by expert; rounds in the dtype of x as that does."""
    tokens, top_k = ids.shape
    outputs = x.new_zeros(tokens, top_k, x.shape[1])
    for expert in ids.unique().tolist():
        gate_weight, up_weight = w_gate_up[expert].chunk(2)
        token, choice = (ids == expert).nonzero().T
        y = (torch.nn.functional.silu(x[token] @ gate_weight.T) * (x[token] @ up_weight.T)) @ w_down[expert].T
        outputs = outputs.index_put((token, choice), y)
    wide = torch.promote_types(x.dtype, torch.float32)
    out = sum(outputs[:, k].to(wide) * weights[:, k, None].to(wide) for k in range(top_k)).to(x.dtype)
    return out if tokens else out + x + 0 * (w_gate_up.sum() + w_down.sum() + weights.sum())


def inputs(tokens, experts, top_k, hidden, width, dtype, only=None):
    """x, ids, weights, w_gate_up, w_down; with `only`, ids are drawn from these experts."""
    pool = list(range(experts)) if only is None else only
    ids = torch.stack([torch.tensor(pool)[torch.randperm(len(pool))[:top_k]] for _ in range(tokens)] or [torch.zeros(top_k)])
    ids = ids[:tokens].int()
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, top_k) + 0.1
    w_gate_up = torch.randn(experts, 2 * width, hidden) / hidden**0.5
    w_down = torch.randn(experts, hidden, width) / width**0.5
    return x.to(dtype), ids, weights, w_gate_up.to(dtype), w_down.to(dtype)


def gradients(run, x, ids, weights, w_gate_up, w_down, grad, kind=None):
    """out and the gradients of x, weights, w_gate_up, w_down; everything in `kind` if given."""
    leaves = [t.detach().to(kind or t.dtype).requires_grad_() for t in (x, weights, w_gate_up, w_down)]
    out = run(leaves[0], ids, leaves[1], *leaves[2:])
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


def op(backend):
    return lambda x, ids, weights, gu, down: moe_mlp(x, Routing.from_topk(ids, weights, gu.shape[0]), gu, down, backend=backend)


CASES = [  # tokens, experts, top_k, hidden, width, experts in use
    (1, 1, 1, 1, 1, None),
    (1, 8, 2, 64, 32, None),
    (0, 4, 2, 8, 8, None),
    (9, 6, 2, 8, 4, None),
    (33, 16, 4, 70, 37, None),
    (40, 5, 2, 130, 66, [1, 3]),
    (500, 3, 1, 64, 48, [2]),
    (170, 4, 2, 96, 40, None),
]


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(backend, dtype, case):
    args = inputs(*case[:5], dtype, case[5])
    grad = torch.randn(case[0], case[3]).to(dtype)
    ours = gradients(op(backend), *args, grad)
    same, exact = gradients(official, *args, grad), gradients(official, *args, grad, torch.float64)
    for name, *values in zip(("out", "grad_x", "grad_weights", "grad_w_gate_up", "grad_w_down"), ours, same, exact, strict=True):
        assert_as_exact_as(*values, name=name)
    unused = set(range(case[1])) - set(args[1].unique().tolist())
    assert not any(ours[i][e].any() for i in (3, 4) for e in unused)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden,width", [(64, 32), (130, 70), (33, 9)])
def test_every_number_of_rows(dtype, hidden, width):
    """Expert e has e rows: dot products, packed tokens, whole vectors of them and the rest, and packed weights give one answer."""
    ids = torch.arange(50).repeat_interleave(torch.arange(50))
    ids = ids[torch.randperm(len(ids))][:, None].int()
    x, _, weights, w_gate_up, w_down = inputs(len(ids), 50, 1, hidden, width, dtype)
    ours, same = op("native")(x, ids, weights, w_gate_up, w_down), official(x, ids, weights, w_gate_up, w_down)
    exact = official(x.double(), ids, weights.double(), w_gate_up.double(), w_down.double())
    for expert in range(1, 50):
        rows = ids[:, 0] == expert
        assert_as_exact_as(ours[rows], same[rows], exact[rows], name=f"{expert} rows")


@pytest.mark.parametrize("backend", NAMES)
def test_rounds_as_the_official_code(backend):
    """bf16: equal to the official order but for rare last bits of silu, and not to orders that round elsewhere."""
    args = inputs(64, 4, 4, 128, 64, torch.bfloat16)
    x, ids, weights, w_gate_up, w_down = args
    out = op(backend)(*args)
    assert (out != official(*args)).float().mean() < 0.02
    unrounded = official(x.float(), ids, weights, w_gate_up.float(), w_down.float()).bfloat16()
    assert (out != unrounded).float().mean() > 0.1


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_selections_are_exact(backend, dtype):
    """One-hot gates that saturate silu, integer ups and downs: gather, experts' rows and the combine show any wrong index."""
    tokens, experts, top_k, hidden, width = 50, 6, 3, 40, 24
    x, ids, _, w_gate_up, w_down = inputs(tokens, experts, top_k, hidden, width, torch.float32)
    x, weights = torch.randint(-2, 3, x.shape).float(), torch.tensor([1.0, 2.0, 4.0]).expand(tokens, top_k).contiguous()
    x[:, 0] = 1
    w_gate_up = torch.randint(-1, 2, w_gate_up.shape).float()
    w_gate_up[:, :width] = 0
    w_gate_up[:, :width, 0] = 32.0  # silu(32) == 32 in both dtypes
    w_gate_up[:, width:] *= (torch.rand(experts, width, hidden) < 0.1).float()
    w_down = torch.randint(-1, 2, w_down.shape).float() * (torch.rand(w_down.shape) < 0.2).float()
    up = torch.einsum("th,eih->tei", x, w_gate_up[:, width:])
    outputs = torch.einsum("tei,ehi->teh", 32 * up, w_down)
    expected = (outputs.gather(1, ids.long()[..., None].expand(-1, -1, hidden)) * weights[..., None]).sum(1)
    out = op(backend)(x.to(dtype), ids, weights, w_gate_up.to(dtype), w_down.to(dtype))
    assert torch.equal(out, expected.to(dtype))


@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 6),
    hidden=st.integers(1, 70),
    width=st.integers(1, 40),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_backends_agree(tokens, experts, hidden, width, data):
    args = inputs(tokens, experts, data.draw(st.integers(1, experts)), hidden, width, torch.float32)
    grad = torch.randn(tokens, hidden)
    for native, reference in zip(*(gradients(op(name), *args, grad) for name in ("native", "reference")), strict=True):
        torch.testing.assert_close(native, reference, atol=3e-5, rtol=1e-5)


def test_outputs_wider_than_one_panel():
    """The buffer of experts' outputs holds a part of the columns at a time when there are many slots."""
    args, grad = inputs(1100, 8, 4, 3850, 2, torch.float32), torch.randn(1100, 3850)
    exact = gradients(official, *args, grad, torch.float64)
    for values in zip(*(gradients(op(name), *args, grad) for name in ("native", "reference")), exact, strict=True):
        assert_as_exact_as(*values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype, num_threads):
    args, grad = inputs(120, 5, 3, 144, 70, dtype), torch.randn(120, 144).to(dtype)
    torch.set_num_threads(1)
    expected = gradients(op("native"), *args, grad)
    torch.set_num_threads(num_threads)
    for _ in range(2):
        ours = gradients(op("native"), *args, grad)
        assert all(torch.equal(p, q) for p, q in zip(ours, expected, strict=True))


@pytest.mark.parametrize("backend", NAMES)
def test_a_token_may_name_an_expert_twice(backend):
    x, _, _, w_gate_up, w_down = inputs(3, 4, 1, 16, 8, torch.float32)
    twice = op(backend)(x, torch.tensor([[2, 2]] * 3).int(), torch.tensor([[0.25, 0.5]] * 3), w_gate_up, w_down)
    once = op(backend)(x, torch.tensor([[2]] * 3).int(), torch.tensor([[0.75]] * 3), w_gate_up, w_down)
    torch.testing.assert_close(twice, once)


@pytest.mark.parametrize("backend", NAMES)
def test_non_contiguous_inputs(backend):
    x, ids, weights, w_gate_up, w_down = inputs(20, 4, 2, 32, 16, torch.float32)
    strided = x.T.contiguous().T, ids, weights.T.contiguous().T, w_gate_up.mT.contiguous().mT, w_down.mT.contiguous().mT
    assert not any(t.is_contiguous() for i, t in enumerate(strided) if i != 1)
    torch.testing.assert_close(op(backend)(*strided), official(x, ids, weights, w_gate_up, w_down))


@pytest.mark.parametrize("dtype", DTYPES)
def test_keeps_only_x_and_the_pre_activation(dtype):
    args = inputs(12, 4, 2, 32, 24, dtype)
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in args]
    routing = Routing.from_topk(leaves[1], leaves[2], 4)
    given, kept = {t.data_ptr() for t in (*leaves, *routing)}, []

    def pack(t):
        if t.data_ptr() not in given:
            kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        moe_mlp(leaves[0], routing, *leaves[3:], backend="native")
    assert kept == [(24, 48)]
    with torch.inference_mode():  # nothing at all
        raw = [leaves[0], *routing[1:], *leaves[3:]]
        out, pre_activation = torch.ops.llada_kernels.moe_mlp(*raw, False)
        assert pre_activation.shape == (0, 48)
    assert torch.equal(out, moe_mlp(leaves[0], routing, *leaves[3:], backend="native"))


def test_frozen_weights_get_no_gradient():
    x, ids, weights, w_gate_up, w_down = inputs(12, 4, 2, 32, 24, torch.float32)
    x.requires_grad_()
    results = []
    for run in (op("native"), official):
        (grad,) = torch.autograd.grad(run(x, ids, weights, w_gate_up, w_down).square().sum(), x)
        results.append(grad)
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    w_down.requires_grad_()
    results = [torch.autograd.grad(run(x.detach(), ids, weights, w_gate_up, w_down).sum(), w_down)[0] for run in (op("native"), official)]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_gradcheck():
    x, ids, weights, w_gate_up, w_down = inputs(5, 3, 2, 4, 3, torch.float64)
    leaves = [t.double().requires_grad_() for t in (x, weights, w_gate_up, w_down)]
    assert torch.autograd.gradcheck(lambda x, w, gu, down: op("reference")(x, ids, w, gu, down), leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_contract(dtype):
    x, ids, weights, w_gate_up, w_down = inputs(6, 4, 2, 16, 8, dtype)
    routing = Routing.from_topk(ids, weights, 4)
    floats = [t.requires_grad_() for t in (x, weights, w_gate_up, w_down)]
    args = (floats[0], floats[1], routing.offsets, routing.permutation, *floats[2:], True)
    torch.library.opcheck(torch.ops.llada_kernels.moe_mlp, args)


@pytest.mark.parametrize("backend", NAMES)
def test_compiles_without_graph_breaks(backend):
    x, ids, weights, w_gate_up, w_down = inputs(10, 4, 2, 16, 8, torch.float32)
    leaves = [t.requires_grad_() for t in (x, weights, w_gate_up, w_down)]

    def run(x, weights, w_gate_up, w_down):
        return op(backend)(x, ids, weights, w_gate_up, w_down).sin()

    out, exact = torch.compile(run, fullgraph=True)(*leaves), official(x, ids, weights, w_gate_up, w_down).sin()
    torch.testing.assert_close(out, exact, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (out, exact)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_errors():
    x, ids, weights, w_gate_up, w_down = inputs(6, 4, 2, 16, 8, torch.float32)
    routing = Routing.from_topk(ids, weights, 4)
    for text, args in [
        (r"w_down: expected shape \(4, 16, 8\), got \(4, 16, 9\)", (x, routing, w_gate_up, torch.randn(4, 16, 9))),
        (r"w_gate_up: expected shape \(4, 16, 16\), got \(4, 16, 15\)", (x, routing, w_gate_up[..., :15], w_down)),
        (r"w_gate_up: expected shape \(E, 2I, H\) with E of at least 1, got \(4, 15, 16\)", (x, routing, w_gate_up[:, :15], w_down)),
        (r"w_gate_up: expected dtype torch.float32 \(that of x\), got torch.bfloat16", (x, routing, w_gate_up.bfloat16(), w_down)),
        (r"routing.topk_ids: expected shape \(5, \*\), got \(6, 2\)", (x[:5], routing, w_gate_up, w_down)),
        (r"routing.offsets: expected shape \(4,\), got \(5,\)", (x, routing, w_gate_up[:3], w_down[:3])),
        (
            r"routing.offsets: expected to start at 0 and end at 12 \(the number of rows\), got 0 and 0",
            (x, routing._replace(offsets=torch.zeros_like(routing.offsets)), w_gate_up, w_down),
        ),
        (r"x: expected 2 dimensions, got shape \(1, 6, 16\)", (x[None], routing, w_gate_up, w_down)),
    ]:
        with pytest.raises(ValueError, match=text):
            moe_mlp(*args)
    with pytest.raises(TypeError, match="routing: expected a Routing, got tuple"):
        moe_mlp(x, tuple(routing), w_gate_up, w_down)
    doubled = routing._replace(permutation=torch.zeros_like(routing.permutation))
    for name in NAMES:
        with pytest.raises(ValueError, match="permutation: expected each of 0 to 11 once, got"):
            moe_mlp(x, doubled, w_gate_up, w_down, backend=name)
    with pytest.raises(ValueError, match="native serves topk_weights in float32, got torch.float64"):
        moe_mlp(x, routing._replace(topk_weights=weights.double()), w_gate_up, w_down, backend="native")


LEVELS = """
import torch
from llada_kernels.ops import grouped_gemm, moe_mlp, moe_routing, swiglu
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
    x, gate_up, down = torch.randn(70, 75).to(dtype), (torch.randn(8, 86, 75) / 8).to(dtype), (torch.randn(8, 75, 43) / 6).to(dtype)
    logits, results = torch.randn(70, 8), []
    for backend in ("native", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, logits, gate_up, down)]
        routing = moe_routing(leaves[1], None, 3, 2, 1, 2.5, backend=backend)
        rows = grouped_gemm(leaves[0], leaves[2][:1], torch.tensor([0, 70], dtype=torch.int32), backend=backend)
        out = moe_mlp(leaves[0], routing, *leaves[2:], backend=backend).sum() + swiglu(rows, backend=backend).sum()
        results.append([routing.topk_ids, *torch.autograd.grad(out, leaves)])
    for ours, theirs in zip(*results):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours / scale, theirs / scale, atol=tolerance, rtol=0)
"""


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated"])
def test_every_cpu_level(level):
    """The machine's other instruction levels, each in a process of its own."""
    environment = {**os.environ, "LLADA_KERNELS_CPU": level, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LEVELS], env=environment, capture_output=True, text=True)
    if "this machine has no" in done.stderr:
        pytest.skip(f"this machine has no {level}")
    assert done.returncode == 0, done.stderr
