from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_kernels.ops.grouped_gemm import BACKENDS, grouped_gemm
from llada_kernels.testing import assert_as_exact_as

from ..backends import cpu_backends

NAMES = cpu_backends(BACKENDS)
DTYPES = [torch.float32, torch.bfloat16]


def offsets_of(counts):
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def plain(a, b, counts):
    """Each row times the transposed weight of its group, one product per group, in the dtype of a."""
    out, begin = [], 0
    for group, count in enumerate(counts):
        out.append(a[begin : begin + count] @ b[group].T)
        begin += count
    return torch.cat(out)


CASES = [  # rows per group, N, Kd
    ([1], 1, 1),
    ([0, 3, 0, 0, 5, 1], 7, 5),
    ([0, 0], 4, 4),
    ([0, 40, 0], 33, 70),
    ([13, 1, 31, 8], 64, 128),
    ([500, 2, 0, 75], 200, 300),
    ([2, 3], 1030, 520),
]


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts,n,k", CASES)
def test_values_and_gradients(backend, dtype, counts, n, k):
    a, b, grad = torch.randn(sum(counts), k), torch.randn(len(counts), n, k) / k**0.5, torch.randn(sum(counts), n)
    a, b, grad = a.to(dtype), b.to(dtype), grad.to(dtype)
    results = []
    for kind, run in ((dtype, None), (dtype, plain), (torch.float64, plain)):
        x, w = a.to(kind).clone().requires_grad_(), b.to(kind).clone().requires_grad_()
        y = grouped_gemm(x, w, offsets_of(counts), backend=backend) if run is None else run(x, w, counts)
        y.backward(grad.to(kind))
        results.append((y.detach(), x.grad, w.grad))
    for ours, same, exact, name in zip(*results, ("out", "grad_a", "grad_b"), strict=True):
        assert ours.dtype == dtype
        assert_as_exact_as(ours, same, exact, name=name)
    for group, count in enumerate(counts):
        assert count or not results[0][2][group].any()


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts,n,k", [([5, 0, 9, 70], 40, 66), ([1, 2], 129, 300)])
def test_small_integers_are_exact(backend, dtype, counts, n, k):
    """Every product and partial sum is an integer that both dtypes hold: any indexing error shows as an inequality."""
    rows = sum(counts)
    a, b = torch.randint(-1, 2, (rows, k)).float(), torch.randint(-1, 2, (len(counts), n, k)).float()
    grad = torch.randint(-1, 2, (rows, n)).float()
    x, w = a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()
    out = grouped_gemm(x, w, offsets_of(counts), backend=backend)
    out.backward(grad.to(dtype))
    group = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    assert torch.equal(out.float(), torch.einsum("rk,rnk->rn", a, b[group]))
    assert torch.equal(x.grad.float(), torch.einsum("rn,rnk->rk", grad, b[group]))
    expected = torch.zeros_like(b).index_add(0, group, torch.einsum("rn,rk->rnk", grad, a))
    assert torch.equal(w.grad.float(), expected)


@given(counts=st.lists(st.integers(0, 45), min_size=1, max_size=6), n=st.integers(1, 70), k=st.integers(1, 70))
@settings(max_examples=30, deadline=None)
def test_backends_agree(counts, n, k):
    a, b = torch.randn(sum(counts), k), torch.randn(len(counts), n, k)
    native, reference = (grouped_gemm(a, b, offsets_of(counts), backend=name) for name in ("native", "reference"))
    torch.testing.assert_close(native, reference, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype, num_threads):
    counts = [100, 0, 3, 41]
    a, b = torch.randn(144, 80).to(dtype).requires_grad_(), torch.randn(4, 130, 80).to(dtype).requires_grad_()
    grad = torch.randn(144, 130).to(dtype)

    def results():
        out = grouped_gemm(a, b, offsets_of(counts), backend="native")
        return out, *torch.autograd.grad(out, (a, b), grad)

    torch.set_num_threads(1)
    expected = results()
    torch.set_num_threads(num_threads)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results(), expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [2048, 2064, 2049])
def test_large_gradients_are_those_of_their_groups_alone(dtype, k):
    """Some 80 MB are written past the caches where rows are whole cache lines, those of a group alone are not: no bit differs."""
    counts, n = [300, 0, 1, 7, 33, 2, 5, 64, 9, 20], 2048
    a, b, grad = torch.randn(sum(counts), k).to(dtype), torch.randn(len(counts), n, k).to(dtype), torch.randn(sum(counts), n).to(dtype)

    def gradient(rows, weights, counts, grad):
        w = weights.detach().requires_grad_()
        return torch.autograd.grad(grouped_gemm(rows, w, offsets_of(counts), backend="native"), w, grad)[0]

    together = gradient(a, b, counts, grad)
    assert together.nbytes > 76 << 20
    for group, (begin, end) in enumerate(itertools.pairwise(offsets_of(counts).tolist())):
        alone = gradient(a[begin:end], b[group : group + 1], [end - begin], grad[begin:end])
        assert torch.equal(together[group], alone[0])
    same, exact = (grad[:300].to(kind).T @ a[:300].to(kind) for kind in (dtype, torch.float64))
    assert_as_exact_as(together[0], same, exact, name="300 rows, summed in two steps")


