from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import silu

from llada_kernels import Model, explain
from llada_kernels.ops import QuantizedExperts, Routing, moe_mlp, quantized_experts
from llada_kernels.ops.moe_mlp import BACKENDS

from ..backends import cpu_backends
from ..checkpoints import LLADA2
from ..host_reads import host_reads
from ..models import LLADA2 as CONFIG
from ..models import random_model

NAMES = cpu_backends(BACKENDS)
KINDS = ["int8", "int4"]
DTYPES = [torch.float32, torch.bfloat16]
WIDE = replace(CONFIG, hidden_size=64, moe_intermediate_size=64, shared_expert_intermediate_size=64)


def plain_values(q: QuantizedExperts) -> torch.Tensor:
    """The weights that the two buffers describe, column by column."""
    experts, rows, columns = q.shape
    out = torch.empty(experts, rows, columns)
    for k in range(columns):
        if q.kind == "int8":
            integer = q.data[..., k].float()
        else:
            byte = q.data[..., k // 32 * 16 + k % 16].int()
            integer = ((byte & 15) if k % 32 < 16 else (byte >> 4)).float() - 8
        out[..., k] = integer * q.scales[..., k // q.group_size].float()
    return out


def relative(ours, exact):
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def by_hand(x, routing, gate_up, down):
    """In fp64, token by token."""
    total = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        for e, weight in zip(routing.topk_ids[t].tolist(), routing.topk_weights[t].tolist(), strict=True):
            gate, up = (gate_up[e].double() @ x[t].double()).chunk(2)
            total[t] += weight * (down[e].double() @ (silu(gate) * up))
    return total


def problem(tokens=24, experts=6, top_k=3, hidden=256, width=128, dtype=torch.bfloat16):
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).int()
    routing = Routing.from_topk(ids, torch.rand(tokens, top_k) + 0.1, experts)
    x = torch.randn(tokens, hidden).to(dtype)
    gate_up = (torch.randn(experts, 2 * width, hidden) / hidden**0.5).to(dtype)
    return x, routing, gate_up, (torch.randn(experts, hidden, width) / width**0.5).to(dtype)


def test_exported_and_described():
    q = QuantizedExperts.quantize(torch.randn(3, 10, 128), "int4", 64)
    assert q.shape == (3, 10, 128) and q.group_size == 64 and q.data.dtype == torch.uint8 and q.scales.dtype == torch.bfloat16
    assert q.data.shape == (3, 10, 64) and q.scales.shape == (3, 10, 2)
    assert q.expert(1).data.data_ptr() == q.data[1].data_ptr() and q.expert(1).shape == (1, 10, 128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind,group,bound", [("int8", None, 0.0056), ("int8", 128, 0.0068), ("int4", None, 0.084), ("int4", 64, 0.093)])
def test_error_of_a_weight(kind, group, bound, dtype):
    w = (torch.randn(2, 64, 512) * torch.rand(2, 64, 1) * 3).to(dtype)
    q = QuantizedExperts.quantize(w, kind, group)
    assert torch.equal(q.dequantize(), plain_values(q))
    assert torch.equal(q.dequantize(torch.bfloat16), plain_values(q).bfloat16())
    assert 0.5 * bound < relative(q.dequantize(), w) < bound
    group = group or 32
    # No group is left with more than half a step at its extremes (int4: than the fit's trade between tails and steps).
    worst = (q.dequantize() - w.float()).unflatten(-1, (-1, group)).abs().amax(-1)
    assert (worst <= w.float().unflatten(-1, (-1, group)).abs().amax(-1) * (0.0045 if kind == "int8" else 0.25)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_special_groups(kind):
    w = torch.zeros(1, 4, 128)
    w[0, 1] = 3.0
    w[0, 2, 5] = -2.5e-30
    w[0, 3, 70] = 1e30
    exact = QuantizedExperts.quantize(w, kind).dequantize()
    torch.testing.assert_close(exact, w, rtol=5e-3, atol=0)
    grid = torch.randint(-7, 8, (1, 5, 128)).float()
    grid[..., ::32] = -8.0 if kind == "int4" else -127.0
    assert torch.equal(QuantizedExperts.quantize(grid * 0.25, kind).dequantize(), grid * 0.25)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("kind,bound", [("int8", 0.012), ("int4", 0.16)])
def test_error_of_moe_mlp(backend, kind, bound):
    x, routing, gate_up, down = problem(hidden=512, width=256)
    exact = moe_mlp(x, routing, gate_up, down, backend=backend)
    ours = moe_mlp(x, routing, *(QuantizedExperts.quantize(w, kind) for w in (gate_up, down)), backend=backend)
    assert ours.dtype == torch.bfloat16 and 0.3 * bound < relative(ours, exact) <= bound


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kinds", [("int8", "int8"), ("int4", "int4"), ("int8", "int4")])
@pytest.mark.parametrize("tokens", [1, 9, 30, 150])
def test_equals_the_dequantized_weights(backend, dtype, kinds, tokens):
    """Dequantised values are rounded to the dtype of x and used as such weights; but not where native has few rows of bf16 (next test)."""
    x, routing, gate_up, down = problem(tokens, dtype=dtype)
    quantized = [QuantizedExperts.quantize(w, k) for w, k in zip((gate_up, down), kinds, strict=True)]
    ours = moe_mlp(x, routing, *quantized, backend=backend)
    plain = [plain_values(q).to(dtype) for q in quantized]
    if backend != "native" or dtype == torch.float32 or routing.offsets.diff().min() > 4:
        assert torch.equal(ours, moe_mlp(x, routing, *plain, backend=backend))
    assert relative(ours, by_hand(x, routing, *plain)) < (1e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("kinds", [("int8", "int8"), ("int4", "int4"), ("int8", "int4")])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("experts,hidden", [(72, 256), (36, 384), (24, 1024)])  # 1, 2 and 3 rows each, in the mean
def test_few_rows_are_nearer_to_the_integers_than_bf16_weights_are(experts, hidden, group, kinds):
    """With few rows of an expert native may multiply the integers, unrounded, with rows of 16 bits a column."""
    x, routing, gate_up, down = problem(24, experts=experts, hidden=hidden)
    x[:, 3] *= 50  # an outlier coarsens its group
    quantized = [QuantizedExperts.quantize(w, k, group) for w, k in zip((gate_up, down), kinds, strict=True)]
    exact = by_hand(x, routing, *(q.dequantize() for q in quantized))
    rounded = moe_mlp(x, routing, *(q.dequantize(torch.bfloat16) for q in quantized), backend="native")
    ours = moe_mlp(x, routing, *quantized, backend="native")
    if group != 128 and torch.ops.llada_kernels.cpu_level() in ("avx512_bf16", "amx"):
        assert relative(ours, exact) < relative(rounded, exact)
    else:
        assert torch.equal(ours, rounded)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_few_rows_that_are_not_finite_or_zero(kind, group, bad):
    x, routing, gate_up, down = problem(6)
    x[1] = 0
    x[2, 40:80] = 0
    x[3] *= 1e-32
    x[4] *= 1e30
    quantized = [QuantizedExperts.quantize(w, kind, group) for w in (gate_up, down)]
    expected = moe_mlp(x, routing, *quantized, backend="native")
    assert expected[:4].isfinite().all() and not expected[1].any() and expected[3].abs().max() < 1e-30
    x[0, 77] = bad
    ours = moe_mlp(x, routing, *quantized, backend="native")
    assert ours[0].isnan().all() and torch.equal(ours[1:].nan_to_num(), expected[1:].nan_to_num())


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_any_number_of_threads(kind, num_threads):
    x, routing, gate_up, down = problem(70)
    args = (x, routing, *(QuantizedExperts.quantize(w, kind) for w in (gate_up, down)))
    torch.set_num_threads(1)
    expected = moe_mlp(*args, backend="native")
    torch.set_num_threads(num_threads)
    assert all(torch.equal(moe_mlp(*args, backend="native"), expected) for _ in range(3))


@pytest.mark.parametrize("kind", KINDS)
def test_operator_contract_and_compile(kind):
    x, routing, gate_up, down = problem(5, hidden=64, width=64, dtype=torch.float32)
    quantized = [QuantizedExperts.quantize(w, kind) for w in (gate_up, down)]
    tensors = [t for q in quantized for t in (q.data, q.scales)]
    args = (x, routing.topk_weights, routing.offsets, routing.permutation, *tensors)
    torch.library.opcheck(torch.ops.llada_kernels.moe_mlp_quantized, args)
    for name in NAMES:
        run = torch.compile(lambda x, q, d, name=name: moe_mlp(x, routing, q, d, backend=name), fullgraph=True)
        torch.testing.assert_close(run(x, *quantized), moe_mlp(x, routing, *quantized, backend=name), rtol=1e-5, atol=1e-5)


def test_explain():
    x, routing, gate_up, down = problem(4, hidden=64, width=64)
    quantized = [QuantizedExperts.quantize(w, "int8") for w in (gate_up, down)]
    assert "native     chosen" in explain(moe_mlp, x, routing, *quantized)
    text = explain(moe_mlp, x.double(), routing, *quantized)
    assert "native serves float32, bfloat16, got torch.float64" in text and "reference  chosen" in text


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_values_are_looked_at_once_and_do_not_depend_on_the_chunks(kind, monkeypatch):
    """A GPU takes an expert at a time, a CPU as much as its cache holds: the bits are the same."""
    weight = torch.randn(3, 384, 256)
    with host_reads("llada_kernels/ops/quantized_experts") as reads:
        whole = QuantizedExperts.quantize(weight, kind)
    assert len(reads) == 1
    for chunk in (1, 1 << 30):
        monkeypatch.setattr(quantized_experts, "_CHUNK", chunk)
        again = QuantizedExperts.quantize(weight, kind)
        assert torch.equal(again.data.view(torch.uint8), whole.data.view(torch.uint8)) and torch.equal(again.scales, whole.scales)
    with host_reads("llada_kernels/ops/quantized_experts") as reads:
        again.set_rows(1, slice(128, 384), weight[0, :256])
    assert len(reads) == 1
    assert torch.equal(again.data[1, 128:].view(torch.uint8), whole.data[0, :256].view(torch.uint8))
    with pytest.raises(ValueError, match="rows: expected a slice without a step, got slice"):
        again.set_rows(1, slice(0, 256, 2), weight[0, :128])
    weight[1, 200, 7] = float("nan")
    with pytest.raises(ValueError, match="weight: expected finite values, got inf or NaN in expert 1"):
        QuantizedExperts.quantize(weight, kind)


def test_errors():
    x, routing, gate_up, down = problem(4, hidden=64, width=64)
    good = QuantizedExperts.quantize(gate_up, "int8"), QuantizedExperts.quantize(down, "int8")
    for text, args in [
        (r"w_down: expected both weights or none quantised, got one of each", (x, routing, good[0], down)),
        (r"w_gate_up: expected shape \(6, 128, 32\), got \(6, 128, 64\)", (x[:, :32], routing, *good)),
        (r"w_gate_up.kind: expected one of int8, int4, fp8, got 'fp4'", (x, routing, good[0]._replace(kind="fp4"), good[1])),
        (r"w_gate_up.data: expected dtype uint8, got int8", (x, routing, good[0]._replace(kind="int4"), good[1])),
        (r"w_down.scales: expected dtype bfloat16, got float32", (x, routing, good[0], good[1]._replace(scales=good[1].scales.float()))),
        (
            r"w_down.scales: expected groups of a multiple of 32 that divides 64 columns, got 8 groups",
            (x, routing, good[0], good[1]._replace(scales=good[1].scales.repeat(1, 1, 4))),
        ),
    ]:
        with pytest.raises(ValueError, match=text):
            moe_mlp(*args)
    for text, args in [
        (r"kind: expected one of int8, int4, fp8, got 'int2'", (gate_up, "int2")),
        (r"group_size: expected one of 32, 64, 128, got 48", (gate_up, "int8", 48)),
        (r"group_size: expected a divisor of the 64 columns of the weight, got 128", (gate_up, "int8", 128)),
        (r"weight: expected 3 dimensions, got shape \(64, 64\)", (down[0], "int8")),
        (r"weight: expected finite values, got inf or NaN in expert 0", (gate_up * float("inf"), "int8")),
        (r"weight: expected finite values, got inf or NaN in expert 0", (gate_up * float("nan"), "int4")),
    ]:
        with pytest.raises(ValueError, match=text):
            QuantizedExperts.quantize(*args)
    raw = [x, routing.topk_weights, routing.offsets, routing.permutation, good[0].data, good[0].scales, good[1].data, good[1].scales]
    for index, text in ((5, "gate_up_scales: expected"), (6, "down_data: expected shape"), (7, "down_scales: expected")):
        with pytest.raises((ValueError, RuntimeError), match=text):
            torch.ops.llada_kernels.moe_mlp_quantized(*raw[:index], raw[index][:, :-1].contiguous(), *raw[index + 1 :])


@pytest.mark.parametrize("backend", NAMES)
def test_gradients_are_refused(backend):
    x, routing, gate_up, down = problem(4, hidden=64, width=64)
    quantized = [QuantizedExperts.quantize(w, "int8") for w in (gate_up, down)]
    x.requires_grad_()
    with pytest.raises(ValueError, match=r"x: expected no gradient .* torch.no_grad\(\), or train with unquantised weights"):
        moe_mlp(x, routing, *quantized, backend=backend)
    weighted = routing._replace(topk_weights=routing.topk_weights.clone().requires_grad_())
    with pytest.raises(ValueError, match="routing.topk_weights: expected no gradient"):
        moe_mlp(x.detach(), weighted, *quantized, backend=backend)
    with torch.no_grad():
        assert not moe_mlp(x, weighted, *quantized, backend=backend).requires_grad


def model(dtype=torch.float32):
    return random_model(WIDE, dtype=dtype)


@pytest.mark.parametrize("kind,bound", [("int8", 0.15), ("int4", 0.8)])
def test_quantized_model(kind, bound, tmp_path):
    m, ids = model(), torch.arange(40)
    exact = m(ids).logits
    sizes = {name: (t.dtype, t.element_size()) for name, t in m.state_dict().items()}
    quantized = model().requires_grad_(True).quantize_experts(kind)
    out = quantized(ids).logits  # needs no torch.no_grad()
    assert not out.requires_grad and 0 < relative(out, exact) < bound
    state = quantized.state_dict()
    names = {n for n in sizes if n.endswith(("mlp.w_gate_up", "mlp.w_down"))}
    assert names and state.keys() == (sizes.keys() - names) | {f"{n}.{part}" for n in names for part in ("data", "scales")}
    moved = quantized.to(torch.float64)  # activations and other weights only
    assert moved.layers[1].mlp.w_down.scales.dtype == torch.bfloat16 and relative(moved(ids).logits, out) < 1e-5
    with pytest.raises(ValueError, match="expected unquantised experts, got a model whose layers.1.mlp.w_gate_up is quantised"):
        quantized.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=f"kind: expected experts that are not quantised yet, got {kind} ones"):
        quantized.quantize_experts(kind)
    with pytest.raises(ValueError, match="group_size: expected a divisor of the 64 columns"):
        model().quantize_experts(kind, group_size=128)


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["per_expert", "merged"])
def test_loading_quantizes(kind, layout, dtype, tmp_path):
    m = model(torch.bfloat16)
    m.save_pretrained(tmp_path, layout=layout, max_shard_size="200KB")
    loaded = Model.from_pretrained(tmp_path, dtype=dtype, expert_dtype=kind)
    expected = m.quantize_experts(kind).to(dtype).state_dict() if dtype else m.quantize_experts(kind).state_dict()
    state = loaded.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[n], expected[n]) for n in state)
    assert not any("experts" in name and "shared" not in name for name in loaded.load_report.converted)
    ids = torch.arange(12)
    assert torch.equal(loaded(ids).logits, m(ids).logits)
    assert "int" in repr(loaded.layers[1].mlp)


