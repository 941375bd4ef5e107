"""Random models of every option, and an independent transcription of the official forward."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from llada_kernels import Config, Model
from llada_kernels._tensor_names import tensor_slots

GOLDEN = Path(__file__).parent / "golden"

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
        spread, mean = (0.1 if "bias" in name else t.shape[-1] ** -0.5), (1.0 if name.endswith("norm.weight") else 0.0)
        t.copy_(torch.randn(t.shape) * spread + mean)
    return m


def official_state(m):
    state = m.state_dict()
    return {name: slot.of(state[slot.parameter]) for name, slot in tensor_slots(m.config).items()}


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
