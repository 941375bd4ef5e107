from __future__ import annotations

import pytest
import torch

from llada_kernels.ops.rms_norm import rms_norm
from llada_kernels.testing import assert_as_exact_as

from ...ops.test_rms_norm import plain

SHAPES = [(1, 1), (3, 16), (2, 5, 33), (70, 64), (3, 2048), (2, 4100), (0, 8), (3, 0)]


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype, device):
    x, grad = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    weight = torch.randn(shape[-1], dtype=dtype, device=device)
    results = []
    for run, kind in ((lambda a, w, e: rms_norm(a, w, e, backend="triton"), dtype), (plain, dtype), (plain, torch.float64)):
        a, w = x.to(kind).clone().requires_grad_(), weight.to(kind).clone().requires_grad_()
        y = run(a, w, 1e-6)
        y.backward(grad.to(kind))
        results.append((y.detach(), a.grad, w.grad))
    for ours, same, exact, name in zip(*results, ("y", "grad_x", "grad_weight"), strict=True):
        assert_as_exact_as(ours, same, exact, name=name)


@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 33), (70, 64), (3, 2048), (0, 8)])
def test_with_a_residual_it_is_bitwise_two_steps(shape, dtype, device):
    inputs = [torch.randn(n, dtype=dtype, device=device) for n in (shape, shape, shape[-1])]
    grad_y, grad_total = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    results = []
    for fused in (True, False):
        x, residual, weight = (t.clone().requires_grad_() for t in inputs)
        if fused:
            y, total = rms_norm(x, weight, 1e-6, residual, backend="triton")
        else:
            total = x + residual
            y = rms_norm(total, weight, 1e-6, backend="triton")
        torch.autograd.backward([y, total], [grad_y, grad_total])
        results.append((y.detach(), total.detach(), x.grad, residual.grad, weight.grad))
    for name, ours, expected in zip(("y", "total", "grad_x", "grad_residual", "grad_weight"), *results, strict=True):
        assert torch.equal(ours, expected), name


def test_rounds_before_it_scales(dtype, device):
    x, weight = torch.randn(64, 128, dtype=dtype, device=device), torch.randn(128, dtype=dtype, device=device)
    z = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6)
    y = rms_norm(x, weight, backend="triton")
    if dtype == torch.float32:
        torch.testing.assert_close(y.double(), weight.double() * z, atol=1e-6, rtol=1e-6)
    else:
        assert (y != weight * z.to(dtype)).float().mean() < 0.01  # another rounding of 1/sqrt may flip a last bit
        assert (y != (weight.double() * z).to(dtype)).float().mean() > 0.05


def test_same_bits_twice_and_any_strides(dtype, device):
    x, weight = torch.randn(16, 6, 40, dtype=dtype, device=device).transpose(0, 2), torch.randn(32, dtype=dtype, device=device)[::2]
    grads = []
    for each in (x, x, x.contiguous()):
        a, w = each.detach().requires_grad_(), weight.detach().requires_grad_()
        y = rms_norm(a, w, backend="triton")
        y.backward(torch.ones_like(y))
        grads.append((y.detach(), a.grad, w.grad))
    for other in grads[1:]:
        assert all(torch.equal(p, q) for p, q in zip(grads[0], other, strict=True))


def test_more_rows_than_programs_take_at_once(device):
    """The weight's gradient is summed over several tiles per program."""
    x, weight = torch.randn(700, 16, device=device), torch.ones(16, device=device, requires_grad=True)
    rms_norm(x, weight, backend="triton").sum().backward()
    expected = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).sum(0)
    torch.testing.assert_close(weight.grad, expected, atol=1e-3, rtol=1e-5)


def test_operator_contract(device):
    x, weight = torch.randn(4, 32, device=device, requires_grad=True), torch.randn(32, device=device, requires_grad=True)
    for residual in (None, torch.randn(4, 32, device=device, requires_grad=True)):
        torch.library.opcheck(torch.ops.llada_kernels_triton.rms_norm, (x, weight, 1e-6, residual))


def test_refuses_rows_that_do_not_fit(device):
    with pytest.raises(ValueError, match="triton serves rows of up to 8192 elements, got 8193"):
        rms_norm(torch.zeros(1, 8193, device=device), torch.zeros(8193, device=device), backend="triton")
