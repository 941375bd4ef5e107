from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_kernels import explain
from llada_kernels.masks import DiffusionMask
from llada_kernels.ops.block_attention import BACKENDS, block_attention
from llada_kernels.testing import assert_as_exact_as

from ..backends import cpu_backends

NAMES = cpu_backends(BACKENDS)
GRID = torch.tensor([[1, 0, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]]).bool()
MASKS = {
    "training": lambda: DiffusionMask.block_diffusion([0, 7, 7, 20, 90], 4),
    "views": lambda: DiffusionMask.block_diffusion([0, 65, 66], 16, views=3),
    "noisy_blocks": lambda: DiffusionMask.block_diffusion([0, 40, 100], 32, noisy_blocks=[False, True, True, False]),
    "row_origin": lambda: DiffusionMask.block_diffusion([0, 90, 150], 32, block_origin="row"),
    "bidirectional": lambda: DiffusionMask.bidirectional([0, 1, 66, 130]),
    "block_causal": lambda: DiffusionMask.block_causal([0, 130, 131], 8),
    "causal": lambda: DiffusionMask.causal([0, 33, 100]),
    "intervals": lambda: DiffusionMask.from_dense(GRID),  # more keys than queries, a row without any
    "empty": lambda: DiffusionMask.causal([0, 0]),
}


def dense_attention(q, k, v, visible, scale=None):
    """softmax(scale * q k^T over visible keys) v in the dtype of q, head by head; 0 where nothing is visible."""
    group, heads = q.shape[1] // k.shape[1], []
    for a in range(q.shape[1]):
        scores = q[:, a] @ k[:, a // group].T * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores.masked_fill(~visible, -torch.inf)
        peak = F.pad(scores.detach(), (0, 1), value=-1e30).amax(-1, keepdim=True)
        weights = torch.exp(scores - peak)
        heads.append(weights @ v[:, a // group] / weights.sum(-1, keepdim=True).clamp_min(1e-30))
    return torch.stack(heads, 1)


def sdpa(q, k, v, visible, scale=None):
    """What plain PyTorch computes in the same dtype. SDPA has no answer for a query without keys: those rows are cleared."""
    rows = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(*rows, attn_mask=visible | ~visible.any(-1, keepdim=True), scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1) * visible.any(-1)[:, None, None]


def draw(mask, heads, kv_heads, dim, dtype):
    q, grad = (torch.randn(mask.num_queries, heads, dim, dtype=dtype) for _ in range(2))
    return q, *(torch.randn(mask.num_keys, kv_heads, dim, dtype=dtype) for _ in range(2)), grad


def values_and_gradients(f, dtype, q, k, v, grad):
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out = f(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))


def check_overflowing_scores(attend, device):
    """Products of -inf with the first keys, so that a row has seen nothing else for a while: the others decide."""
    mask = DiffusionMask.block_causal([0, 640], 32).to(device)
    q, k, v = torch.full((640, 2, 64), 1e20), torch.randn(640, 1, 64), torch.randn(640, 1, 64)
    k[:608] = -1e20
    q, k, v = (x.to(device) for x in (q, k, v))
    visible = mask.dense()
    out = attend(q, k, v, mask)
    assert (out[:608] == 0).all()  # no key has a weight
    torch.testing.assert_close(out[608:], sdpa(q, k, v, visible)[608:])


def check(backend, mask, heads, kv_heads, dim, dtype, scale=None):
    inputs, visible = draw(mask, heads, kv_heads, dim, dtype), mask.dense()
    ours = values_and_gradients(lambda q, k, v: block_attention(q, k, v, mask, scale, backend=backend), dtype, *inputs)
    exact = values_and_gradients(lambda q, k, v: dense_attention(q, k, v, visible, scale), torch.float64, *inputs)
    same = values_and_gradients(lambda q, k, v: sdpa(q, k, v, visible, scale), dtype, *inputs) if mask.num_queries else exact
    for x, y, z, name in zip(ours, same, exact, ("out", "grad_q", "grad_k", "grad_v"), strict=True):
        assert x.dtype == dtype
        assert_as_exact_as(x, y, z, name=name)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 1, 32), (6, 2, 72), (2, 2, 8)])
@pytest.mark.parametrize("name", MASKS)
def test_values_and_gradients(name, heads, kv_heads, dim, dtype, backend):
    check(backend, MASKS[name](), heads, kv_heads, dim, dtype)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 4), (8, 1)])
