"""The description of a model, read from and written to the official ``config.json`` of the family."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ._families import ARCHITECTURES, family_of, read_fields, write_fields
from ._field_types import check_field_types
from ._hub_files import resolve

__all__ = ["Config"]

_MAX_CONFIG_BYTES = 4 << 20


@dataclass(frozen=True)
class Config:
    """Canonical fields of a model of any family; ``raw`` keeps the ``config.json`` that it was read from.

    Build one with :meth:`from_dict` or :meth:`from_pretrained`, or directly (all counts in tokens, heads or features). A field of the
    wrong type is a TypeError, one out of range a ValueError.

    Attributes:
        moe_layers: for every layer, whether its MLP is a mixture of experts (else a dense MLP of ``intermediate_size``).
        shared_expert_intermediate_size: width of the MLP that serves every token beside the experts; 0 = none.
        rotary_dim: how many leading features of each head rotate; the rest pass through.
        n_group, topk_group: groups of experts, and how many of them a token may use; 1, 1 = no groups.
        score_function: "sigmoid" or "softmax" over the router's logits.
        norm_topk_prob: whether the chosen weights are divided by their sum.
        router_dtype: "fp32" (router computed in fp32) or "model" (in the dtype of the activations).
        expert_bias: whether a bias takes part in the choice of experts.
        use_bias, use_qkv_bias: biases of the attention's output and input projections.
        pad_token_id: the embedding row that gets no gradient; None = none.
        mask_token_id, eos_token_id: from config.json, else the family's default; None if outside the vocabulary.
        family: "llada2", "bailing_moe_v2" or "lladamoe".
        causal: token-causal attention by default (the autoregressive parent), else bidirectional.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    moe_layers: tuple[bool, ...]
    shared_expert_intermediate_size: int = 0
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    score_function: str = "sigmoid"
    norm_topk_prob: bool = True
    router_dtype: str = "fp32"
    expert_bias: bool = True
    use_qk_norm: bool = True
    use_bias: bool = False
    use_qkv_bias: bool = False
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    mask_token_id: int | None = None
    eos_token_id: int | None = None
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    family: str = "llada2"
    causal: bool = False
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.moe_layers, list):
            object.__setattr__(self, "moe_layers", tuple(self.moe_layers))
        check_field_types(self)
        _validate(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Read an official ``config.json``; missing keys take the defaults of the official class of that family.

        Args:
            values: the parsed file. Keys that nothing here uses are kept and written back by :meth:`to_dict`.

        Raises:
            TypeError: ``values`` is not a mapping.
            ValueError: an unknown or unsupported architecture, or a value that is missing, of the wrong type or out of
                range; the text names the key, what was expected and what was found.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"config: expected a mapping of keys to values, got {type(values).__name__}")
        family = family_of(values)
        return cls(**read_fields(values, family), family=family, causal=family == "bailing_moe_v2", raw=copy.deepcopy(dict(values)))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, revision: str | None = None) -> Config:
        """Read ``config.json``.

        Args:
            path: a directory, the file itself, or a Hugging Face repository "owner/name" (only this file is downloaded).
            revision: branch, tag or commit of the repository.

        Raises:
            ValueError: there is no such file, it is not a JSON object, or its values are refused by :meth:`from_dict`.
            OSError: the repository cannot be fetched.
        """
        file = Path(path).expanduser() if isinstance(path, (str, os.PathLike)) else None
        if file is None or not (file.is_file() or file.suffix == ".json"):
            file = resolve(path, revision, ["config.json"]) / "config.json"
        return cls.from_dict(read_json_object(file))

    def to_dict(self) -> dict[str, Any]:
        """The official ``config.json``: the one that was read, with the keys of changed fields replaced.

        Reading it back gives an equal Config, and for an unchanged Config it equals what was read.
        """
        new = write_fields(self)
        result = copy.deepcopy(self.raw)
        unchanged: dict[str, Any] = {}
        if result:
            before = Config.from_dict(self.raw)
            if before.family == self.family:
                unchanged = write_fields(before)
        for key, value in new.items():
            if key in unchanged and unchanged[key] == value:
                continue
            result[key] = value
            rope = result.get("rope_parameters")
            if isinstance(rope, dict) and key in rope:
                rope[key] = value
        return result

    def as_diffusion(self, mask_token_id: int | None = None) -> Config:
        """The block-diffusion model of the same shapes: an autoregressive parent becomes a LLaDA2 configuration.

        Multi-token prediction and remote-code references of the parent are dropped. ``mask_token_id`` None keeps the
        present one.

        Raises:
            ValueError: no mask token is known, or the family has no diffusion counterpart.
        """
        if self.family == "lladamoe":
            raise ValueError("family: expected 'bailing_moe_v2' or 'llada2', got 'lladamoe' (it is a diffusion model already)")
        mask = self.mask_token_id if mask_token_id is None else mask_token_id
        if mask is None:
            raise ValueError("mask_token_id: expected a token id (the configuration has none), got None")
        dropped = ("num_nextn_predict_layers", "mtp_loss_scaling_factor", "auto_map")
        raw = {k: v for k, v in self.raw.items() if k not in dropped}
        return replace(self, family="llada2", causal=False, mask_token_id=mask, raw=raw)

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim


