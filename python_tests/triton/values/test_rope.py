from __future__ import annotations

import pytest
import torch

from llada_kernels.ops.rope import rope
from llada_kernels.testing import assert_as_exact_as

from ...ops.test_rope import official

SHAPES = [  # tokens, heads, head_dim, rotary_dim
    *[(5, 3, 128, 64), (4, 2, 64, 64), (7, 1, 24, 10), (2, 5, 8, 2), (3, 2, 40, 34), (70, 2, 16, 8)],
    *[(0, 2, 16, 8), (2, 0, 16, 8), (3, 2, 16, 0)],
]


def normed(x, weight, eps):
    return weight * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps))


@pytest.mark.parametrize("shape", SHAPES)
def test_bitwise_the_official_code_and_its_gradient(shape, dtype, device):
    tokens, heads, dim, rotary = shape
    x, grad = (torch.randn(tokens, heads, dim, dtype=dtype, device=device) for _ in range(2))
    cos, sin = (torch.randn(tokens, rotary, dtype=dtype, device=device) for _ in range(2))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = rope(a, cos, sin, backend="triton"), official(b, cos, sin)
    assert torch.equal(y, expected)
    y.backward(grad)
    expected.backward(grad)
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(("tokens", "queries"), [(9, 9), (9, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("heads", [(4, 2, 64, 32), (3, 1, 24, 10)])
def test_queries_and_keys_with_norms(tokens, queries, heads, dtype, device):
    q_heads, k_heads, dim, rotary = heads
    fused = torch.randn(tokens, (q_heads + k_heads) * dim, dtype=dtype, device=device)
    cos, sin = (torch.randn(tokens, rotary, dtype=dtype, device=device) for _ in range(2))
    weights = [torch.randn(dim, dtype=dtype, device=device) for _ in range(2)]
    grads = [torch.randn(n, h, dim, dtype=dtype, device=device) for n, h in ((queries, q_heads), (tokens, k_heads))]

    def ours(x, a, b, cos, sin):
        q, k = x[:queries, : q_heads * dim].view(queries, q_heads, dim), x[:, q_heads * dim :].view(tokens, k_heads, dim)
        return rope(q, cos, sin, k, a, b, 1e-5, backend="triton")

    def exact(x, a, b, cos, sin):
        q, k = x[:queries, : q_heads * dim].view(queries, q_heads, dim), x[:, q_heads * dim :].view(tokens, k_heads, dim)
        return official(normed(q, a, 1e-5), cos[:queries], sin[:queries]), official(normed(k, b, 1e-5), cos, sin)

    results = []
    for run, kind in ((ours, dtype), (exact, dtype), (exact, torch.float64)):
        leaves = [t.to(kind).clone().requires_grad_() for t in (fused, *weights)]
        outs = run(*leaves, cos.to(kind), sin.to(kind))
        torch.autograd.backward(list(outs), [g.to(kind) for g in grads])
        results.append([*(o.detach() for o in outs), *(leaf.grad for leaf in leaves)])
    for name, a, b, c in zip(("q", "k", "grad", "grad of q_weight", "grad of k_weight"), *results, strict=True):
        assert_as_exact_as(a, b, c, name=name)


def test_without_norms_queries_and_keys_are_bitwise_apart(dtype, device):
    q, k = torch.randn(5, 4, 32, dtype=dtype, device=device), torch.randn(9, 2, 32, dtype=dtype, device=device)
    cos, sin = (torch.randn(9, 16, dtype=dtype, device=device) for _ in range(2))
    both = rope(q, cos, sin, k, backend="triton")
    assert torch.equal(both[0], official(q, cos[:5], sin[:5])) and torch.equal(both[1], official(k, cos, sin))


def test_same_bits_twice(dtype, device):
    q, k = torch.randn(90, 4, 32, dtype=dtype, device=device), torch.randn(90, 2, 32, dtype=dtype, device=device)
    cos, sin = (torch.randn(90, 16, dtype=dtype, device=device) for _ in range(2))
    weights = [torch.randn(32, dtype=dtype, device=device) for _ in range(2)]
    seen = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (q, k, *weights)]
        outs = rope(leaves[0], cos, sin, leaves[1], leaves[2], leaves[3], backend="triton")
        torch.autograd.backward(list(outs), [torch.ones_like(o) for o in outs])
        seen.append([*(o.detach() for o in outs), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_operator_contract(device):
    q, k = torch.randn(3, 4, 32, device=device, requires_grad=True), torch.randn(3, 2, 32, device=device, requires_grad=True)
    cos, sin, weight = (torch.randn(n, device=device) for n in ((3, 16), (3, 16), (32,)))
    torch.library.opcheck(torch.ops.llada_kernels_triton.rope, (q, k, cos, sin, weight.requires_grad_(), weight.detach() + 1, 1e-6))
    torch.library.opcheck(torch.ops.llada_kernels_triton.rope, (q, None, cos, sin, None, None, 1e-6))