def test_official_head_geometry(heads, kv_heads, backend):
    check(backend, DiffusionMask.block_diffusion([0, 96, 147], 32), heads, kv_heads, 128, torch.bfloat16, scale=0.05)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 5, 7, 8, 9, 11, 13, 31, 32, 33, 61]), max_size=4),
    st.sampled_from([1, 3, 8, 32]),
    st.integers(1, 3),
    st.sampled_from(["document", "row"]),
    st.sampled_from([(2, 1), (3, 3)]),
)
def test_any_documents(lengths, block_size, views, origin, heads):
    cu = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    check("native", DiffusionMask.block_diffusion(cu, block_size, views, block_origin=origin), *heads, 16, torch.float32)


@pytest.mark.parametrize("backend", NAMES)
def test_query_without_keys_gives_zero(backend):
    mask = DiffusionMask.from_dense(GRID)
    q, k, v, grad = draw(mask, 2, 1, 8, torch.float32)
    out, grad_q, grad_k, grad_v = values_and_gradients(
        lambda q, k, v: block_attention(q, k, v, mask, backend=backend), torch.float32, q, k, v, grad
    )
    assert not out[1].any() and not grad_q[1].any()
    none = DiffusionMask.from_dense(torch.zeros(3, 5, dtype=torch.bool))
    results = values_and_gradients(lambda q, k, v: block_attention(q, k, v, none, backend=backend), torch.float32, q[:3], k, v, grad[:3])
    assert not any(x.any() for x in results)
    no_keys = DiffusionMask.from_dense(torch.zeros(3, 0, dtype=torch.bool))
    assert not block_attention(q[:3], k[:0], v[:0], no_keys, backend=backend).any()


@pytest.mark.parametrize("backend", NAMES)
def test_large_scores_do_not_overflow(backend):
    mask = DiffusionMask.block_diffusion([0, 100], 32)
    q, k, v, _ = draw(mask, 2, 2, 16, torch.float32)
    out = block_attention(q * 300, k * 300, v, mask, backend=backend)
    exact = dense_attention(q.double() * 300, k.double() * 300, v.double(), mask.dense())
    # Scores of 10^5 carry an error of about 10^-2 in fp32, wherever they are computed.
    assert torch.isfinite(out).all() and (out - exact).abs().max() < 0.2


