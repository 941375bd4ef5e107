"""Model: official outputs (golden) through both backends, initialisation, recomputation."""

import functools
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from llada_kernels import Config, DiffusionMask, Model, use_backend
from llada_kernels._tensor_names import tensor_slots
from llada_kernels.nn import Router

from .models import GOLDEN, LLADA2, VARIANTS, random_model


@pytest.fixture(params=["native", "reference"], autouse=True)
def backend(request):
    with use_backend(request.param):
        yield request.param


@functools.cache
def golden(case):
    return json.loads((GOLDEN / case / "case.json").read_text()), load_file(GOLDEN / case / "io.safetensors")


@functools.cache
def golden_model(case, dtype=torch.float32):
    return Model.from_pretrained(GOLDEN / case, dtype=dtype).requires_grad_(False)


def close(actual, expected, tolerance, name=""):
    torch.testing.assert_close(actual, expected, **tolerance, msg=lambda text: f"{name}: {text}")


def runs(*cases):
    return [
        pytest.param(case, run["name"], id=f"{case}-{run['name']}")
        for case in cases
        for run in golden(case)[0]["runs"]
        if f"{run['name']}.input_ids" in golden(case)[1]
    ]


# --- official outputs


@pytest.mark.parametrize(("case", "run"), runs("forward_full", "forward_block_causal", "forward_hd128", "lladamoe"))
def test_forward_is_the_official_one(case, run):
    description, io = golden(case)
    m = golden_model(case)
    scale = next(r for r in description["runs"] if r["name"] == run).get("embed_scale")
    if scale is not None:
        m = Model.from_pretrained(GOLDEN / case).requires_grad_(False)
        m.embed_tokens.weight *= scale
    tolerance = description["tolerance"]
    state = tolerance.get("hidden_states", {"atol": 1e-4, "rtol": 1e-4})
    router = tolerance.get("router_logits", {"atol": 3e-5, "rtol": 1e-4})
    parts = {}
    for i, layer in enumerate(m.layers):
        layer.attention.register_forward_hook(lambda _m, _i, out, i=i: parts.update({f"attn_out.{i}": out}))
        layer.mlp.register_forward_hook(lambda _m, _i, out, i=i: parts.update({f"mlp_out.{i}": out}))
    ids, mask = io[f"{run}.input_ids"], io.get(f"{run}.mask")
    routers = {}
    out = m(
        ids, attention_mask=None if mask is None else mask[None, None], position_ids=io[f"{run}.position_ids"],
        output_hidden_states=True, output_router_logits=True,
    )  # fmt: skip
    m.backbone(
        ids, mask=None if mask is None else mask.expand(len(ids), -1, -1), position_ids=io[f"{run}.position_ids"], router_outputs=routers
    )
    for layer in m.layers:
        layer.attention._forward_hooks.clear()
        layer.mlp._forward_hooks.clear()
    close(out.logits, io[f"{run}.logits"], tolerance.get("logits") or tolerance["fp32_logits"], "logits")
    assert out.logits.dtype == torch.float32
    assert len(out.hidden_states) == m.config.num_hidden_layers + 1
    checked = 0
    for i, hidden in enumerate(out.hidden_states):
        if (expected := io.get(f"{run}.hidden_states.{i}")) is not None:
            close(hidden, expected, state, f"hidden {i}")
            checked += 1
    for name, part in parts.items():
        if (expected := io.get(f"{run}.{name}")) is not None:
            close(part.view(expected.shape), expected, state, name)
    layers = [i for i, moe in enumerate(m.config.moe_layers) if moe]
    assert len(out.router_logits) == len(layers) and list(routers) == layers and checked
    for layer, (logits, chosen) in zip(layers, out.router_logits, strict=True):
        close(logits, io[f"{run}.router_logits.{layer}"], router, f"router {layer}")
        expected_ids, order = io[f"{run}.topk_idx.{layer}"].sort(-1)
        ids_sorted, ours = chosen.sort(-1)
        assert torch.equal(ids_sorted, expected_ids)
        weights = routers[layer].routing.topk_weights.view(ours.shape).gather(-1, ours)
        close(weights, io[f"{run}.topk_weight.{layer}"].gather(-1, order), router, f"weights {layer}")


