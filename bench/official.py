"""The model and the training step as the official PyTorch code has them: what a user without this package runs.

A transcription that keeps the costs of the original: weights per expert and a loop over experts, KV heads repeated before SDPA, a dense
fp32 mask over [x_t ; x_0], norms and rotary embedding out of elementary operations, logits of every position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import silu

from llada_kernels import Config, Model
from llada_kernels.nn import attention, block, moe

__all__ = ["OfficialModel", "block_diffusion_mask", "official_generate"]


def block_diffusion_mask(length: int, block: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[1, 1, 2 length, 2 length], 0 or -inf: x_t sees its own block and earlier clean blocks, x_0 clean blocks up to its own."""
    place = torch.arange(2 * length)
    noisy, number = place < length, place % length // block
    q, k = number[:, None], number[None]
    own = (q == k) & noisy[:, None] & noisy[None]
    visible = own | (q > k) & noisy[:, None] & ~noisy[None] | (q >= k) & ~noisy[:, None] & ~noisy[None]
    return torch.zeros(2 * length, 2 * length, dtype=dtype).masked_fill_(~visible, float("-inf"))[None, None]


class Norm(nn.Module):
    """Cast, normalise, cast back, scale."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight.detach().clone()), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    return layer


class GatedMLP(nn.Module):
    """Gate, up and down as three products."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = linear(gate), linear(up), linear(down)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    def __init__(self, config: Config, ours: attention.Attention) -> None:
        super().__init__()
        assert ours.q_norm is not None and ours.k_norm is not None
        self.c = config
        self.query_key_value, self.dense = linear(ours.qkv.weight), linear(ours.dense.weight)
        self.query_layernorm, self.key_layernorm = (Norm(n.weight, config.rms_norm_eps) for n in (ours.q_norm, ours.k_norm))

    def forward(self, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        c, (batch, length, _) = self.c, x.shape
        heads, kv = c.num_attention_heads, c.num_key_value_heads
        qkv = self.query_key_value(x).view(batch, length, heads + 2 * kv, c.head_dim)
        q, k, v = (t.transpose(1, 2) for t in qkv.split([heads, kv, kv], dim=-2))
        q, k = rotate(self.query_layernorm(q), cos, sin), rotate(self.key_layernorm(k), cos, sin)
        k, v = (t[:, :, None].expand(batch, kv, heads // kv, length, c.head_dim).reshape(batch, heads, length, c.head_dim) for t in (k, v))
        out = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous(), mask)
        return self.dense(out.transpose(1, 2).reshape(batch, length, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turning, passing = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turning.chunk(2, -1)
    return torch.cat([turning * cos + torch.cat((-second, first), -1) * sin, passing], -1)


class MoE(nn.Module):
    """Both paths of the official code, equal to the last bit: in training a loop over all experts that selects rows by comparison;
    otherwise (``moe_infer``) rows sorted by expert and a loop over those that have any."""

    expert_bias: Tensor

    def __init__(self, config: Config, ours: moe.MoE) -> None:
        super().__init__()
        gate_up, down = ours.w_gate_up, ours.w_down
        assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)  # not quantised
        assert ours.router.expert_bias is not None and ours.shared_expert is not None
        self.c = config
        self.gate = linear(ours.router.weight)
        self.register_buffer("expert_bias", ours.router.expert_bias.clone())
        self.experts = nn.ModuleList(GatedMLP(a, b) for a, b in zip(gate_up.unbind(0), down.unbind(0), strict=True))
        self.shared_experts = GatedMLP(ours.shared_expert.gate_up.weight, ours.shared_expert.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        c, shape = self.c, x.shape
        flat = x.reshape(-1, shape[-1])
        scores = F.linear(flat.float(), self.gate.weight.float()).sigmoid()
        biased = scores + self.expert_bias
        groups = biased.view(len(flat), c.n_group, -1)
        chosen = torch.topk(groups.topk(2, dim=-1)[0].sum(-1), c.topk_group, dim=-1, sorted=False)[1]
        allowed = torch.zeros(len(flat), c.n_group, dtype=torch.bool).scatter_(1, chosen, True)
        allowed = allowed.unsqueeze(-1).expand_as(groups).reshape(len(flat), -1)
        ids = torch.topk(biased.masked_fill(~allowed, float("-inf")), c.num_experts_per_tok, dim=-1)[1]
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor
        rows = self._by_comparison(flat, ids) if self.training else self._by_sorting(flat, ids)
        routed = (rows.view(*ids.shape, -1).float() * weights.unsqueeze(-1)).sum(1).to(x.dtype)
        shared: Tensor = self.shared_experts(x)
        return routed.view(shape) + shared

    def _by_comparison(self, x: Tensor, ids: Tensor) -> Tensor:
        """[T * K, H]: what each token's experts make of it."""
        repeated, flat_ids = x.repeat_interleave(ids.shape[1], 0), ids.flatten()
        out = torch.empty_like(repeated)
        for i, expert in enumerate(self.experts):
            out[flat_ids == i] = expert(repeated[flat_ids == i])
        return out

    def _by_sorting(self, x: Tensor, ids: Tensor) -> Tensor:
        counts = ids.new_zeros((len(ids), len(self.experts))).scatter_(1, ids, 1).sum(0).tolist()
        order = ids.flatten().argsort()
        parts = x[order // ids.shape[1]].split(counts)
        rows = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True) if len(part)])
        out = torch.empty_like(rows)
        out[order] = rows
        return out


class Block(nn.Module):
    def __init__(self, config: Config, ours: nn.Module) -> None:
        super().__init__()
        assert isinstance(ours, block.Block)
        self.input_layernorm = Norm(ours.input_layernorm.weight, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(ours.post_attention_layernorm.weight, config.rms_norm_eps)
        self.attention = Attention(config, ours.attention)
        mlp = ours.mlp
        self.mlp = MoE(config, mlp) if isinstance(mlp, moe.MoE) else GatedMLP(mlp.gate_up.weight, mlp.down.weight)

    def forward(self, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.input_layernorm(x), mask, cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class OfficialModel(nn.Module):
    """The weights of a :class:`llada_kernels.Model`, laid out and used as in the official code.

    Args:
        model: where the weights come from; a LLaDA2 model with a shared expert and norms on queries and keys.

    Attributes:
        calls: of forward, so far.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.calls = 0
        c = self.config = model.config
        self.word_embeddings = nn.Parameter(model.embed_tokens.weight.detach().clone())
        self.layers = nn.ModuleList(Block(c, layer) for layer in model.layers)
        self.norm = Norm(model.norm.weight, c.rms_norm_eps)
        self.lm_head = linear(model.lm_head_weight)

    def forward(self, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor) -> Tensor:
        """fp32 logits [B, S, V] of ids [B, S] under an additive mask [1, 1, S, S]."""
        self.calls += 1
        c = self.config
        x = F.embedding(input_ids, self.word_embeddings)
        frequencies = 1.0 / c.rope_theta ** (torch.arange(0, c.rotary_dim, 2).float() / c.rotary_dim)
        angles = position_ids.float()[:, None] * frequencies
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        # SDPA wants the mask in the dtype of the queries; the official trainer holds it in fp32 and casts.
        mask = None if mask is None else mask.to(x.dtype)
        for layer in self.layers:
            x = layer(x, mask, cos, sin)
        return self.lm_head(self.norm(x)).float()


@torch.no_grad()
def official_generate(
    model: OfficialModel, prompt: Tensor, *, gen_length: int, block_length: int, steps: int, threshold: float, mask_id: int
) -> Tensor:
    """The loop of LLaDA2.0 for one prompt, greedy and without EOS: no cache, so every step computes the whole prefix, with all its logits.

    Returns:
        int64 [gen_length].
    """
    start, dtype = len(prompt), model.word_embeddings.dtype
    total = -(-(start + gen_length) // block_length) * block_length
    number = torch.arange(total) // block_length
    mask = torch.zeros(total, total, dtype=dtype).masked_fill_(number[:, None] < number, float("-inf"))[None, None]
    x = torch.full((1, total), mask_id)
    x[0, :start] = prompt
    steps = min(steps, gen_length)
    schedule = [block_length // steps + (s < block_length % steps) for s in range(steps)]
    for end in range((start // block_length + 1) * block_length, total + 1, block_length):
        window = x[:, :end]
        for n in schedule:
            masked = window[:, -block_length:] == mask_id
            if not masked.any():
                break
            logits = model(window, mask[:, :, :end, :end], torch.arange(end))[:, -block_length:]
            probabilities = logits.softmax(-1)
            logits[..., mask_id] = float("-inf")  # the released code may choose it, and then goes round in circles
            token = logits.argmax(-1)
            confidence = probabilities.gather(-1, token.unsqueeze(-1)).squeeze(-1).masked_fill(~masked, float("-inf"))
            take = confidence > threshold
            if int(take.sum()) < n:
                best = confidence.topk(min(n, int(masked.sum())), dim=-1).indices
                take = torch.zeros_like(masked).scatter_(1, best, True)
            window[:, -block_length:][take] = token[take]
    return x[0, start : start + gen_length]
