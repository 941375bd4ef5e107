from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_kernels.ops.swiglu import BACKENDS, swiglu
from llada_kernels.testing import assert_as_exact_as

from ..backends import cpu_backends

NAMES = cpu_backends(BACKENDS)


def plain(gate_up: torch.Tensor) -> torch.Tensor:
    """Direct transcription in the dtype of the argument."""
    half = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :half], gate_up[..., half:]
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2,), (1, 2), (3, 32), (2, 5, 66), (300, 128), (7, 1024), (0, 8), (4, 0)])
def test_values_and_gradients(backend, dtype, shape):
    gate_up, grad = torch.randn(shape, dtype=dtype) * 3, torch.randn(*shape[:-1], shape[-1] // 2, dtype=dtype)
    results = []
    for run, kind in ((lambda x: swiglu(x, backend=backend), dtype), (plain, dtype), (plain, torch.float64)):
        x = gate_up.to(kind).clone().requires_grad_()
        y = run(x)
        assert y.shape == grad.shape and y.dtype == kind
        y.backward(grad.to(kind))
        results.append((y.detach(), x.grad))
    for ours, same, exact, name in zip(*results, ("y", "grad"), strict=True):
        assert_as_exact_as(ours, same, exact, name=name)


@pytest.mark.parametrize("backend", NAMES)
def test_rounds_silu_before_the_product(backend):
    """The official order in bf16; a product of the unrounded silu differs in many last bits."""
    gate_up = torch.randn(64, 256, dtype=torch.bfloat16)
    gate, up = gate_up.float().chunk(2, -1)
    silu = gate.double().sigmoid() * gate.double()
    expected, unrounded = silu.bfloat16() * up.bfloat16(), (silu * up).bfloat16()
    y = swiglu(gate_up, backend=backend)
    assert (y != expected).float().mean() < 0.01  # another rounding of exp may flip a last bit
    assert (y != unrounded).float().mean() > 0.05


@pytest.mark.parametrize("backend", NAMES)
def test_extreme_gates(backend):
    gate = torch.tensor([0.0, -0.0, 30.0, -30.0, 100.0, -100.0, 1e30, -1e30, float("inf"), float("nan")])
    gate_up = torch.cat([gate, torch.full_like(gate, 2.0)]).requires_grad_()
    y = swiglu(gate_up, backend=backend)
    torch.testing.assert_close(y, torch.nn.functional.silu(gate) * 2, atol=1e-9, rtol=1e-6, equal_nan=True)
    y[:8].sum().backward()
    assert torch.isfinite(gate_up.grad[:8]).all()


@given(rows=st.integers(0, 9), width=st.integers(0, 70))
@settings(max_examples=30, deadline=None)
def test_backends_agree(rows, width):
    x = torch.randn(rows, 2 * width)
    torch.testing.assert_close(swiglu(x, backend="native"), swiglu(x, backend="reference"), atol=2e-6, rtol=2e-6)


def test_same_bits_for_any_number_of_threads(num_threads):
    x, grad = torch.randn(999, 192, requires_grad=True), torch.randn(999, 96)
    torch.set_num_threads(1)
    expected = swiglu(x, backend="native")
    expected_grad = torch.autograd.grad(expected, x, grad)[0]
    torch.set_num_threads(num_threads)
    y = swiglu(x, backend="native")
    assert torch.equal(y, expected) and torch.equal(torch.autograd.grad(y, x, grad)[0], expected_grad)


def test_non_contiguous_input():
    x = torch.randn(10, 6, 8).transpose(0, 2)
    torch.testing.assert_close(swiglu(x, backend="native"), swiglu(x, backend="reference"))


def test_gradcheck():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: swiglu(a, backend="reference"), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_contract(dtype):
    torch.library.opcheck(torch.ops.llada_kernels.swiglu, (torch.randn(4, 32, dtype=dtype, requires_grad=True),))


def test_compiles_without_graph_breaks():
    x = torch.randn(4, 32, requires_grad=True)
    compiled = torch.compile(lambda a: swiglu(a, backend="native").sin(), fullgraph=True)
    torch.testing.assert_close(compiled(x), swiglu(x, backend="reference").sin())
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(plain(x).sin().sum(), x)[0])


def test_errors():
    with pytest.raises(ValueError, match=r"gate_up: expected an even last dimension, got shape \(2, 3\)"):
        swiglu(torch.randn(2, 3))
    with pytest.raises(ValueError, match="gate_up: expected dtype .*, got int64"):
        swiglu(torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="gate_up: expected a torch.Tensor, got list"):
        swiglu([1.0, 2.0])
    with pytest.raises(ValueError, match="native serves float32, bfloat16, got torch.float64"):
        swiglu(torch.randn(2, 4).double(), backend="native")
