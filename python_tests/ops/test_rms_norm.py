from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_kernels.ops import rope
from llada_kernels.ops.rms_norm import BACKENDS, rms_norm
from llada_kernels.testing import assert_as_exact_as

from ..backends import cpu_backends, everywhere

NAMES = cpu_backends(BACKENDS)


def plain(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Direct transcription in the dtype of x."""
    return weight * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps))


@everywhere(BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (2, 5, 33), (300, 64), (7, 2048), (0, 8), (3, 0)])
def test_values_and_gradients(backend, device, dtype, shape):
    x, weight, grad = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype), torch.randn(shape, dtype=dtype)
    results = []
    for run, kind in ((rms_norm, dtype), (plain, dtype), (plain, torch.float64)):
        a, w = x.detach().to(kind).clone().requires_grad_(), weight.to(kind).clone().requires_grad_()
        y = run(a, w, 1e-6, backend=backend) if run is rms_norm else run(a, w, 1e-6)
        y.backward(grad.to(kind))
        results.append((y.detach(), a.grad, w.grad))
    for ours, same, exact, name in zip(*results, ("y", "grad_x", "grad_weight"), strict=True):
        assert_as_exact_as(ours, same, exact, name=name)


@everywhere(BACKENDS)
def test_rounds_before_it_scales(backend, device):
    """The official order: cast to the dtype of x, then multiply by the weight. The other order differs in bf16."""
    x, weight = torch.randn(64, 128, dtype=torch.bfloat16), torch.randn(128, dtype=torch.bfloat16)
    z = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    expected, other_order = weight * z.bfloat16(), (weight.float() * z).bfloat16()
    y = rms_norm(x, weight, backend=backend)
    assert (y != expected).float().mean() < 0.01  # a different rounding of 1/sqrt may flip a last bit
    assert (y != other_order).float().mean() > 0.1


@everywhere(BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (2, 5, 33), (300, 64), (0, 8)])
def test_with_a_residual_it_is_bitwise_two_steps(backend, device, dtype, shape):
    """The sum is rounded before it is normalised, and gradients are those that autograd adds up over the two uses of the sum."""
    inputs = [torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)]
    grad_y, grad_total = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    results = []
    for fused in (True, False):
        x, residual, weight = (t.clone().requires_grad_() for t in inputs)
        if fused:
            y, total = rms_norm(x, weight, 1e-6, residual, backend=backend)
        else:
            total = x + residual
            y = rms_norm(total, weight, 1e-6, backend=backend)
        torch.autograd.backward([y, total], [grad_y, grad_total])
        results.append((y.detach(), total.detach(), x.grad, residual.grad, weight.grad))
    for name, ours, expected in zip(("y", "total", "grad_x", "grad_residual", "grad_weight"), *results, strict=True):
        assert torch.equal(ours, expected), name
    if backend == "native" and 0 not in shape:  # and right: against the formula in fp64
        x, residual, weight = (t.double().requires_grad_() for t in inputs)
        y = plain(x + residual, weight, 1e-6)
        torch.autograd.backward([y, x + residual], [grad_y.double(), grad_total.double()])
        tolerance = 1e-5 if dtype == torch.float32 else 0.03
        for ours, exact in zip(results[0][2:], (x.grad, residual.grad, weight.grad), strict=True):
            assert (ours.double() - exact).abs().max() <= tolerance * max(1.0, float(exact.abs().max()))


def test_only_one_of_the_two_results_is_used():
    x, residual, weight = torch.randn(5, 24), torch.randn(5, 24), torch.randn(24)
    for which in (0, 1):
        grads = []
        for backend in NAMES:
            a, b = x.clone().requires_grad_(), residual.clone().requires_grad_()
            rms_norm(a, weight, 1e-6, b, backend=backend)[which].square().sum().backward()
            grads += [a.grad, b.grad]
        for grad in grads[1:]:
            torch.testing.assert_close(grad, grads[0], atol=1e-5, rtol=1e-5)


@given(rows=st.integers(0, 9), width=st.integers(1, 70))
@settings(max_examples=30, deadline=None)
def test_backends_agree(rows, width):
    x, weight = torch.randn(rows, width), torch.randn(width)
    torch.testing.assert_close(rms_norm(x, weight, backend="native"), rms_norm(x, weight, backend="reference"), atol=2e-6, rtol=2e-6)


def test_same_bits_for_any_number_of_threads():
    x, weight, grad = torch.randn(1000, 96), torch.randn(96), torch.randn(1000, 96)
    seen, before = [], torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y, total = rms_norm(a, w, 1e-6, grad, backend="native")
        torch.autograd.backward([y, total], [grad, grad])
        seen.append((y, total, a.grad, w.grad))
    torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(p, q) for p, q in zip(seen[0], other, strict=True))


def test_non_contiguous_input():
    x, weight = torch.randn(8, 6, 10).transpose(0, 2), torch.randn(16)[::2]
    torch.testing.assert_close(rms_norm(x, weight, backend="native"), rms_norm(x, weight, backend="reference"))


def test_gradcheck():
    x, weight = torch.randn(3, 7, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, w: rms_norm(a, w, 1e-3, backend="reference"), (x, weight))
    residual = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, w, r: rms_norm(a, w, 1e-3, r, backend="reference"), (x, weight, residual))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_contract(dtype):
    x, weight = torch.randn(4, 32, dtype=dtype, requires_grad=True), torch.randn(32, dtype=dtype, requires_grad=True)
    residual = torch.randn(4, 32, dtype=dtype, requires_grad=True)
    for last in (None, residual):
        torch.library.opcheck(torch.ops.llada_kernels.rms_norm, (x, weight, 1e-6, last))


def test_compiles_without_graph_breaks():
    x, weight = torch.randn(4, 32, requires_grad=True), torch.randn(32)
    compiled = torch.compile(lambda a: rms_norm(a, weight, backend="native").sin(), fullgraph=True)
    torch.testing.assert_close(compiled(x), rms_norm(x, weight, backend="reference").sin())
    compiled(x).sum().backward()
    assert x.grad is not None
    both = torch.compile(lambda a, r: rms_norm(a, weight, 1e-6, r, backend="native"), fullgraph=True)
    for ours, expected in zip(both(x, x * 2), rms_norm(x, weight, 1e-6, x * 2, backend="native"), strict=True):
        assert torch.equal(ours, expected)


def test_errors():
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"weight: expected shape \(8,\), got \(7,\)"):
        rms_norm(x, torch.randn(7))
    with pytest.raises(ValueError, match="weight: expected dtype torch.float32"):
        rms_norm(x, torch.randn(8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"residual: expected shape \(4, 8\), got \(8,\)"):
        rms_norm(x, torch.randn(8), 1e-6, torch.randn(8))
    with pytest.raises(ValueError, match="residual: expected dtype torch.float32"):
        rms_norm(x, torch.randn(8), 1e-6, x.bfloat16())
    with pytest.raises(TypeError, match="x: expected a torch.Tensor, got list"):
        rms_norm([1.0], torch.randn(8))
    with pytest.raises(ValueError, match="native serves float32, bfloat16, got torch.float64"):
        rms_norm(x.double(), torch.randn(8).double(), backend="native")
    with pytest.raises(ValueError, match="backend: expected one of native, triton, reference, got 'magic'"):
        rms_norm(x, torch.randn(8), backend="magic")


def test_eps_is_a_finite_number_of_at_least_0():
    x, w = torch.ones(4, 8), torch.ones(8)
    for eps in (-1, -1e-9, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"eps: expected a finite number of at least 0, got {eps}"):
            rms_norm(x, w, eps)
        with pytest.raises(ValueError, match=f"eps: expected a finite number of at least 0, got {eps}"):
            rope(x[:, None], torch.ones(4, 8), torch.ones(4, 8), q_weight=w, eps=eps)
    for eps in (True, "1e-6", None):
        with pytest.raises(TypeError, match=f"eps: expected a number, got {type(eps).__name__}"):
            rms_norm(x, w, eps)
    assert torch.equal(rms_norm(x, w, 0), rms_norm(x, w, 0.0))