def read_json_object(file: Path, limit: int = _MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Parse a small JSON file that must hold an object; ValueError names the file and what is wrong."""
    try:
        size = file.stat().st_size if file.is_file() else 0
        text = file.read_text(encoding="utf-8") if size <= limit else ""
    except FileNotFoundError:
        raise ValueError(f"{file}: expected a file, found none") from None
    except OSError as error:
        raise ValueError(f"{file}: expected a readable file, got {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8 text, got {error}") from None
    if size > limit:
        raise ValueError(f"{file}: expected at most {limit} bytes, got {size}")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # bad JSON, an integer of too many digits, nested too deep
        raise ValueError(f"{file}: expected JSON, got {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(values).__name__}")
    return values


def _validate(c: Config) -> None:
    """Relations between the fields: what a kernel would otherwise find out later, or not at all."""

    def need(condition: bool, key: str, expected: str) -> None:
        if not condition:
            raise ValueError(f"{key}: expected {expected}, got {getattr(c, key)!r}")

    positive = "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim max_position_embeddings"
    for key in positive.split():
        need(getattr(c, key) >= 1, key, "at least 1")
    need(c.family in ARCHITECTURES, "family", f"one of {', '.join(ARCHITECTURES)}")
    divisor = f"a divisor of {c.num_attention_heads} (num_attention_heads)"
    need(c.num_attention_heads % c.num_key_value_heads == 0, "num_key_value_heads", divisor)
    rotary = f"an even number (int(head_dim * partial_rotary_factor)) of 2 to {c.head_dim}"
    need(0 < c.rotary_dim <= c.head_dim and c.rotary_dim % 2 == 0, "rotary_dim", rotary)
    need(c.rope_theta > 0, "rope_theta", "a positive number")
    need(c.rms_norm_eps > 0, "rms_norm_eps", "a positive number")
    need(c.initializer_range >= 0, "initializer_range", "a number of at least 0")
    need(len(c.moe_layers) == c.num_hidden_layers, "moe_layers", f"{c.num_hidden_layers} entries (num_hidden_layers)")
    need(c.score_function in ("sigmoid", "softmax"), "score_function", "'sigmoid' or 'softmax'")
    need(c.router_dtype in ("fp32", "model"), "router_dtype", "'fp32' or 'model'")
    if not all(c.moe_layers):
        need(c.intermediate_size >= 1, "intermediate_size", "at least 1 (there are dense layers)")
        leading = not any(c.moe_layers[: c.moe_layers.count(False)])
        need(leading or c.family == "lladamoe", "moe_layers", "dense layers only before the others (first_k_dense_replace)")
    if any(c.moe_layers):
        need(c.moe_intermediate_size >= 1, "moe_intermediate_size", "at least 1")
        need(c.num_experts >= 1, "num_experts", "at least 1")
        need(c.n_group >= 1 and c.num_experts % c.n_group == 0, "n_group", f"a divisor of {c.num_experts} (num_experts)")
        need(c.n_group == 1 or c.num_experts // c.n_group >= 2, "n_group", "groups of at least two experts")
        need(1 <= c.topk_group <= c.n_group, "topk_group", f"1 to {c.n_group} (n_group)")
        reach = c.num_experts // c.n_group * c.topk_group
        need(1 <= c.num_experts_per_tok <= reach, "num_experts_per_tok", f"1 to {reach} (the experts that a token can reach)")
        multiple = c.shared_expert_intermediate_size % c.moe_intermediate_size == 0
        need(multiple, "shared_expert_intermediate_size", f"a multiple of {c.moe_intermediate_size} (moe_intermediate_size)")
    for key in ("pad_token_id", "mask_token_id", "eos_token_id"):
        token = getattr(c, key)
        need(token is None or 0 <= token < c.vocab_size, key, f"None or a token id of 0 to {c.vocab_size - 1}")
