"""Official tensor names, and the place of each tensor in the fused parameters of :class:`llada_kernels.Model`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from .config import Config

__all__ = ["LAYOUTS", "Slot", "droppable", "layout_of", "tensor_slots"]

#: "per_expert": one tensor per expert, the layout of the released checkpoints; "merged": experts stacked, as the official trainer.
LAYOUTS = ("per_expert", "merged")

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_MERGED = re.compile(r"\.mlp\.experts\.(gate|up|down)_proj$")


@dataclass(frozen=True)
class Slot:
    """Where one official tensor lives: ``parameter[index]`` has its ``shape``.

    Attributes:
        parameter: name in ``Model.state_dict()``.
        index: basic indices into that parameter; () is all of it.
        shape: official shape of the tensor.
        kind: "weight", "router" (keeps its stored dtype) or "expert_bias" (always fp32).
    """

    parameter: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]
    kind: str = "weight"

    def of(self, parameter: Tensor) -> Tensor:
        """The view of ``parameter`` that holds this tensor."""
        return parameter[self.index] if self.index else parameter


def layout_of(names: Iterable[str]) -> str:
    """The layout that a set of official tensor names is in."""
    return "merged" if any(_MERGED.search(name) for name in names) else "per_expert"


def droppable(config: Config, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor without a place in the model may be left out: the official model does not use it either."""
    layer = _LAYER.match(name)
    if config.family == "bailing_moe_v2" and layer is not None and int(layer[1][:9]) >= config.num_hidden_layers:
        return True  # multi-token prediction
    if name.endswith("rotary_emb.inv_freq"):
        return True  # recomputed from rope_theta
    if config.tie_word_embeddings and name == "lm_head.weight":
        return True
    # The official code builds a shared expert of width 0 when num_shared_experts is 0.
    return ".mlp.shared_experts." in name and 0 in shape and config.shared_expert_intermediate_size == 0


def tensor_slots(config: Config, layout: str = "per_expert") -> dict[str, Slot]:
    """Every tensor of an official checkpoint of ``config``, in the order of the official modules.

    Raises:
        ValueError: ``layout`` is not one of :data:`LAYOUTS`.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    vocab, hidden = config.vocab_size, config.hidden_size
    embedding = "model.embed_tokens.weight" if config.family == "lladamoe" else "model.word_embeddings.weight"
    slots = {embedding: Slot("embed_tokens.weight", (), (vocab, hidden))}
    for layer in range(config.num_hidden_layers):
        attention = _lladamoe_attention if config.family == "lladamoe" else _llada2_attention
        for name, slot in (*attention(config), *_mlp(config, config.moe_layers[layer], layout)):
            slots[f"model.layers.{layer}.{name}"] = Slot(f"layers.{layer}.{slot.parameter}", slot.index, slot.shape, slot.kind)
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            slots[f"model.layers.{layer}.{norm}"] = Slot(f"layers.{layer}.{norm}", (), (hidden,))
    slots["model.norm.weight"] = Slot("norm.weight", (), (hidden,))
    if not config.tie_word_embeddings:
        slots["lm_head.weight"] = Slot("lm_head.weight", (), (vocab, hidden))
    return slots


def _llada2_attention(c: Config) -> Iterator[tuple[str, Slot]]:
    yield "attention.query_key_value.weight", Slot("attention.qkv.weight", (), (c.qkv_size, c.hidden_size))
    if c.use_qkv_bias:
        yield "attention.query_key_value.bias", Slot("attention.qkv.bias", (), (c.qkv_size,))
    if c.use_qk_norm:
        yield "attention.query_layernorm.weight", Slot("attention.q_norm.weight", (), (c.head_dim,))
        yield "attention.key_layernorm.weight", Slot("attention.k_norm.weight", (), (c.head_dim,))
    yield "attention.dense.weight", Slot("attention.dense.weight", (), (c.hidden_size, c.num_attention_heads * c.head_dim))
    if c.use_bias:
        yield "attention.dense.bias", Slot("attention.dense.bias", (), (c.hidden_size,))


def _lladamoe_attention(c: Config) -> Iterator[tuple[str, Slot]]:
    begin = 0
    for letter, heads in (("q", c.num_attention_heads), ("k", c.num_key_value_heads), ("v", c.num_key_value_heads)):
        rows = slice(begin, begin + heads * c.head_dim)
        begin = rows.stop
        yield f"self_attn.{letter}_proj.weight", Slot("attention.qkv.weight", (rows,), (heads * c.head_dim, c.hidden_size))
        if c.use_qkv_bias:
            yield f"self_attn.{letter}_proj.bias", Slot("attention.qkv.bias", (rows,), (heads * c.head_dim,))
    if c.use_qk_norm:
        yield "self_attn.q_norm.weight", Slot("attention.q_norm.weight", (), (c.head_dim,))
        yield "self_attn.k_norm.weight", Slot("attention.k_norm.weight", (), (c.head_dim,))
    yield "self_attn.o_proj.weight", Slot("attention.dense.weight", (), (c.hidden_size, c.num_attention_heads * c.head_dim))
    if c.use_bias:
        yield "self_attn.o_proj.bias", Slot("attention.dense.bias", (), (c.hidden_size,))


def _mlp(c: Config, moe: bool, layout: str) -> Iterator[tuple[str, Slot]]:
    if not moe:
        yield from _gated("mlp", "mlp", c.hidden_size, c.intermediate_size)
        return
    experts, hidden, width = c.num_experts, c.hidden_size, c.moe_intermediate_size
    yield "mlp.gate.weight", Slot("mlp.router.weight", (), (experts, hidden), "router")
    if c.expert_bias:
        yield "mlp.gate.expert_bias", Slot("mlp.router.expert_bias", (), (experts,), "expert_bias")
    gate, up = slice(0, width), slice(width, 2 * width)
    if layout == "merged":
        yield "mlp.experts.gate_proj", Slot("mlp.w_gate_up", (slice(None), gate), (experts, width, hidden))
        yield "mlp.experts.up_proj", Slot("mlp.w_gate_up", (slice(None), up), (experts, width, hidden))
        yield "mlp.experts.down_proj", Slot("mlp.w_down", (), (experts, hidden, width))
    else:
        for e in range(experts):
            yield f"mlp.experts.{e}.gate_proj.weight", Slot("mlp.w_gate_up", (e, gate), (width, hidden))
            yield f"mlp.experts.{e}.up_proj.weight", Slot("mlp.w_gate_up", (e, up), (width, hidden))
            yield f"mlp.experts.{e}.down_proj.weight", Slot("mlp.w_down", (e,), (hidden, width))
    if c.shared_expert_intermediate_size:
        yield from _gated("mlp.shared_experts", "mlp.shared_expert", hidden, c.shared_expert_intermediate_size)


def _gated(official: str, ours: str, hidden: int, width: int) -> Iterator[tuple[str, Slot]]:
    yield f"{official}.gate_proj.weight", Slot(f"{ours}.gate_up.weight", (slice(0, width),), (width, hidden))
    yield f"{official}.up_proj.weight", Slot(f"{ours}.gate_up.weight", (slice(width, 2 * width),), (width, hidden))
    yield f"{official}.down_proj.weight", Slot(f"{ours}.down.weight", (), (hidden, width))