@pytest.mark.parametrize("backend", NAMES)
def test_nan_stays_with_those_who_see_it(backend):
    """A NaN in one document reaches no other, forward or backward: masked tiles are skipped, not multiplied by 0."""
    mask = DiffusionMask.block_diffusion([0, 64, 128], 32)
    q, k, v, grad = draw(mask, 2, 2, 8, torch.float32)
    k[130], v[131] = float("nan"), float("nan")  # clean tokens of the first document
    results = values_and_gradients(lambda q, k, v: block_attention(q, k, v, mask, backend=backend), torch.float32, q, k, v, grad)
    second = torch.zeros(256, dtype=torch.bool)
    second[64:128] = second[192:] = True
    if backend == "native":
        assert all(torch.isfinite(x[second]).all() for x in results)
    assert not torch.isfinite(results[0][128:192]).all()


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("batch", [None, 1, 3])
def test_dense_mask(backend, batch):
    """A bool tensor that is no DiffusionMask: served by the reference, refused by native with the reason."""
    visible = torch.rand(*((batch,) if batch else ()), 12, 12) < 0.5
    tokens = 12 * (batch or 1)
    q, k, v = torch.randn(tokens, 4, 8), torch.randn(tokens, 2, 8), torch.randn(tokens, 2, 8)
    if backend == "native":
        with pytest.raises(ValueError, match="a dense mask is served by the reference only"):
            block_attention(q, k, v, visible, backend=backend)
        assert "reference  chosen" in explain("block_attention", q, k, v, visible)
        return
    whole = visible if batch is None else torch.block_diag(*visible).bool()
    torch.testing.assert_close(block_attention(q, k, v, visible, backend=backend), dense_attention(q, k, v, whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(dtype):
    mask = DiffusionMask.block_diffusion([0, 33, 150, 151], 32, views=2)
    inputs, seen, before = draw(mask, 8, 2, 40, dtype), [], torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        seen.append(values_and_gradients(lambda q, k, v: block_attention(q, k, v, mask, backend="native"), dtype, *inputs))
    torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(x, y) for x, y in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("backend", NAMES)
def test_non_contiguous_inputs(backend):
    """The model's q, k, v are slices of one fused projection."""
    mask = DiffusionMask.causal([0, 9])
    qkv = torch.randn(9, 8, 16)
    q, k, v = qkv.split((4, 2, 2), 1)
    expected = block_attention(q.contiguous(), k.contiguous(), v.contiguous(), mask, backend=backend)
    assert torch.equal(block_attention(q, k, v, mask, backend=backend), expected)
    strided = torch.randn(9, 16, 4).transpose(1, 2)
    grad = torch.autograd.grad(block_attention(strided.requires_grad_(), k, v, mask, backend=backend), strided, strided.detach())[0]
    exact = torch.autograd.grad(dense_attention(strided, k, v, mask.dense()), strided, strided.detach())[0]
    torch.testing.assert_close(grad, exact)


@pytest.mark.parametrize("backend", NAMES)
def test_inference_and_partial_gradients(backend):
    mask = DiffusionMask.causal([0, 9])
    q, k, v, grad = draw(mask, 4, 2, 16, torch.float32)
    with torch.inference_mode():
        out = block_attention(q, k, v, mask, backend=backend)
    grad_v = torch.autograd.grad(block_attention(q, k, v.requires_grad_(), mask, backend=backend), v, grad)[0]
    exact = dense_attention(q, k, v, mask.dense())
    torch.testing.assert_close(out, exact.detach())
    torch.testing.assert_close(grad_v, torch.autograd.grad(exact, v, grad)[0])


def test_gradcheck():
    mask = DiffusionMask.block_diffusion([0, 3, 5], 2)
    inputs = [torch.randn(mask.num_keys, h, 2, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1)]
    assert torch.autograd.gradcheck(lambda q, k, v: block_attention(q, k, v, mask, backend="reference"), inputs)
    grid = DiffusionMask.from_dense(GRID)
    inputs[0] = inputs[0].detach()[:4].requires_grad_()
    inputs[1:] = [x.detach()[:5].requires_grad_() for x in inputs[1:]]
    assert torch.autograd.gradcheck(lambda q, k, v: block_attention(q, k, v, grid, backend="reference"), inputs)


def plan_arguments(mask):
    plan = mask.tile_plan()
    keys = (plan.key_offsets, plan.key_runs, plan.key_order, plan.block_n)
    return mask.context, mask.own, plan.tiles, plan.order, *keys, 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_contract(dtype):
    mask = DiffusionMask.block_diffusion([0, 5, 12], 4)
    q, k, v, grad = draw(mask, 4, 2, 16, dtype)
    arguments = plan_arguments(mask)
    torch.library.opcheck(torch.ops.llada_kernels.block_attention, (*(x.requires_grad_() for x in (q, k, v)), *arguments))
    out, lse = torch.ops.llada_kernels.block_attention(q, k, v, *arguments)
    saved = [x.detach() for x in (grad, q, k, v, out, lse)]
    torch.library.opcheck(torch.ops.llada_kernels.block_attention_backward, (*saved, *arguments))


def test_compiles_without_graph_breaks():
    mask = DiffusionMask.block_diffusion([0, 5, 12], 4)
    q, k, v, _ = draw(mask, 4, 2, 16, torch.float32)
    compiled = torch.compile(lambda q, mask: block_attention(q, k, v, mask, backend="native").sin(), fullgraph=True)
    expected = block_attention(q, k, v, mask, backend="reference").sin()
    torch.testing.assert_close(compiled(q.requires_grad_(), mask), expected)
    compiled(q, mask).sum().backward()
    assert q.grad is not None
    # Another mask of the same shape: nothing of the first one may be baked in.
    other = DiffusionMask.block_diffusion([0, 8, 12], 4)
    torch.testing.assert_close(compiled(q, other), block_attention(q, k, v, other, backend="reference").sin())


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated"])
def test_every_cpu_level(level):
    """Also those that are not chosen where a better one is, forced by environment variable in a process of their own."""
    code = (
        "import torch\n"
        "from python_tests.ops import test_block_attention as plain, test_cached_block_attention as cached\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    for name in ('training', 'row_origin', 'intervals'):\n"
        "        plain.check('native', plain.MASKS[name](), 6, 2, 40, dtype)\n"
        "    cached.check('native', cached.Case(*cached.ROWS['ragged'], 6, 2, 40, dtype))\n"
        "print(torch.ops.llada_kernels.cpu_level())\n"
    )
    environment = {**os.environ, "LLADA_KERNELS_CPU": level}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if "this machine has no" in result.stderr:
        pytest.skip(f"this machine has no {level}")
    assert result.returncode == 0 and result.stdout.strip() == level, result.stderr


def test_errors():
    mask = DiffusionMask.causal([0, 6])
    q, k, v = torch.randn(6, 4, 16), torch.randn(6, 2, 16), torch.randn(6, 2, 16)
    cases = [
        (ValueError, r"q: expected 3 dimensions, got shape \(6, 64\)", (q.flatten(1), k, v, mask)),
        (ValueError, r"k: expected shape \(\*, \*, 16\), got \(6, 2, 8\)", (q, k[..., :8], v, mask)),
        (ValueError, r"v: expected shape \(6, 2, 16\), got \(5, 2, 16\)", (q, k, v[:5], mask)),
        (ValueError, r"k: expected a number of heads that divides the 4 heads of q, got 3", (q, *[torch.randn(6, 3, 16)] * 2, mask)),
        (ValueError, r"k: expected dtype torch.float32 \(that of q\), got torch.bfloat16", (q, k.bfloat16(), v, mask)),
        (ValueError, r"mask: expected one row per token of q \(5\), got 6", (q[:5], k, v, mask)),
        (ValueError, r"mask: expected one key per token of k \(5\), got 6", (q, k[:5], v[:5], mask)),
        (ValueError, r"mask: expected device cpu \(that of q\), got meta", (q, k, v, mask.to("meta"))),
        (ValueError, r"got kind 'cached' \(use cached_block_attention\)", (q, k, v, DiffusionMask.cached([0], [6], 4))),
        (ValueError, r"mask: expected bool \(6, 6\).* got torch.bool \(5, 6\)", (q, k, v, mask.dense()[:5])),
        (ValueError, r"mask: expected bool \(6, 6\).* got torch.float32", (q, k, v, torch.zeros(6, 6))),
        (TypeError, r"mask: expected a DiffusionMask or a bool tensor, got NoneType", (q, k, v, None)),
        (TypeError, r"q: expected a torch.Tensor, got list", ([1.0], k, v, mask)),
    ]
    for error, text, arguments in cases:
        with pytest.raises(error, match=text):
            block_attention(*arguments)
    with pytest.raises(ValueError, match="native serves head dims that are multiples of 8, got 12"):
        block_attention(q[..., :12], k[..., :12], v[..., :12], mask, backend="native")
    with pytest.raises(ValueError, match="native serves float32, bfloat16, got torch.float64"):
        block_attention(q.double(), k.double(), v.double(), mask, backend="native")


def test_operator_refuses_a_plan_of_other_sizes():
    """The plan's numbers become addresses: the operator checks them itself, whoever calls it."""
    mask = DiffusionMask.causal([0, 70])
    q, k, v, _ = draw(mask, 1, 1, 8, torch.float32)
    good = plan_arguments(mask)
    op = torch.ops.llada_kernels.block_attention
    op(q, k, v, *good)

    def changed(index, edit):
        arguments = [x.clone() if isinstance(x, torch.Tensor) else x for x in good]
        edit(arguments[index])
        return arguments

    cases = [
        ("tiles: context of tile 2: expected keys in \\[0, 70\\), got \\[0, 71\\)", changed(2, lambda t: t[2, 3].fill_(71))),
        ("tiles: expected tile 1 to begin at query 32, got \\[31, 64\\)", changed(2, lambda t: t[1, 0].fill_(31))),
        ("tiles: expected to cover 70 queries, got 69", changed(2, lambda t: t[2, 1].fill_(69))),
        ("order: expected each of 0 .. 2 once, got 1", changed(3, lambda t: t.fill_(1))),
        ("key_offsets: expected to run from 0 to", changed(4, lambda t: t.add_(1))),
        ("key_runs: expected tiles in \\[0, 3\\)", changed(5, lambda t: t[0, 1].fill_(4))),
        ("key_order: expected each of 0 .. 1 once, got 7", changed(6, lambda t: t.fill_(7))),
        ("block_n: expected 64, got 32", [*good[:7], 32, *good[8:]]),
        ("tiles: expected dtype Int", [*good[:2], good[2].long(), *good[3:]]),
    ]
    for text, arguments in cases:
        with pytest.raises(ValueError, match=text):
            op(q, k, v, *arguments)


@pytest.mark.parametrize("backend", NAMES)
def test_overflowing_scores(backend):
    check_overflowing_scores(lambda *args: block_attention(*args, backend=backend), "cpu")


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_any_scale(backend, dtype, scale):
    check(backend, DiffusionMask.block_diffusion([0, 40, 147], 8), 4, 2, 16, dtype, scale=scale)
