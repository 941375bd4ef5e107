"""QuantizedExperts of kind "fp8": blocks of 128 x 128 weights, and products of e4m3 activations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import silu

from llada_kernels import Model, explain
from llada_kernels.ops import QuantizedExperts, moe_mlp

from ..models import LLADA2 as CONFIG
from ..models import random_model
from .test_quantized_experts import problem, relative

WIDE = replace(CONFIG, hidden_size=128, moe_intermediate_size=128, shared_expert_intermediate_size=128)


def e4m3_grid() -> torch.Tensor:
    """Every non-negative e4m3 value, by the format's definition: 3 bits of fraction, exponents -6 to 8, subnormals; the last is NaN."""
    normal = [(1 + fraction / 8) * 2.0**exponent for exponent in range(-6, 9) for fraction in range(8)]
    return torch.tensor([fraction / 8 * 2.0**-6 for fraction in range(8)] + normal[:-1], dtype=torch.float64)


def nearest(values: torch.Tensor) -> torch.Tensor:
    """The e4m3 value next to each value, ties to the even one."""
    grid, size = e4m3_grid(), values.double().abs()
    above = torch.searchsorted(grid, size).clamp(max=len(grid) - 1)
    below = (above - 1).clamp(min=0)
    up, down = grid[above] - size, size - grid[below]
    pick = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return grid[pick] * values.double().sign()