def test_merged_checkpoint_gives_the_official_logits(tmp_path):
    case, io = golden("forward_full")
    (tmp_path / "config.json").write_text((GOLDEN / "forward_full" / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((GOLDEN / "forward_full" / "model_merged.safetensors").read_bytes())
    logits = Model.from_pretrained(tmp_path)(io["full.input_ids"]).logits
    close(logits.detach(), io["full.logits"], case["tolerance"]["logits"])


@pytest.mark.parametrize(("case", "run"), runs("forward_block_causal"))
def test_every_way_to_state_a_block_causal_mask(case, run):
    description, io = golden(case)
    ids, dense = io[f"{run}.input_ids"], io[f"{run}.mask"]
    batch, length = ids.shape
    size = next(r["block_size"] for r in description["runs"] if r["name"] == run)
    cu = torch.arange(batch + 1) * length
    additive = torch.zeros(batch, 1, length, length).masked_fill(~dense, -torch.inf)
    smallest = torch.zeros(1, 1, length, length, dtype=torch.bfloat16).masked_fill(~dense, torch.finfo(torch.bfloat16).min)
    ways = [
        {"mask": DiffusionMask.block_causal(cu, size)}, {"mask": dense.expand(batch, -1, -1)}, {"attention_mask": additive},
        {"attention_mask": smallest}, {"attention_mask": dense.expand(batch, 1, -1, -1)},
    ]  # fmt: skip
    for way in ways:
        close(golden_model(case)(ids, **way).logits, io[f"{run}.logits"], description["tolerance"]["logits"])
    packed = golden_model(case)(ids.flatten(), mask=ways[0]["mask"])
    close(packed.logits.view(batch, length, -1), io[f"{run}.logits"], description["tolerance"]["logits"])


@pytest.mark.parametrize("run", ["full", "b32"])
def test_bf16_error_is_that_of_bf16(run):
    description, io = golden("forward_hd128")
    noise = next(r["bf16_vs_fp32"]["mean"] for r in description["runs"] if r["name"] == run)
    mask = io.get(f"{run}.mask")
    m = golden_model("forward_hd128", torch.bfloat16)
    logits = m(io[f"{run}.input_ids"], attention_mask=None if mask is None else mask[None, None]).logits
    error = (logits - io[f"{run}.logits"]).abs().mean()
    assert error <= 1.5 * noise, f"mean error {error:.4f}, that of the official code in bf16 {noise:.4f}"


@pytest.mark.parametrize("run", golden("router")[0]["runs"], ids=lambda r: r["name"])
def test_router_is_the_official_one(run):
    case, io = golden("router")
    name = run["name"]
    config = replace(
        Config.from_pretrained(GOLDEN / "forward_full"), hidden_size=run["hidden_size"], num_experts=run["num_experts"],
        n_group=run["n_group"], topk_group=run["topk_group"], num_experts_per_tok=run["num_experts_per_tok"],
        routed_scaling_factor=run["routed_scaling_factor"],
    )  # fmt: skip
    router = Router(config)
    router.weight.data = io[f"{name}.weight"]
    router.expert_bias.copy_(io[f"{name}.expert_bias"])
    logits, routing = router(io[f"{name}.hidden"])
    close(logits.detach(), io[f"{name}.logits"], case["tolerance"]["logits"])
    ids, order = routing.topk_ids.long().sort(-1)
    expected, expected_order = io[f"{name}.topk_idx"].sort(-1)
    assert torch.equal(ids, expected)
    weights = io[f"{name}.topk_weight"].gather(-1, expected_order)
    close(routing.topk_weights.detach().gather(-1, order), weights, case["tolerance"]["topk_weight"])


def test_lladamoe_mixes_its_experts_in_bf16_as_the_official_code_does():
    """Its sparse layer, written out: logits in bf16, softmax in fp32, chosen weights rounded to bf16 before they scale the experts."""
    layer = golden_model("lladamoe", torch.bfloat16).layers[1].mlp
    hidden, k = layer.router.weight.shape[1], layer.router.config.num_experts_per_tok
    x = torch.randn(200, hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    seen = []
    y = layer(x, seen.append)
    chosen, weights = seen[0].routing.topk_ids.long(), seen[0].routing.topk_weights

    logits = F.linear(x, layer.router.weight.bfloat16())
    assert torch.equal(seen[0].logits, logits.float())
    official, official_ids = logits.softmax(-1, dtype=torch.float32).topk(k)
    tied = (logits.float().sort(descending=True).values.diff(dim=-1)[:, :k] == 0).any(-1)  # which of equal ones is chosen is open
    assert torch.equal(chosen[~tied], official_ids[~tied]) and tied.float().mean() < 0.5
    assert torch.equal(weights, weights.bfloat16().float())
    assert (weights == official.bfloat16().float()).float().mean() > 0.99, "fp32 softmaxes may differ in their last bit"
    expected = torch.zeros(len(x), hidden, dtype=torch.float64)
    for t in range(len(x)):
        for e, w in zip(chosen[t].tolist(), weights[t].double(), strict=True):
            gate, up = (layer.w_gate_up[e].double() @ x[t].double()).chunk(2)
            expected[t] += w * (layer.w_down[e].double() @ (F.silu(gate) * up))
    torch.testing.assert_close(y.double(), expected, atol=float(2**-7 * expected.abs().max()), rtol=0)


def test_llada2_keeps_router_weights_in_fp32():
    m = golden_model("forward_hd128", torch.bfloat16)
    layer = next(layer.mlp for layer, moe in zip(m.layers, m.config.moe_layers, strict=True) if moe)
    weights = layer.router(torch.randn(50, m.config.hidden_size).bfloat16()).routing.topk_weights
    assert weights.dtype == torch.float32 and (weights != weights.bfloat16().float()).any()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("run", golden("train_block_diffusion")[0]["runs"], ids=lambda r: r["name"])
def test_training_layout_is_the_official_one(run, recompute):
    case, io = golden("train_block_diffusion")
    name, length = run["name"], run["L"]
    m = Model.from_pretrained(GOLDEN / "train_block_diffusion").train()
    m.gradient_checkpointing = recompute
    xt, x0, labels = (io[f"{name}.{k}"] for k in ("xt", "x0", "labels"))
    losses = []
    for b in range(run["batch"]):  # a mask describes one pack
        lengths = run["docs"][b] if run["docs"] else [length]
        cu = torch.tensor([0, *lengths]).cumsum(0)
        mask = DiffusionMask.block_diffusion(cu, run["block_size"], block_origin="row" if name == "packed_unaligned" else "document")
        routers = {}
        hidden = m.backbone(torch.cat([xt[b], x0[b]]), mask=mask, router_outputs=routers)
        assert sorted(routers) == [1, 2]
        logits = F.linear(hidden[:length], m.lm_head_weight).float()
        close(logits.detach(), io[f"{name}.logits_xt"][b], case["tolerance"]["logits"])
        losses.append(F.cross_entropy(logits, labels[b], ignore_index=-100, reduction="none"))
    token_losses = torch.stack(losses)
    torch.testing.assert_close(token_losses.detach(), io[f"{name}.token_loss"], rtol=2e-4, atol=2e-4)
    loss = token_losses.sum() / (labels != -100).sum()
    torch.testing.assert_close(loss.detach(), io[f"{name}.loss"][0], rtol=case["tolerance"]["loss"]["rtol"], atol=0)
    loss.backward()
    parameters, slots, checked = dict(m.named_parameters()), tensor_slots(m.config), 0
    for official, slot in slots.items():
        if (expected := io.get(f"{name}.grad.{official}")) is None:
            continue
        gradient = slot.of(parameters[slot.parameter].grad)
        error = (gradient - expected).abs().max()
        assert error <= 2e-4 * expected.abs().max() + 1e-7, (official, float(error))
        checked += 1
    assert checked > 40 if name == "packed_aligned" else checked == 0, "gradients are stored for one run"
    assert not m.embed_tokens.weight.grad[m.config.pad_token_id].any()
    total = torch.sqrt(sum(p.grad.double().square().sum() for p in m.parameters()))
    torch.testing.assert_close(float(total), run["grad_total_norm"], rtol=1e-4, atol=0)


def test_training_mask_as_dense_rows_gives_the_same_logits():
    case, io = golden("train_block_diffusion")
    ids = torch.cat([io["packed_aligned.xt"], io["packed_aligned.x0"]], 1)
    m = golden_model("train_block_diffusion")
    out = m(ids, mask=io["packed_aligned.mask"], position_ids=io["packed_aligned.position_ids"])
    close(out.logits[:, :64], io["packed_aligned.logits_xt"], case["tolerance"]["logits"])


# --- the module


def test_initialisation():
    torch.manual_seed(3)
    m = Model(replace(LLADA2, initializer_range=0.05, use_qkv_bias=True), dtype=torch.bfloat16)
    assert m.dtype == torch.bfloat16 and m.device.type == "cpu" and m.training
    for name, p in m.named_parameters():
        if name.endswith("norm.weight"):
            assert (p == 1).all(), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        else:
            assert abs(float(p.detach().float().std()) / 0.05 - 1) < 0.1, name
    assert all((b == 0).all() and b.dtype == torch.float32 for b in m.buffers())
    with torch.device("meta"):
        assert Model(LLADA2).device.type == "meta"
    assert {n for n, _ in m.named_buffers()} == {f"layers.{i}.mlp.router.expert_bias" for i in (1, 2)}
    assert Model(VARIANTS["tied"]).lm_head_weight is not None


def test_gradient_checkpointing_changes_nothing():
    m = random_model(LLADA2).requires_grad_(True)
    ids = torch.randint(320, (2, 9))
    gradients = []
    for recompute in (False, True):
        m.zero_grad()
        m.gradient_checkpointing = recompute
        m(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in m.named_parameters()})
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


def test_router_outputs_are_differentiable_and_biases_are_not_trained():
    m = random_model(LLADA2).requires_grad_(True)
    routers = {}
    m.backbone(torch.randint(320, (7,)), router_outputs=routers)
    routers[2].logits.square().sum().backward()
    assert m.layers[2].mlp.router.weight.grad.abs().sum() > 0
    assert not m.layers[2].mlp.router.expert_bias.requires_grad


def test_the_whole_model_is_one_graph():
    m = random_model(LLADA2).requires_grad_(True)
    ids, mask = torch.randint(320, (24,)), DiffusionMask.block_causal([0, 10, 24], 4)

    def loss(model, tokens):
        return model(tokens, mask=mask, labels=tokens).loss

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        m.zero_grad()
        function(m, ids).backward()
        gradients.append([p.grad.clone() for p in m.parameters()])
    for plain, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("config", [LLADA2, VARIANTS["biases"]])
def test_the_last_layer_may_serve_the_first_tokens_only(config):
    """Same states and gradients as without num_outputs; a training step reads only the noisy tokens."""
    m = random_model(config).requires_grad_(True)
    mask = DiffusionMask.block_diffusion([0, 11, 20], 4, views=2)
    ids, count = torch.randint(0, 300, (60,)), 40
    results = []
    for outputs in (None, count):
        m.zero_grad()
        routers = {}
        hidden = m.backbone(ids, mask=mask, num_outputs=outputs, router_outputs=routers)
        hidden[:count].square().sum().backward()
        grads = {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}
        results.append((hidden[:count].detach(), grads, routers[m.config.num_hidden_layers - 1].logits.shape[0]))
    close(results[1][0], results[0][0], {"atol": 1e-5, "rtol": 1e-5})
    assert results[0][1].keys() == results[1][1].keys() and (results[0][2], results[1][2]) == (60, 40)
    for name, grad in results[0][1].items():
        close(results[1][1][name], grad, {"atol": 1e-5 * float(grad.abs().max() + 1), "rtol": 1e-4}, name)
    with pytest.raises(ValueError, match="num_outputs: expected None"):
        m.backbone(ids, mask=(torch.arange(60) % 3 == 0).expand(1, 60, 60), num_outputs=3)  # more than two intervals
