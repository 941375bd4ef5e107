from __future__ import annotations

import pytest
import torch

from llada_kernels.ops import explain
from llada_kernels.ops.rms_norm import rms_norm
from llada_kernels.ops.rope import BACKENDS, rope, rope_tables

from ..backends import cpu_backends, everywhere

NAMES = cpu_backends(BACKENDS)
SHAPES = [  # tokens, heads, head_dim, rotary_dim
    (5, 3, 128, 64),
    (4, 2, 64, 64),
    (7, 1, 24, 10),
    (2, 5, 8, 2),
    (3, 2, 40, 34),
    (300, 2, 16, 8),
    (0, 2, 16, 8),
    (2, 0, 16, 8),
    (3, 2, 16, 0),
]


def official(x, cos, sin):
    """The published model's code (q_embed = q * cos + rotate_half(q) * sin), in the dtype of x."""
    n = cos.shape[1]
    turning, passing = x[..., :n], x[..., n:]
    rotated = torch.cat((-turning[..., n // 2 :], turning[..., : n // 2]), dim=-1)
    return torch.cat(((turning * cos[:, None]) + (rotated * sin[:, None]), passing), dim=-1)


def complex_rotation(x, positions, rotary_dim, theta):
    """Pairs (i, i + R/2) as complex numbers times e^(i * angle), in fp64."""
    half = rotary_dim // 2
    x = x.double()
    angle = positions.double()[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[..., :half], x[..., half:rotary_dim]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((z.real, z.imag, x[..., rotary_dim:]), dim=-1)


@everywhere(BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_bitwise_the_official_code_and_its_gradient(backend, device, dtype, shape):
    tokens, heads, dim, rotary = shape
    x, grad = torch.randn(tokens, heads, dim, dtype=dtype), torch.randn(tokens, heads, dim, dtype=dtype)
    cos, sin = torch.randn(tokens, rotary, dtype=dtype), torch.randn(tokens, rotary, dtype=dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = rope(a, cos, sin, backend=backend), official(b, cos, sin)
    assert torch.equal(y, expected)
    y.backward(grad)
    expected.backward(grad)
    assert torch.equal(a.grad, b.grad)


@everywhere(BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.03)])
def test_turns_pairs_by_the_angle_of_their_position(backend, device, dtype, tolerance):
    positions = torch.tensor([0, 1, 2, 5, 31, 3, 0])
    x = torch.randn(7, 2, 32, dtype=dtype)
    cos, sin = rope_tables(positions, 16, 10000.0, dtype)
    exact = complex_rotation(x, positions, 16, 10000.0)
    torch.testing.assert_close(rope(x, cos, sin, backend=backend).double(), exact, atol=tolerance, rtol=tolerance)


def test_tables_are_computed_in_fp32_and_rounded_once():
    positions = torch.tensor([[0, 3, 16383]])
    cos, sin = rope_tables(positions, 64, 600000.0, torch.float32)
    assert cos.shape == sin.shape == (1, 3, 64) and torch.equal(cos[..., :32], cos[..., 32:])
    angle = positions.double()[..., None] * 600000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    bound = 1e-6 + angle.abs() * 2e-7  # fp32 angles
    assert ((cos[..., :32] - angle.cos()).abs() <= bound).all() and ((sin[..., :32] - angle.sin()).abs() <= bound).all()
    for dtype in (torch.bfloat16, torch.float64):
        rounded = rope_tables(positions, 64, 600000.0, dtype)
        assert torch.equal(rounded[0], cos.to(dtype)) and torch.equal(rounded[1], sin.to(dtype))


def test_same_bits_for_any_number_of_threads():
    x, (cos, sin) = torch.randn(3000, 4, 32), rope_tables(torch.arange(3000), 16, 1e4, torch.float32)
    seen, before = [], torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        seen.append(rope(x, cos, sin, backend="native"))
    torch.set_num_threads(before)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@everywhere(BACKENDS)
def test_non_contiguous_input_and_gradient(backend, device):
    qkv = torch.randn(6, 8, 16, requires_grad=True)
    cos, sin = (t.T.contiguous().T for t in rope_tables(torch.arange(6), 8, 1e4, torch.float32))
    y = rope(qkv[:, 2:5], cos, sin, backend=backend)
    assert torch.equal(y, official(qkv[:, 2:5], cos, sin))
    y.transpose(0, 1).sum(0).sum().backward()
    assert qkv.grad[:, 2:5].abs().sum() > 0 and qkv.grad[:, :2].abs().sum() == 0


@everywhere(BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 2, 130, 64), (1, 1, 1, 0)])
def test_queries_and_keys_in_one_call_are_bitwise_norm_and_rope_of_each(backend, device, dtype, normed, shape):
    """Views of one QKV product, half as many KV heads as heads; outputs, gradients, and gradients of the weights."""
    tokens, heads, dim, rotary = shape
    kv = max(heads // 2, 1)
    qkv = torch.randn(tokens, heads + 2 * kv, dim, dtype=dtype)
    weights = [torch.randn(dim, dtype=dtype) for _ in range(2)]
    cos, sin = torch.randn(tokens, rotary, dtype=dtype), torch.randn(tokens, rotary, dtype=dtype)
    grads = torch.randn(tokens, heads, dim, dtype=dtype), torch.randn(tokens, kv, dim, dtype=dtype)
    results = []
    for fused in (True, False):
        x, w = qkv.clone().requires_grad_(), [t.clone().requires_grad_() for t in weights]
        q, k, _ = x.split([heads, kv, kv], dim=1)
        if fused:
            q, k = rope(q, cos, sin, k, *(w if normed else ()), eps=1e-3, backend=backend)
        else:
            if normed:
                q, k = rms_norm(q, w[0], 1e-3, backend=backend), rms_norm(k, w[1], 1e-3, backend=backend)
            q, k = official(q, cos, sin), official(k, cos, sin)
        torch.autograd.backward([q, k], grads)
        results.append([q.detach(), k.detach(), x.grad, *([t.grad for t in w] if normed else [])])
    assert results[0][0].is_contiguous() and results[0][1].is_contiguous()
    for name, ours, expected in zip(("q", "k", "grad_qkv", "grad_q_weight", "grad_k_weight"), *results, strict=False):
        assert torch.equal(ours, expected), name


@everywhere(BACKENDS)
def test_queries_of_the_first_tokens_only(backend, device):
    q, k, weight = torch.randn(300, 3, 16), torch.randn(700, 2, 16), torch.randn(16)
    cos, sin = rope_tables(torch.arange(700), 8, 1e4, torch.float32)
    for weights in ((None, None), (weight, weight * 2)):
        ours = rope(q, cos, sin, k, *weights, backend=backend)
        alone = rope(q, cos[:300], sin[:300], None, weights[0], backend=backend), rope(k, cos, sin, None, weights[1], backend=backend)
        assert torch.equal(ours[0], alone[0]) and torch.equal(ours[1], alone[1])


def test_fused_norms_have_the_same_bits_for_any_number_of_threads():
    cos, sin = rope_tables(torch.arange(900), 16, 1e4, torch.float32)
    inputs = [torch.randn(900, 4, 32), torch.randn(900, 2, 32), torch.randn(32), torch.randn(32)]
    seen, before = [], torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        q, k, *weights = (t.clone().requires_grad_() for t in inputs)
        out = rope(q, cos, sin, k, *weights, backend="native")
        torch.autograd.backward(out, [t.sin() for t in inputs[:2]])
        seen.append([*out, q.grad, k.grad, *(w.grad for w in weights)])
    torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_gradcheck():
    x, (cos, sin) = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True), rope_tables(torch.arange(3), 4, 10.0, torch.float64)
    assert torch.autograd.gradcheck(lambda a: rope(a, cos, sin, backend="reference"), (x,))
    k, *weights = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((3, 1, 6), (6,), (6,)))
    assert torch.autograd.gradcheck(lambda a, *b: rope(a, cos, sin, *b, eps=1e-3, backend="reference"), (x, k, *weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_contract(dtype):
    cos, sin = rope_tables(torch.arange(4), 8, 1e4, dtype)
    qkv = torch.randn(4, 4, 16, dtype=dtype, requires_grad=True)
    q, k, weight = qkv[:3, :2], qkv[:, 2:3], torch.randn(16, dtype=dtype, requires_grad=True)
    for arguments in ((qkv, None, cos, sin, None, None), (q, k, cos, sin, None, None), (q, k, cos, sin, weight, weight)):
        arguments = tuple(t if t is None else t.detach().requires_grad_(t.requires_grad) for t in arguments)
        torch.library.opcheck(torch.ops.llada_kernels.rope, (*arguments, 1e-6))


def test_compiles_without_graph_breaks():
    x, (cos, sin) = torch.randn(4, 2, 16, requires_grad=True), rope_tables(torch.arange(4), 8, 1e4, torch.float32)
    compiled = torch.compile(lambda a: rope(a, cos, sin, backend="native") * 2, fullgraph=True)
    y = compiled(x)
    assert torch.equal(y, official(x, cos, sin) * 2)
    y.sum().backward()
    assert x.grad is not None
    weight = torch.randn(16, requires_grad=True)
    both = torch.compile(lambda a: rope(a[:, :1], cos, sin, a[:, 1:], weight, weight), fullgraph=True)
    for ours, expected in zip(both(x), rope(x[:, :1], cos, sin, x[:, 1:], weight, weight), strict=True):
        assert torch.equal(ours, expected)


def test_errors_and_choice_of_backend(capsys):
    x, (cos, sin) = torch.randn(4, 2, 16), rope_tables(torch.arange(4), 8, 1e4, torch.float32)
    with pytest.raises(ValueError, match=r"sin: expected shape \(4, 8\), got \(4, 6\)"):
        rope(x, cos, sin[:, :6])
    with pytest.raises(ValueError, match=r"cos: expected shape \(4, 8\), got \(3, 8\)"):
        rope(x, cos[:3], sin)
    with pytest.raises(ValueError, match="cos: expected an even number of columns, at most head_dim 4, got 8"):
        rope(x[..., :4], cos, sin)
    with pytest.raises(ValueError, match="cos: expected dtype torch.float32"):
        rope(x, cos.bfloat16(), sin)
    with pytest.raises(ValueError, match="q: expected 3 dimensions"):
        rope(x[0], cos, sin)
    with pytest.raises(ValueError, match="native treats cos and sin as constants"):
        rope(x, cos.clone().requires_grad_(), sin, backend="native")
    with pytest.raises(ValueError, match=r"q: expected at most 3 tokens \(those of k\), got 4"):
        rope(x, cos[:3], sin[:3], x[:3])
    with pytest.raises(ValueError, match=r"k: expected shape \(\*, \*, 16\), got \(4, 2, 8\)"):
        rope(x, cos, sin, x[..., :8])
    for weights in ((torch.ones(16), None), (None, torch.ones(16))):
        with pytest.raises(ValueError, match="k_weight: expected one exactly when there are k and q_weight"):
            rope(x, cos, sin, x, *weights)
    with pytest.raises(ValueError, match=r"q_weight: expected shape \(16,\), got \(8,\)"):
        rope(x, cos, sin, None, torch.ones(8))
    with pytest.raises(ValueError, match="rotary_dim: expected an even number above 0, got 7"):
        rope_tables(torch.arange(4), 7, 1e4, torch.float32)
    with pytest.raises(ValueError, match="theta: expected a number above 0"):
        rope_tables(torch.arange(4), 8, 0.0, torch.float32)
    assert "native     chosen" in explain("rope", x, cos, sin)
    assert "reference  chosen" in explain("rope", x.double(), cos.double(), sin.double())
    capsys.readouterr()
