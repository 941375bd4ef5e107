from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_kernels.ops.grouped_gemm import grouped_gemm
from llada_kernels.testing import assert_as_exact_as

from ...ops.test_grouped_gemm import offsets_of, plain

CASES = [  # rows per group, N, Kd: every tile family, its remainders, and none of them
    ([1], 1, 1),
    ([0, 3, 0, 0, 5, 1], 7, 5),
    ([0, 0], 4, 4),
    ([0, 40, 0], 33, 70),
    ([13, 1, 31, 8], 64, 128),
    ([60, 2, 0, 75], 130, 72),
    ([200, 0, 129], 144, 64),
]


def problem(counts, n, k, dtype, device):
    a, b, grad = torch.randn(sum(counts), k), torch.randn(len(counts), n, k) / k**0.5, torch.randn(sum(counts), n)
    return (t.to(device, dtype) for t in (a, b, grad))


def triton(a, b, counts):
    return grouped_gemm(a, b, offsets_of(counts).to(a.device), backend="triton")


@pytest.mark.parametrize("counts,n,k", CASES)
def test_values_and_gradients(counts, n, k, dtype, device):
    a, b, grad = problem(counts, n, k, dtype, device)
    results = []
    for run, kind in ((triton, dtype), (plain, dtype), (plain, torch.float64)):
        x, w = a.to(kind).clone().requires_grad_(), b.to(kind).clone().requires_grad_()
        y = run(x, w, counts)
        y.backward(grad.to(kind))
        results.append((y.detach(), x.grad, w.grad))
    for ours, same, exact, name in zip(*results, ("out", "grad_a", "grad_b"), strict=True):
        assert ours.dtype == dtype
        assert_as_exact_as(ours, same, exact, name=name)
    for group, count in enumerate(counts):
        assert count or not results[0][2][group].any()


@pytest.mark.parametrize("counts,n,k", [([5, 0, 9, 70], 40, 66), ([1, 2], 129, 130), ([150, 2], 20, 66)])
def test_small_integers_are_exact(counts, n, k, dtype, device):
    """Every product and partial sum is an integer that all dtypes hold: any indexing error shows as an inequality."""
    rows = sum(counts)
    a, b = torch.randint(-1, 2, (rows, k)).float(), torch.randint(-1, 2, (len(counts), n, k)).float()
    grad = torch.randint(-1, 2, (rows, n)).float()
    x, w = a.to(device, dtype).requires_grad_(), b.to(device, dtype).requires_grad_()
    out = triton(x, w, counts)
    out.backward(grad.to(device, dtype))
    group = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    assert torch.equal(out.float().cpu(), torch.einsum("rk,rnk->rn", a, b[group]))
    assert torch.equal(x.grad.float().cpu(), torch.einsum("rn,rnk->rk", grad, b[group]))
    assert torch.equal(w.grad.float().cpu(), torch.zeros_like(b).index_add(0, group, torch.einsum("rn,rk->rnk", grad, a)))


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=6), n=st.integers(1, 40), k=st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_any_groups(counts, n, k):
    a, b = torch.randn(sum(counts), k), torch.randn(len(counts), n, k)
    if torch.cuda.is_available():
        a, b = a.cuda(), b.cuda()
    torch.testing.assert_close(triton(a, b, counts), plain(a, b, counts), atol=2e-5, rtol=1e-5)


def test_infinities_stay_in_their_group(dtype, device):
    """Tiles reach beyond a group's rows; what lies there must not be multiplied, not even by zero."""
    a, b, grad = problem([3, 4], 5, 6, dtype, device)
    a[3:], grad[3:] = torch.nan, torch.inf
    x, w = a.requires_grad_(), b.requires_grad_()
    out = triton(x, w, [3, 4])
    out.backward(grad)
    assert out[:3].isfinite().all() and x.grad[:3].isfinite().all() and w.grad[0].isfinite().all()


def test_every_output_is_written(dtype, device, monkeypatch):
    """Fresh memory is all NaN: whatever a kernel leaves out would show."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        t = new_empty(self, *args, **kwargs)
        return t.fill_(torch.nan) if t.is_floating_point() else t

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    counts = [0, 20, 3]
    a, b, grad = problem(counts, 33, 34, dtype, device)
    out = torch.ops.llada_kernels_triton.grouped_gemm(a, b, offsets_of(counts).to(device))
    grads = torch.ops.llada_kernels_triton.grouped_gemm_backward(grad, a, b, offsets_of(counts).to(device), True, True)
    assert out.new_empty(1).isnan() and all(t.isfinite().all() for t in (out, *grads))


def test_same_bits_twice_and_any_strides(dtype, device):
    a, b = torch.randn(16, 9).T[::3].to(device, dtype), torch.randn(10, 16, 2).permute(2, 0, 1)[:, ::2].to(device, dtype)
    offsets = torch.tensor([7, 0, 1, 3], dtype=torch.int32, device=device)[1:]  # at 4 bytes, not 16
    y = grouped_gemm(a, b, offsets, backend="triton")
    assert torch.equal(y, grouped_gemm(a, b, offsets, backend="triton"))
    assert torch.equal(y, grouped_gemm(a.contiguous(), b.contiguous(), offsets.clone(), backend="triton"))


def test_only_one_operand_differentiable(device):
    a, b = torch.randn(5, 4, device=device), torch.randn(2, 3, 4, device=device)
    for wanted in (a, b):
        wanted.requires_grad_()
        (grad,) = torch.autograd.grad(triton(a, b, [2, 3]).sum(), wanted)
        torch.testing.assert_close(grad, torch.autograd.grad(plain(a, b, [2, 3]).sum(), wanted)[0])
        wanted.requires_grad_(False)


def test_operator_contract_and_compile(device):
    a, b = torch.randn(6, 8, device=device, requires_grad=True), torch.randn(3, 5, 8, device=device, requires_grad=True)
    offsets = offsets_of([4, 0, 2]).to(device)
    torch.library.opcheck(torch.ops.llada_kernels_triton.grouped_gemm, (a, b, offsets))
    out = torch.compile(lambda x, w, o: grouped_gemm(x, w, o, backend="triton").sin(), fullgraph=True)(a, b, offsets)
    exact = plain(a, b, [4, 0, 2]).sin()
    torch.testing.assert_close(out, exact)
    for ours, theirs in zip(*(torch.autograd.grad(y.sum(), (a, b)) for y in (out, exact)), strict=True):
        torch.testing.assert_close(ours, theirs)
