"""What the emulated kernels show beyond values: races, and that the emulation notices what a GPU would not forgive."""

from __future__ import annotations

import pytest
import torch

from llada_kernels.ops.moe_routing import moe_routing
from llada_kernels.ops.rms_norm import rms_norm
from llada_kernels.ops.rope import rope
from llada_kernels.ops.threshold_unmask import threshold_unmask

from . import emulated_cuda

ORDERS = [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("length", "vocab", "sampling"),
    [(5, 2500, {}), (70, 300, {}), (3, 1100, {"temperature": [0.0, 1.0], "top_k": [40, 9], "top_p": 0.9, "seed": 1})],
)
def test_the_sampler_has_no_races(dtype, length, vocab, sampling):
    """The same bits whatever the order in which threads and blocks run."""
    logits, tokens = (torch.randn(2, length, vocab).round(decimals=1) * 3).to(dtype), torch.randint(0, vocab, (2, length))
    tokens[:, ::2] = 7
    expected = threshold_unmask(logits, tokens, 7, 0.1, 0.2, 3, **sampling, backend="reference")
    for order in ORDERS:
        with emulated_cuda(order):
            seen = threshold_unmask(logits, tokens, 7, 0.1, 0.2, 3, **sampling, backend="native")
        assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


@pytest.mark.parametrize("tokens", [45, 300])
@pytest.mark.parametrize("options", [(4, 4, 2, 2.5, "sigmoid"), (3, 1, 1, 1.0, "softmax", False, (15, 7))])
def test_routing_has_no_races(tokens, options):
    """45 tokens are one block's work, 300 that of several kernels."""
    logits, bias = torch.randn(tokens, 16).round(), torch.randn(16)
    seen = []
    for order in ORDERS:
        with emulated_cuda(order):
            seen.append(moe_routing(logits, bias, *options, backend="native"))
    expected = moe_routing(logits, bias, *options, backend="reference")
    for other in seen:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))
        assert all(torch.equal(a, b) for a, b in zip((other[0], *other[2:]), (expected[0], *expected[2:]), strict=True))
        torch.testing.assert_close(other.topk_weights, expected.topk_weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [24, 1030])
def test_norms_have_no_races(dtype, width):
    """Forward and backward, with a residual; heads of 24 dims also as rope normalises them."""
    x, residual, weight = torch.randn(140, width, dtype=dtype), torch.randn(140, width, dtype=dtype), torch.randn(width, dtype=dtype)
    cos, sin = torch.randn(35, 16, dtype=dtype), torch.randn(35, 16, dtype=dtype)
    seen = []
    for order in ORDERS:
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with emulated_cuda(order):
            if width == 24:
                y = rope(a.view(35, 4, width), cos, sin, q_weight=w, backend="native")
            else:
                y = rms_norm(a, w, 1e-6, residual, backend="native")[0]
            y.backward(torch.ones_like(y))
        seen.append((y.detach(), a.grad, w.grad))
    for other in seen[1:]:
        assert all(torch.equal(p, q) for p, q in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 1}])
def test_bad_logits_mark_their_row(value, sampling):
    """No exception, as it would cost a synchronisation: counts of -1, unchanged tokens; other rows are served."""
    logits, tokens = torch.randn(3, 4, 1500), torch.full((3, 4), 7)
    logits[1, 2, 1300] = value
    if value == -torch.inf:
        logits[1, 2, torch.arange(1500) != 7] = value
    clean = logits.clone()
    clean[1, 2] = 0
    expected = threshold_unmask(clean, tokens, 7, 0.0, **sampling, backend="reference")
    with emulated_cuda():
        seen = threshold_unmask(logits, tokens, 7, 0.0, **sampling, backend="native")
    assert seen.counts.tolist() == [[4, 0], [-1, -1], [4, 0]]
    assert torch.equal(seen.tokens[1], tokens[1]) and torch.equal(seen.tokens[::2], expected.tokens[::2])
    assert seen.confidence[1, 2].isnan() and seen.confidence.isnan().sum() == 1
    assert torch.equal(seen.confidence[[0, 2]], expected.confidence[[0, 2]])


@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("rms_norm", lambda: rms_norm(torch.ones(2, 8), torch.ones(8), backend="native")),
        ("rope", lambda: rope(torch.ones(2, 1, 8), torch.ones(2, 4), torch.ones(2, 4), backend="native")),
        ("moe_routing", lambda: moe_routing(torch.ones(2, 8), None, 2, backend="native")),
        ("threshold_unmask", lambda: threshold_unmask(torch.ones(1, 2, 8), torch.ones(1, 2, dtype=torch.int64), 1, 0.5, backend="native")),
    ],
)
def test_a_failed_launch_raises_with_the_op_and_the_text(op, call):
    with emulated_cuda():
        torch.ops.llada_kernels_emulated.fail_next()
        with pytest.raises(RuntimeError, match=f"^{op}: CUDA error 1000: refused$"):
            call()
        call()


def test_the_emulation_names_what_goes_wrong():
    operators = torch.ops.llada_kernels_emulated
    with emulated_cuda():
        pass  # compiled and loaded
    for fault, text in [
        ("barrier", "a barrier or a warp operation is not reached by all threads"),
        ("shuffle", "a barrier or a warp operation is not reached by all threads"),
        ("bounds", "written behind the dynamic shared memory"),
        ("alignment", "a vector is loaded from an address that is not a multiple of its size"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            operators.fault(fault)
    assert operators.fault("none") is None
    seen = {order: _racing(order) for order in ORDERS}
    assert len(set(seen.values())) > 1


def _racing(order: int) -> int:
    with emulated_cuda(order):
        return int(torch.ops.llada_kernels_emulated.race())