def test_loading_refuses_before_it_allocates(tmp_path):
    with pytest.raises(ValueError, match="expert_dtype: expected one of int8, int4, fp8 or None, got 'fp4'"):
        Model.from_pretrained(tmp_path, expert_dtype="fp4")
    with pytest.raises(ValueError, match="^expert_dtype: expected a weight whose columns are a multiple of 32 for int4, got 16"):
        Model.from_pretrained(LLADA2.parent, expert_dtype="int4")
    with pytest.raises(ValueError, match="^kind: expected a weight whose columns are a multiple of 32 for int4, got 16"):
        Model.from_pretrained(LLADA2.parent).quantize_experts("int4")


def test_a_quantised_model_is_not_initialised_anew():
    m = model(torch.float32).quantize_experts("int8")
    before = {name: value.clone() for name, value in m.state_dict().items()}
    with pytest.raises(ValueError, match="reset_parameters: expected a model that is not quantised, got quantised experts"):
        m.reset_parameters()
    assert all(torch.equal(value, before[name]) for name, value in m.state_dict().items())


PEAK = """
import sys, threading
import torch
from llada_kernels import Model
def now():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
Model.from_pretrained(sys.argv[2], expert_dtype="int8")  # code is loaded
before, peak, done = now(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, now())
thread = threading.Thread(target=watch); thread.start()
model = Model.from_pretrained(sys.argv[1], expert_dtype="int8")
done.set(); thread.join()
print(peak - before, sum(t.numel() * t.element_size() for t in model.state_dict().values()))
"""


