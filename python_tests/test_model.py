"""Model: official outputs (golden) through both backends, and an independent transcription for what they leave out."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from llada_kernels import Config, DiffusionMask, Model, use_backend
from llada_kernels._tensor_names import tensor_slots
from llada_kernels.nn import Router

GOLDEN = Path(__file__).parent / "golden"


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
    assert not m.embed_weight.grad[m.config.pad_token_id].any()
    total = torch.sqrt(sum(p.grad.double().square().sum() for p in m.parameters()))
    torch.testing.assert_close(float(total), run["grad_total_norm"], rtol=1e-4, atol=0)


def test_training_mask_as_dense_rows_gives_the_same_logits():
    case, io = golden("train_block_diffusion")
    ids = torch.cat([io["packed_aligned.xt"], io["packed_aligned.x0"]], 1)
    m = golden_model("train_block_diffusion")
    out = m(ids, mask=io["packed_aligned.mask"], position_ids=io["packed_aligned.position_ids"])
    close(out.logits[:, :64], io["packed_aligned.logits_xt"], case["tolerance"]["logits"])


# --- an independent transcription, for options that no golden case has


def transcription(state, c, ids, visible, positions):
    """The official forward, one expert at a time, from the official tensor names; one row of tokens, fp64."""
    lladamoe = c.family == "lladamoe"
    w = {k: v.double() for k, v in state.items()}

    def norm(x, weight):
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps))

    def rotate(x):
        r = c.rotary_dim
        frequency = 1.0 / c.rope_theta ** (torch.arange(0, r, 2).double() / r)
        angle = torch.cat([positions[:, None] * frequency] * 2, -1)[:, None]
        a, b = x[..., : r // 2], x[..., r // 2 : r]
        return torch.cat([x[..., :r] * angle.cos() + torch.cat([-b, a], -1) * angle.sin(), x[..., r:]], -1)

    def mlp(x, prefix):
        return (F.silu(x @ w[prefix + "gate_proj.weight"].T) * (x @ w[prefix + "up_proj.weight"].T)) @ w[prefix + "down_proj.weight"].T

    embedding = w["model.embed_tokens.weight" if lladamoe else "model.word_embeddings.weight"]
    h = embedding[ids]
    heads, kv, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    for i, moe in enumerate(c.moe_layers):
        p = f"model.layers.{i}."
        x = norm(h, w[p + "input_layernorm.weight"])
        attention = p + ("self_attn." if lladamoe else "attention.")
        if lladamoe:
            q, k, v = (F.linear(x, w[attention + f"{n}_proj.weight"], w.get(attention + f"{n}_proj.bias")) for n in "qkv")
            dense, qn, kn = "o_proj", "q_norm", "k_norm"
        else:
            qkv = F.linear(x, w[attention + "query_key_value.weight"], w.get(attention + "query_key_value.bias"))
            q, k, v = qkv.split([heads * d, kv * d, kv * d], -1)
            dense, qn, kn = "dense", "query_layernorm", "key_layernorm"
        q, k, v = q.view(-1, heads, d), k.view(-1, kv, d), v.view(-1, kv, d)
        if c.use_qk_norm:
            q, k = norm(q, w[attention + qn + ".weight"]), norm(k, w[attention + kn + ".weight"])
        q, k = rotate(q), rotate(k).repeat_interleave(heads // kv, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / d**0.5
        probabilities = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", probabilities, v.repeat_interleave(heads // kv, 1)).flatten(1)
        h = h + F.linear(out, w[attention + dense + ".weight"], w.get(attention + dense + ".bias"))
        x = norm(h, w[p + "post_attention_layernorm.weight"])
        if not moe:
            h = h + mlp(x, p + "mlp.")
            continue
        logits = x @ w[p + "mlp.gate.weight"].T
        score = logits.softmax(-1) if c.score_function == "softmax" else logits.sigmoid()
        y = torch.zeros_like(x)
        for t in range(len(x)):
            ranked = score[t] + (0 if lladamoe else w[p + "mlp.gate.expert_bias"])
            if c.n_group > 1:
                groups = ranked.view(c.n_group, -1)
                best = groups.sort(-1, descending=True).values[:, :2].sum(-1).sort(descending=True).indices[: c.topk_group]
                allowed = torch.zeros(c.n_group, dtype=torch.bool)
                allowed[best] = True
                ranked = groups.masked_fill(~allowed[:, None], -torch.inf).flatten()
            chosen = ranked.sort(descending=True, stable=True).indices[: c.num_experts_per_tok]
            weight = score[t, chosen]
            if not lladamoe:
                weight = (weight / (weight.sum() + 1e-20) if len(chosen) > 1 else weight) * c.routed_scaling_factor
            for e, s in zip(chosen.tolist(), weight, strict=True):
                y[t] += s * mlp(x[t], p + f"mlp.experts.{e}.")
        if c.shared_expert_intermediate_size:
            y = y + mlp(x, p + "mlp.shared_experts.")
        h = h + y
    return norm(h, w["model.norm.weight"]) @ (embedding if c.tie_word_embeddings else w["lm_head.weight"]).T


LLADA2 = Config.from_pretrained(GOLDEN / "forward_full")
LLADAMOE = Config.from_pretrained(GOLDEN / "lladamoe")
VARIANTS = {
    "biases": replace(LLADA2, use_bias=True, use_qkv_bias=True),
    "no_qk_norm": replace(LLADA2, use_qk_norm=False, rotary_dim=16),
    "tied": replace(LLADA2, tie_word_embeddings=True, pad_token_id=None),
    "no_shared_expert": replace(LLADA2, shared_expert_intermediate_size=0, n_group=1, topk_group=1),
    "two_shared_experts_all_moe": replace(LLADA2, shared_expert_intermediate_size=32, moe_layers=(True,) * 3),
    "top_1": replace(LLADA2, num_experts_per_tok=1, norm_topk_prob=False, topk_group=1),
    "all_dense": replace(LLADA2, moe_layers=(False,) * 3, num_key_value_heads=4),
    "head_dim_8": replace(LLADA2, head_dim=8, num_attention_heads=6, num_key_value_heads=1, rope_theta=123.0),
    "parent": replace(LLADA2, family="bailing_moe_v2", causal=True, routed_scaling_factor=1.0, rotary_dim=16),
    "lladamoe_biases_dense_layer": replace(LLADAMOE, use_bias=True, use_qkv_bias=True, moe_layers=(False, True)),
}


def random_model(config, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    m = Model(config, dtype=dtype).requires_grad_(False)
    for name, t in [*m.named_parameters(), *m.named_buffers()]:
        t.copy_(torch.randn(t.shape) * (0.1 if "bias" in name else 1 / t.shape[-1] ** 0.5) + (1.0 if name.endswith("norm.weight") else 0.0))
    return m


def official_state(m):
    state = m.state_dict()
    return {name: slot.of(state[slot.parameter]) for name, slot in tensor_slots(m.config).items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_options_agree_with_a_transcription(variant):
    config = VARIANTS[variant]
    m = random_model(config)
    ids = torch.randint(config.vocab_size, (2, 13))
    visible = torch.ones(13, 13, dtype=torch.bool)
    expected = [transcription(official_state(m), config, row, visible.tril() if config.causal else visible, torch.arange(13)) for row in ids]
    torch.testing.assert_close(m(ids).logits, torch.stack(expected).float(), atol=1e-4, rtol=1e-4)


def test_fp64_is_exact_to_fp64(backend):
    config = VARIANTS["biases"]
    m = random_model(config, dtype=torch.float64)
    ids = torch.randint(config.vocab_size, (11,))
    if backend == "native":
        with pytest.raises(ValueError, match="native serves torch.float32, torch.bfloat16|native serves float32, bfloat16"):
            m(ids)
        return
    expected = transcription(official_state(m), config, ids, torch.ones(11, 11, dtype=torch.bool), torch.arange(11))
    logits = m(ids).logits
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)  # the rotary table is fp32 in the official code


# --- inputs


def test_padding_is_as_if_it_was_not_there():
    m = random_model(LLADA2)
    lengths, width = [5, 9, 1, 9], 9
    for side in ("left", "right"):
        for causal in (False, True):
            m.config = replace(LLADA2, causal=causal)
            ids = torch.randint(320, (4, width))
            mask = torch.zeros(4, width, dtype=torch.int64)
            rows = []
            for b, n in enumerate(lengths):
                place = slice(width - n, width) if side == "left" else slice(0, n)
                mask[b, place] = 1
                rows.append((b, place))
            for padding in (mask, mask.bool(), mask.float()):
                logits = m(ids, attention_mask=padding).logits
                for b, place in rows:
                    torch.testing.assert_close(logits[b, place], m(ids[b : b + 1, place]).logits[0], atol=2e-5, rtol=2e-5)
                    assert logits[b].isfinite().all()
    m.config = LLADA2


def test_padding_in_the_middle():
    m = random_model(LLADA2)
    ids = torch.randint(320, (1, 12))
    real = torch.tensor([1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
    with use_backend("reference"):  # three runs of real tokens are more than two intervals
        logits = m(ids, attention_mask=real[None]).logits[0]
    visible = real[None, :].expand(12, -1)
    positions = torch.arange(12)
    expected = transcription(official_state(m), LLADA2, ids[0], visible, positions)
    torch.testing.assert_close(logits[real], expected[real].float(), atol=1e-4, rtol=1e-4)


def test_a_mask_of_many_intervals_takes_the_reference(backend):
    m = random_model(LLADA2)
    ids = torch.randint(320, (2, 12))
    dense = torch.rand(2, 1, 12, 12) < 0.5
    dense |= torch.eye(12, dtype=torch.bool)
    if backend == "native":
        with pytest.raises(ValueError, match="block_attention: backend 'native' does not support this call"):
            m(ids, attention_mask=dense)
    with use_backend(None if backend == "native" else backend):
        logits = m(ids, attention_mask=dense).logits
    for b in range(2):
        expected = transcription(official_state(m), LLADA2, ids[b], dense[b, 0], torch.arange(12))
        torch.testing.assert_close(logits[b], expected.float(), atol=1e-4, rtol=1e-4)


def test_positions():
    m = random_model(LLADA2)
    ids = torch.randint(320, (2, 10))
    rows = torch.stack([torch.randperm(40)[:10], torch.randperm(40)[:10]])
    visible = torch.ones(10, 10, dtype=torch.bool)
    logits = m(ids, position_ids=rows).logits
    for b in range(2):
        expected = transcription(official_state(m), LLADA2, ids[b], visible, rows[b])
        torch.testing.assert_close(logits[b], expected.float(), atol=1e-4, rtol=1e-4)
    shared = m(ids, position_ids=rows[:1]).logits
    torch.testing.assert_close(shared[0], logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(m(ids, position_ids=rows[0].int()).logits, shared, atol=1e-5, rtol=1e-5)
    # Documents of a pack start at position 0 again.
    mask = DiffusionMask.bidirectional([0, 4, 10])
    torch.testing.assert_close(m(ids[0], mask=mask).logits[4:], m(ids[0, 4:]).logits, atol=2e-5, rtol=2e-5)


def test_packed_rows_and_embeddings_are_the_same_tokens():
    m = random_model(LLADA2)
    ids = torch.randint(320, (3, 8))
    rows = m(ids, output_hidden_states=True, output_router_logits=True)
    packed = m(ids.flatten(), mask=DiffusionMask.bidirectional(torch.arange(4) * 8), output_hidden_states=True, output_router_logits=True)
    assert torch.equal(rows.logits.flatten(0, 1), packed.logits)
    assert all(torch.equal(a.flatten(0, 1), b) for a, b in zip(rows.hidden_states, packed.hidden_states, strict=True))
    assert all(torch.equal(a[1].flatten(0, 1), b[1]) for a, b in zip(rows.router_logits, packed.router_logits, strict=True))
    assert rows.router_logits[0][0].shape == (3, 8, 16) and rows.router_logits[0][1].shape == (3, 8, 4)
    assert torch.equal(m(inputs_embeds=m.embed(ids)).logits, rows.logits)
    assert torch.equal(m(ids.int()).logits, rows.logits)
    assert torch.equal(m(ids.t().contiguous().t()).logits, rows.logits), "non-contiguous ids"
    hidden = []
    final = m.backbone(ids, hidden_states=hidden)
    assert torch.equal(final, rows.hidden_states[-1].flatten(0, 1)) and len(hidden) == 4


def test_logits_to_keep():
    m = random_model(LLADA2)
    ids = torch.randint(320, (3, 8))
    logits = m(ids).logits
    close_ = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    close_(m(ids, logits_to_keep=2).logits, logits[:, -2:])
    close_(m(ids, logits_to_keep=99).logits, logits)
    close_(m(ids, logits_to_keep=0).logits, logits)
    index = torch.tensor([23, 0, 9])
    close_(m(ids, logits_to_keep=index).logits, logits.flatten(0, 1)[index])
    one_row = m(ids[0]).logits
    close_(m(ids[0], logits_to_keep=3).logits, one_row[-3:])
    close_(m(ids[0], logits_to_keep=9).logits, one_row)


def test_labels_of_diffusion_models_are_of_the_same_position():
    m = random_model(LLADA2)
    ids, labels = torch.randint(320, (2, 9)), torch.randint(320, (2, 9))
    labels[torch.rand(2, 9) < 0.4] = -100
    out = m(ids, labels=labels)
    log_p = out.logits.log_softmax(-1)
    terms = [-log_p[b, t, labels[b, t]] for b in range(2) for t in range(9) if labels[b, t] != -100]
    torch.testing.assert_close(out.loss, torch.stack(terms).mean())
    assert float(m(ids, labels=torch.full_like(labels, -100)).loss) == 0.0


def test_labels_of_the_parent_are_shifted_inside_documents():
    m = random_model(VARIANTS["parent"])
    ids = torch.randint(320, (12,))
    cu = [0, 5, 6, 6, 12]
    out = m(ids, mask=DiffusionMask.causal(cu), labels=ids)
    log_p = out.logits.log_softmax(-1)
    terms = [-log_p[t, ids[t + 1]] for a, b in zip(cu, cu[1:], strict=False) for t in range(a, b - 1)]
    torch.testing.assert_close(out.loss, torch.stack(terms).mean())
    rows = m(ids.view(2, 6), labels=ids.view(2, 6))
    log_p = rows.logits.log_softmax(-1)
    terms = [-log_p[b, t, ids.view(2, 6)[b, t + 1]] for b in range(2) for t in range(5)]
    torch.testing.assert_close(rows.loss, torch.stack(terms).mean())


def test_cache_gives_the_block_causal_forward():
    from llada_kernels.generation.kv_cache import KVCache

    m = random_model(LLADA2)
    c, size = m.config, 4
    lengths = [12, 8]
    rows = [torch.randint(320, (n,)) for n in lengths]
    whole = [m(r, mask=DiffusionMask.block_causal([0, len(r)], size)).logits for r in rows]
    cache = KVCache(c.num_hidden_layers, 2, 16, size, c.num_key_value_heads, c.head_dim)
    with torch.no_grad():
        first = m(torch.cat([rows[0][:8], rows[1][:4]]), mask=cache.mask([8, 4]), cache=cache, logits_to_keep=4)
        torch.testing.assert_close(first.logits, torch.cat([whole[0][4:8], whole[1][:4]]), atol=2e-5, rtol=2e-5)
        cache.commit([8, 4])
        # No mask: the cache makes it, of the same number of new tokens in each row.
        second = m(torch.stack([rows[0][8:], rows[1][4:]]), cache=cache).logits
    torch.testing.assert_close(second, torch.stack([whole[0][8:], whole[1][4:]]), atol=2e-5, rtol=2e-5)
    with pytest.raises(ValueError, match="mask: expected one of kind 'cached' with a cache"):
        m(rows[0], mask=DiffusionMask.bidirectional([0, 12]), cache=cache)
    with pytest.raises(ValueError, match="mask: expected none of kind 'cached' with no cache"):
        m(rows[0][:8], mask=cache.mask([4, 4]))


IDS = torch.zeros(2, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "input_ids: expected either input_ids or inputs_embeds, got neither"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 6, 64)}, "input_ids: expected either .* got both"),
        ({"input_ids": IDS + 320}, r"input_ids: expected token ids of 0 to 319, got 320 at \[0, 0\]"),
        ({"input_ids": IDS - 1}, "input_ids: expected token ids of 0 to 319, got -1"),
        ({"input_ids": IDS.float()}, "input_ids: expected dtype int64 or int32, got torch.float32"),
        ({"input_ids": IDS[None]}, r"input_ids: expected shape \[B, S\] or \[T\], got \(1, 2, 6\)"),
        ({"input_ids": IDS[:0]}, r"input_ids: expected at least one token, got shape \(0, 6\)"),
        ({"input_ids": IDS.to("meta")}, "input_ids: expected device cpu .* got meta"),
        ({"inputs_embeds": torch.zeros(2, 6, 63)}, r"inputs_embeds: expected shape \[B, S, 64\]"),
        ({"inputs_embeds": torch.zeros(2, 6, 64).half()}, "inputs_embeds: expected dtype torch.float32 .* got torch.float16"),
        ({"input_ids": IDS, "mask": DiffusionMask.causal([0, 11])}, "mask: expected one of 12 tokens .* got 11"),
        ({"input_ids": IDS, "mask": torch.ones(2, 5, 5).bool()}, "mask: expected a DiffusionMask or bool"),
        ({"input_ids": IDS, "mask": torch.ones(2, 6, 6)}, "mask: expected a DiffusionMask or bool"),
        ({"input_ids": IDS, "mask": DiffusionMask.causal([0, 12]), "attention_mask": IDS}, "attention_mask: expected None together with mask"),
        ({"input_ids": IDS, "attention_mask": IDS[:, :5]}, r"attention_mask: expected shape \(2, 6\) .* got \(2, 5\)"),
        ({"input_ids": IDS, "attention_mask": IDS + 2}, "attention_mask: expected 2-D values 1 .* or 0"),
        ({"input_ids": IDS, "attention_mask": torch.ones(3, 1, 6, 6).bool()}, "attention_mask: expected shape"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 4, 6, 6).bool()}, "attention_mask: expected shape"),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 1, 6, 6)}, "attention_mask: expected 4-D values 0 .* pass it as bool"),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 1, 6, 6).long()}, "attention_mask: expected a 4-D mask of bool"),
        ({"input_ids": IDS, "position_ids": IDS[:, :5]}, r"position_ids: expected shape \[2, 6\] or \[1, 6\], got \(2, 5\)"),
        ({"input_ids": IDS, "position_ids": IDS.float()}, "position_ids: expected dtype int64"),
        ({"input_ids": IDS, "labels": IDS[0]}, r"labels: expected int64 or int32 of shape \(2, 6\)"),
        ({"input_ids": IDS, "labels": IDS + 320}, "labels: expected token ids of 0 to 319, got 320"),
        ({"input_ids": IDS, "labels": IDS, "logits_to_keep": 1}, "logits_to_keep: expected None together with labels"),
        ({"input_ids": IDS, "logits_to_keep": -1}, "logits_to_keep: expected at least 0, got -1"),
        ({"input_ids": IDS, "logits_to_keep": torch.tensor([12])}, "logits_to_keep: expected indices of 0 to 11, got 12"),
        ({"input_ids": IDS, "logits_to_keep": torch.tensor([1.0])}, "logits_to_keep: expected a number or int64"),
    ],
)
def test_bad_inputs_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        golden_model("forward_full")(**arguments)


def test_wrong_python_types_are_named():
    m = golden_model("forward_full")
    for arguments, name in [
        ({"input_ids": [[1]]}, "input_ids"), ({"input_ids": IDS, "mask": [1]}, "mask"), ({"input_ids": IDS, "attention_mask": 1}, "attention_mask"),
        ({"input_ids": IDS, "position_ids": [1]}, "position_ids"), ({"input_ids": IDS, "labels": 1}, "labels"),
        ({"input_ids": IDS, "logits_to_keep": "1"}, "logits_to_keep"),
    ]:  # fmt: skip
        with pytest.raises(TypeError, match=f"^{name}: expected"):
            m(**arguments)
    with pytest.raises(TypeError, match="config: expected a Config"):
        Model({"vocab_size": 3})


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
