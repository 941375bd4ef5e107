"""What the families call things: official ``config.json`` keys here, tensor names in :mod:`llada_kernels._tensor_names`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Config

#: ``architectures`` entry and ``model_type`` that each family is written with.
ARCHITECTURES = {
    "llada2": ("LLaDA2MoeModelLM", "llada2_moe"),
    "bailing_moe_v2": ("BailingMoeV2ForCausalLM", "bailing_moe"),
    "lladamoe": ("LLaDAMoEModelLM", "llada"),
}
_FAMILY_OF_ARCHITECTURE = {name: family for family, (name, _) in ARCHITECTURES.items()}
# Without `architectures` only these are certain: `llada` is also a dense model, `bailing_moe` also Ling 1.
_FAMILY_OF_MODEL_TYPE = {"llada2_moe": "llada2", "llada2_moe_veomni": "llada2", "bailing_moe_v2": "bailing_moe_v2"}
_ALLOWED_MODEL_TYPES = {
    "llada2": ("llada2_moe", "llada2_moe_veomni"),
    "bailing_moe_v2": ("bailing_moe", "bailing_moe_v2"),
    "lladamoe": ("llada",),
}
MASK_TOKEN_ID, EOS_TOKEN_ID = 156895, 156892
# Far above any model: a damaged file must not make us list tensors for ever.
_MAX_LAYERS, _MAX_EXPERTS = 1024, 4096


def family_of(values: Mapping[str, Any]) -> str:
    """The family that a ``config.json`` describes, by ``architectures``; ValueError if it is none of ours."""
    model_type = values.get("model_type")
    names = values.get("architectures")
    if names is None or names == []:
        if isinstance(model_type, str) and model_type in _FAMILY_OF_MODEL_TYPE:
            return _FAMILY_OF_MODEL_TYPE[model_type]
        raise ValueError(
            f"architectures: expected one of {', '.join(_FAMILY_OF_ARCHITECTURE)}, got {names!r} "
            f"(model_type {model_type!r} does not decide: 'llada' is also a dense model, 'bailing_moe' also Ling 1)"
        )
    name = names[0] if isinstance(names, (list, tuple)) else names
    family = _FAMILY_OF_ARCHITECTURE.get(name) if isinstance(name, str) else None
    if family is None:
        dense = " (the dense LLaDA-8B, which is not a mixture of experts)" if name in ("LLaDAModelLM", "LLaDAModel") else ""
        raise ValueError(f"architectures: expected one of {', '.join(_FAMILY_OF_ARCHITECTURE)}, got {name!r}{dense}")
    if model_type is not None and model_type not in _ALLOWED_MODEL_TYPES[family]:
        expected = " or ".join(map(repr, _ALLOWED_MODEL_TYPES[family]))
        raise ValueError(f"model_type: expected {expected} for {name}, got {model_type!r}")
    return family


class _Reader:
    """Typed access to the keys of config.json. null counts as missing, except for token ids: there it means none."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)
        rope = self.values.get("rope_parameters")
        if isinstance(rope, Mapping):  # transformers 5 nests what was at the top before
            self.values.update({k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope})

    def integer(self, key: str, default: int | None = None, least: int = 0, most: int = 2**31 - 1) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{key}: expected an integer, got {_shown(value)}")
        if not least <= value <= most:
            raise ValueError(f"{key}: expected an integer of {least} to {most}, got {_shown(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
            raise ValueError(f"{key}: expected a finite number, got {_shown(value)}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{key}: expected true or false, got {_shown(value)}")
        return value

    def token(self, key: str, default: int, vocab_size: int) -> int | None:
        """A token id; of a list the first. null is None; without the key the default, or None where it is outside the vocabulary."""
        if key not in self.values:
            return default if default < vocab_size else None
        value = self.values[key]
        if value is None:
            return None
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            raise ValueError(f"{key}: expected a token id of 0 to {vocab_size - 1} (vocab_size - 1), got {_shown(value)}")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        value = self.values.get(key)
        if value is not None and value not in allowed:
            expected = " or ".join(map(repr, allowed)) or "null or no such key"
            raise ValueError(f"{key}: expected {expected} (nothing else is supported), got {_shown(value)}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"{key}: expected a value in config.json, got {'null' if key in self.values else 'no such key'}")
        return value


def read_fields(values: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Canonical fields of a Config from the official keys; ValueError names the key, expected, got."""
    reader = _Reader(values)
    return _read_lladamoe(reader) if family == "lladamoe" else _read_llada2(reader, family)


def _read_common(r: _Reader) -> dict[str, Any]:
    """What all families share, and the refusal of what none implements."""
    r.only("hidden_act", "silu")
    r.only("clip_qkv")
    r.only("norm_head", False)
    r.only("quantization_config")
    for key in ("rope_scaling", "rope_parameters"):
        scaling = r.values.get(key)
        kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, Mapping) else scaling
        if kind not in (None, "default"):
            raise ValueError(f"{key}: expected null or the rope type 'default' (nothing else is supported), got {_shown(scaling)}")
    hidden = r.integer("hidden_size", least=1)
    heads = r.integer("num_attention_heads", least=1)
    return {
        "vocab_size": r.integer("vocab_size", least=1),
        "hidden_size": hidden,
        "num_hidden_layers": r.integer("num_hidden_layers", least=1, most=_MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": r.integer("num_key_value_heads", 0) or heads,
        "head_dim": r.integer("head_dim", 0) or hidden // heads,
        "tie_word_embeddings": r.boolean("tie_word_embeddings", False),
        "initializer_range": r.number("initializer_range", 0.02),
        "mask_token_id": r.token("mask_token_id", MASK_TOKEN_ID, r.integer("vocab_size", least=1)),
        "eos_token_id": r.token("eos_token_id", EOS_TOKEN_ID, r.integer("vocab_size", least=1)),
    }


def _read_llada2(r: _Reader, family: str) -> dict[str, Any]:
    """LLaDA2 and its autoregressive parent: same keys, other defaults (those of the two official classes)."""
    ar = family == "bailing_moe_v2"
    if r.integer("expert_capacity", 0):
        got = r.values["expert_capacity"]
        raise ValueError(f"expert_capacity: expected 0 or none (the block routing of LLaDA2.2 is not supported yet), got {got}")
    r.only("score_function", "sigmoid")
    r.only("router_dtype", "fp32", "float32")
    fields = _read_common(r)
    layers, top_k = fields["num_hidden_layers"], r.integer("num_experts_per_tok", 8 if ar else 2, least=1)
    first_dense = r.integer("first_k_dense_replace", 1 if ar else 0)
    moe_layers = tuple(i >= first_dense for i in range(layers))
    width = r.integer("moe_intermediate_size", least=1) if any(moe_layers) else r.integer("moe_intermediate_size", 0)
    groups = r.integer("n_group", 8)
    return fields | {
        "rotary_dim": int(fields["head_dim"] * r.number("partial_rotary_factor", 1.0 if ar else 0.5)),
        "rope_theta": r.number("rope_theta", 600000.0 if ar else 10000.0),
        "intermediate_size": r.integer("intermediate_size", least=1) if first_dense else r.integer("intermediate_size", 0),
        "moe_intermediate_size": width,
        "num_experts": r.integer("num_experts", 256 if ar else 16, least=1, most=_MAX_EXPERTS),
        "num_experts_per_tok": top_k,
        "moe_layers": moe_layers,
        "shared_expert_intermediate_size": width * r.integer("num_shared_experts", 1 if ar else 0),
        # The converter of the parent writes 0 where groups are off.
        "n_group": max(groups, 1),
        "topk_group": max(r.integer("topk_group", 4), 1) if groups else 1,
        "routed_scaling_factor": r.number("routed_scaling_factor", 1.0 if ar else 2.5),
        # The official code does not read norm_topk_prob: it normalises whenever it chooses more than one.
        "norm_topk_prob": top_k > 1,
        # One class of LLaDA2 has False as default, but ignores it: its norms are always on.
        "use_qk_norm": r.boolean("use_qk_norm", True),
        "use_bias": r.boolean("use_bias", not ar),
        "use_qkv_bias": r.boolean("use_qkv_bias", False),
        "rms_norm_eps": r.number("rms_norm_eps", 1e-6 if ar else 1e-5),
        "pad_token_id": r.token("pad_token_id", EOS_TOKEN_ID if ar else 126081, fields["vocab_size"]),
        "max_position_embeddings": r.integer("max_position_embeddings", 32768 if ar else 16384, least=1),
    }


def _read_lladamoe(r: _Reader) -> dict[str, Any]:
    for key in ("moe_router_enable_expert_bias", "shared_expert_intermediate_size", "router_num_group", "router_topk_group"):
        r.only(key, 0, False)
    r.only("moe_router_score_function", "softmax")
    fields = _read_common(r)
    layers = fields["num_hidden_layers"]
    frequency = r.values.get("moe_layer_freq") or [1] * layers
    if not isinstance(frequency, list) or len(frequency) != layers or any(f not in (0, 1) for f in frequency):
        raise ValueError(f"moe_layer_freq: expected a list of {layers} (num_hidden_layers) entries 0 or 1, got {_shown(frequency)}")
    bias = r.boolean("attention_bias", False)
    return fields | {
        "rotary_dim": int(fields["head_dim"] * r.number("partial_rotary_factor", 1.0)),
        "rope_theta": r.number("rope_theta"),
        "intermediate_size": r.integer("dense_intermediate_size", 0),
        "moe_intermediate_size": r.integer("expert_intermediate_size", 0),
        "num_experts": r.integer("num_experts", least=1, most=_MAX_EXPERTS),
        "num_experts_per_tok": r.integer("num_experts_per_tok", least=1),
        "moe_layers": tuple(bool(f) for f in frequency),
        # The official code ignores norm_topk_prob and routed_scaling_factor.
        "score_function": "softmax",
        "norm_topk_prob": False,
        "router_dtype": "model",
        "expert_bias": False,
        "use_qk_norm": r.boolean("qk_layernorm", False),
        "use_bias": bias,
        "use_qkv_bias": bias,
        "rms_norm_eps": r.number("rms_norm_eps", 1e-5),
        "pad_token_id": r.token("pad_token_id", 1, fields["vocab_size"]),
        "max_position_embeddings": r.integer("max_position_embeddings", 4096, least=1),
    }


def write_fields(c: Config) -> dict[str, Any]:
    """The official keys of all canonical fields."""
    architecture, model_type = ARCHITECTURES[c.family]
    factor = c.rotary_dim / c.head_dim
    if int(c.head_dim * factor) != c.rotary_dim:
        factor = (c.rotary_dim + 0.5) / c.head_dim
    keys: dict[str, Any] = {"architectures": [architecture], "model_type": model_type, "hidden_act": "silu", "rope_scaling": None}
    same = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim num_experts num_experts_per_tok "
        "rope_theta rms_norm_eps tie_word_embeddings initializer_range max_position_embeddings"
    )
    keys |= {key: getattr(c, key) for key in same.split()}
    keys["partial_rotary_factor"] = factor
    keys |= {key: getattr(c, key) for key in ("pad_token_id", "mask_token_id", "eos_token_id")}
    if c.family == "lladamoe":
        return keys | {
            "dense_intermediate_size": c.intermediate_size,
            "expert_intermediate_size": c.moe_intermediate_size,
            "moe_layer_freq": [int(moe) for moe in c.moe_layers],
            "moe_router_score_function": "softmax",
            "moe_router_enable_expert_bias": False,
            "qk_layernorm": c.use_qk_norm,
            "attention_bias": c.use_bias,
        }
    width = c.moe_intermediate_size
    return keys | {
        "rotary_dim": c.rotary_dim,
        "intermediate_size": c.intermediate_size,
        "moe_intermediate_size": width,
        "first_k_dense_replace": c.moe_layers.count(False),
        "num_shared_experts": c.shared_expert_intermediate_size // width if width else 0,
        "n_group": c.n_group,
        "topk_group": c.topk_group,
        "routed_scaling_factor": c.routed_scaling_factor,
        "score_function": "sigmoid",
        "norm_topk_prob": c.norm_topk_prob,
        "router_dtype": "fp32",
        "moe_router_enable_expert_bias": True,
        "use_qk_norm": c.use_qk_norm,
        "use_bias": c.use_bias,
        "use_qkv_bias": c.use_qkv_bias,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "output_dropout": 0.0,
    }


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