def test_full_weights_are_never_in_memory(tmp_path):
    """Peak memory of loading: the quantised model and a few megabytes, for a layout that stores 33 MB of experts as one tensor."""
    widths = {"hidden_size": 256, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
    config = replace(WIDE, **widths, num_experts=64, moe_layers=(False, True, True))
    random_model(config, dtype=torch.float32).save_pretrained(tmp_path / "big", layout="merged")
    model().save_pretrained(tmp_path / "small")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "big"), str(tmp_path / "small")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    assert size < 35e6 and peak < size + 12e6, (peak, size)


LEVELS = """
import torch
from llada_kernels.ops import QuantizedExperts, Routing, moe_mlp
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
    x, gate_up, down = torch.randn(60, 128).to(dtype), torch.randn(4, 128, 128) / 11, torch.randn(4, 128, 64) / 8
    routing = Routing.from_topk(torch.randint(0, 4, (60, 1)).int().clamp(max=2), torch.ones(60, 1), 4)
    for kind in ("int8", "int4"):
        quantized = [QuantizedExperts.quantize(w, kind, 32) for w in (gate_up, down)]
        ours, exact = (moe_mlp(x, routing, *quantized, backend=b) for b in ("native", "reference"))
        torch.testing.assert_close(ours, exact, atol=tolerance, rtol=tolerance)
        few = Routing.from_topk(routing.topk_ids[:5], routing.topk_weights[:5], 4)
        ours, exact = (moe_mlp(x[:5], few, *quantized, backend=b) for b in ("native", "reference"))
        torch.testing.assert_close(ours, exact, atol=tolerance, rtol=tolerance)
"""


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated"])
def test_every_cpu_level(level):
    environment = {**os.environ, "LLADA_KERNELS_CPU": level, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LEVELS], env=environment, capture_output=True, text=True)
    if "this machine has no" in done.stderr:
        pytest.skip(f"this machine has no {level}")
    assert done.returncode == 0, done.stderr