def plain_values(q: QuantizedExperts) -> torch.Tensor:
    """The weights that the two buffers describe, block by block."""
    out = torch.empty(q.shape)
    for e in range(q.shape[0]):
        for i in range(q.shape[1] // 128):
            for j in range(q.shape[2] // 128):
                block = e, slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                out[block] = q.data[block].float() * q.scales[e, i, j]
    return out


def by_hand(x, routing, q_gate_up, q_down):
    """The rule of moe_mlp's docstring in fp64 with the roundings of x's dtype, one token and choice at a time."""

    def product(a, weight):
        groups = a.float().unflatten(-1, (-1, 128))
        scale = (groups.abs().amax(-1, keepdim=True) / 448).clamp(min=2.0**-100)
        return (nearest(groups / scale) * scale).flatten() @ weight.double().mT

    gate_up, down = plain_values(q_gate_up), plain_values(q_down)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for e, weight in zip(routing.topk_ids[t].tolist(), routing.topk_weights[t].tolist(), strict=True):
            gate, up = product(x[t], gate_up[e]).to(x.dtype).chunk(2)
            out[t] += weight * product(silu(gate) * up, down[e]).to(x.dtype).double()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_has_one_scale_and_its_nearest_values(dtype):
    w = (torch.randn(2, 256, 384) * torch.rand(2, 256, 1) * 3).to(dtype)
    w[1, :128, :128] = 0
    q = QuantizedExperts.quantize(w, "fp8")
    assert q.shape == (2, 256, 384) and q.group_size == 128
    assert q.data.dtype == torch.float8_e4m3fn and q.scales.shape == (2, 2, 3) and q.scales.dtype == torch.float32
    blocks = w.float().unflatten(1, (2, 128)).unflatten(3, (3, 128))
    largest = blocks.abs().amax((2, 4))
    torch.testing.assert_close(q.scales, (largest / 448).clamp(min=2.0**-100), rtol=1e-6, atol=0)
    scaled = blocks / q.scales[:, :, None, :, None]
    assert torch.equal(q.data.double(), nearest(scaled).flatten(3).flatten(1, 2))
    assert torch.equal(q.dequantize(), plain_values(q)) and torch.equal(q.dequantize(torch.bfloat16), plain_values(q).bfloat16())
    assert torch.equal(q.expert(1).dequantize(), plain_values(q)[1:])


def test_error_of_a_weight():
    w = torch.randn(2, 256, 512)
    assert 0.024 < relative(QuantizedExperts.quantize(w, "fp8").dequantize(), w) < 0.028


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
def test_values_follow_the_rule(dtype, bound):
    x, routing, gate_up, down = problem(9, dtype=dtype)
    x[0, :128] = 0
    quantized = [QuantizedExperts.quantize(w, "fp8") for w in (gate_up, down)]
    out = moe_mlp(x, routing, *quantized)
    assert out.dtype == dtype and relative(out, by_hand(x, routing, *quantized)) < bound


def test_error_of_moe_mlp():
    x, routing, gate_up, down = problem(hidden=512, width=256)
    ours = moe_mlp(x, routing, *(QuantizedExperts.quantize(w, "fp8") for w in (gate_up, down)))
    assert 0.05 < relative(ours, moe_mlp(x, routing, gate_up, down)) <= 0.075


def test_kinds_may_differ():
    x, routing, gate_up, down = problem(9, dtype=torch.float32)
    mixed = moe_mlp(x, routing, QuantizedExperts.quantize(gate_up, "int8"), QuantizedExperts.quantize(down, "fp8"))
    assert 0.02 < relative(mixed, moe_mlp(x, routing, gate_up, down)) < 0.06


def test_explain_and_compile():
    x, routing, gate_up, down = problem(4, dtype=torch.float32)
    quantized = [QuantizedExperts.quantize(w, "fp8") for w in (gate_up, down)]
    text = explain(moe_mlp, x, routing, *quantized)
    assert "native serves int8 and int4 experts, got fp8" in text and "reference  chosen" in text
    mixed = quantized[0], QuantizedExperts.quantize(down, "int8")
    assert "triton serves int8 and int4 experts, or both weights in fp8, got fp8 and int8" in explain(moe_mlp, x, routing, *mixed)
    run = torch.compile(lambda x, q, d: moe_mlp(x, routing, q, d), fullgraph=True)
    torch.testing.assert_close(run(x, *quantized), moe_mlp(x, routing, *quantized), rtol=1e-5, atol=1e-5)


def test_errors():
    x, routing, gate_up, down = problem(4)
    good = [QuantizedExperts.quantize(w, "fp8") for w in (gate_up, down)]
    for text, wrong in [
        (r"w_down.data: expected dtype float8_e4m3fn, got int8", good[1]._replace(data=good[1].data.to(torch.int8))),
        (r"w_down.scales: expected dtype float32, got bfloat16", good[1]._replace(scales=good[1].scales.bfloat16())),
        (r"w_down.scales: expected shape \(6, 2, 1\), got \(6, 2, 2\)", good[1]._replace(scales=good[1].scales.repeat(1, 1, 2))),
    ]:
        with pytest.raises(ValueError, match=text):
            moe_mlp(x, routing, good[0], wrong)
    small = good[0]._replace(data=good[0].data[:, :, :96].contiguous())
    with pytest.raises(ValueError, match=r"w_gate_up.data: expected multiples of 128 rows and columns for fp8, got shape"):
        moe_mlp(x[:, :96], routing, small, good[1])
    for text, weight, group in [
        (r"group_size: expected 128 for fp8, got 64", gate_up, 64),
        (r"kind: expected a weight whose columns are a multiple of 128 for fp8, got 64 columns", gate_up[..., :64], None),
        (r"weight: expected a multiple of 128 rows for fp8, got shape \(6, 100, 256\)", gate_up[:, :100], None),
        (r"weight: expected finite values, got inf or NaN in expert 0", gate_up * float("inf"), None),
        (r"weight: expected finite values, got inf or NaN in expert 0", gate_up * float("nan"), None),
    ]:
        with pytest.raises(ValueError, match=text):
            QuantizedExperts.quantize(weight, "fp8", group)
    with pytest.raises(ValueError, match="rows: expected multiples of 128 for fp8, got 64 to 128"):
        good[0].set_rows(0, slice(64, 128), gate_up[0, 64:128])


@pytest.mark.parametrize("layout", ["per_expert", "merged"])
def test_loading_quantizes(layout, tmp_path):
    m, ids = random_model(WIDE, dtype=torch.bfloat16), torch.arange(12)
    exact = m(ids).logits
    m.save_pretrained(tmp_path, layout=layout, max_shard_size="400KB")
    loaded = Model.from_pretrained(tmp_path, expert_dtype="fp8")
    expected, state = m.quantize_experts("fp8").state_dict(), loaded.state_dict()
    assert state.keys() == expected.keys()
    for name, values in state.items():
        assert values.dtype == expected[name].dtype and torch.equal(values.view(torch.uint8), expected[name].view(torch.uint8)), name
    out = loaded(ids).logits
    assert torch.equal(out, m(ids).logits) and 0 < relative(out, exact) < 0.3
    assert "fp8" in repr(loaded.layers[1].mlp)
    moved = loaded.to(torch.float64).layers[1].mlp.w_down  # activations and other weights only
    assert moved.data.dtype == torch.float8_e4m3fn and moved.scales.dtype == torch.float32
    with pytest.raises(ValueError, match="kind: expected a weight whose columns are a multiple of 128 for fp8, got 64"):
        random_model(replace(WIDE, moe_intermediate_size=64)).quantize_experts("fp8")