@pytest.mark.parametrize("backend", NAMES)
def test_only_one_operand_differentiable(backend):
    a, b = torch.randn(5, 4), torch.randn(2, 3, 4)
    for wanted in (a, b):
        wanted.requires_grad_()
        (grad,) = torch.autograd.grad(grouped_gemm(a, b, offsets_of([2, 3]), backend=backend).sum(), wanted)
        exact = torch.autograd.grad(plain(a, b, [2, 3]).sum(), wanted)[0]
        torch.testing.assert_close(grad, exact)
        wanted.requires_grad_(False)


@pytest.mark.parametrize("backend", NAMES)
def test_non_contiguous_and_no_grad(backend):
    a, b = torch.randn(16, 9).T[::3], torch.randn(10, 16, 2).permute(2, 0, 1)[:, ::2]
    with torch.inference_mode():
        out = grouped_gemm(a, b, offsets_of([1, 2]), backend=backend)
    torch.testing.assert_close(out, plain(a, b, [1, 2]))


def test_gradcheck():
    a = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: grouped_gemm(x, w, offsets_of([0, 4, 0, 2]), backend="reference"), (a, b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_contract(dtype):
    a, b = torch.randn(6, 8, dtype=dtype, requires_grad=True), torch.randn(3, 5, 8, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.llada_kernels.grouped_gemm, (a, b, offsets_of([4, 0, 2])))


@pytest.mark.parametrize("backend", NAMES)
def test_compiles_without_graph_breaks(backend):
    a, b = torch.randn(6, 8, requires_grad=True), torch.randn(3, 5, 8, requires_grad=True)
    offsets = offsets_of([4, 0, 2])
    out = torch.compile(lambda x, w, o: grouped_gemm(x, w, o, backend=backend).sin(), fullgraph=True)(a, b, offsets)
    exact = plain(a, b, [4, 0, 2]).sin()
    torch.testing.assert_close(out, exact)
    for ours, theirs in zip(*(torch.autograd.grad(y.sum(), (a, b)) for y in (out, exact)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_errors():
    a, b, good = torch.randn(5, 4), torch.randn(2, 3, 4), offsets_of([2, 3])
    for text, args in [
        (r"offsets: expected to start at 0 and end at 5 \(the number of rows\), got 0 and 4", (a, b, offsets_of([2, 2]))),
        (r"offsets: expected to start at 0 and end at 5 \(the number of rows\), got 1 and 5", (a, b, good.clamp(min=1))),
        (r"offsets: expected rising values, got 6 before 5 at index 2", (a, b, offsets_of([6, -1]))),
        (r"offsets: expected shape \(3,\), got \(4,\)", (a, b, offsets_of([2, 3, 0]))),
        (r"offsets: expected dtype int32, got int64", (a, b, good.long())),
        (r"b: expected shape \(\*, \*, 4\), got \(2, 3, 5\)", (a, torch.randn(2, 3, 5), good)),
        (r"b: expected dtype torch.float32 \(that of a\), got torch.bfloat16", (a, b.bfloat16(), good)),
        (r"b: expected at least one group, got shape \(0, 3, 4\)", (a[:0], b[:0], good[:1])),
        (r"a: expected dtype .*, got int64", (a.long(), b, good)),
    ]:
        with pytest.raises(ValueError, match=text):
            grouped_gemm(*args)
    with pytest.raises(TypeError, match="offsets: expected a torch.Tensor, got list"):
        grouped_gemm(a, b, [0, 2, 5])


def test_the_operator_guards_its_memory():
    """Compiled code skips the Python checks; the operator itself refuses offsets that point outside."""
    a, b = torch.randn(5, 4), torch.randn(2, 3, 4)
    for bad in (offsets_of([2, 4]), offsets_of([6, -1]), offsets_of([5])):
        with pytest.raises((ValueError, RuntimeError), match="offsets: expected"):
            torch.ops.llada_kernels.grouped_gemm(a, b, bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_no_columns_are_zero(dtype):
    a = torch.randn(3, 5, dtype=dtype, requires_grad=True)
    b = torch.empty(2, 0, 5, dtype=dtype, requires_grad=True)
    out = grouped_gemm(a, b, torch.tensor([0, 1, 3], dtype=torch.int32), backend="native")
    (grad_a,) = torch.autograd.grad(out.sum(), a)
    assert out.shape == (3, 0) and torch.equal(grad_a, torch.zeros_like(a))
