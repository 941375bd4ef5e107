"""Config: official config.json of every family in and out, defaults of the official classes, refusals."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest

from llada_kernels import Config

GOLDEN = Path(__file__).parent / "golden"

# Values of the released LLaDA2.0-mini, written out by hand.
MINI = {
    "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "vocab_size": 157184, "hidden_size": 2048,
    "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "partial_rotary_factor": 0.5,
    "rotary_dim": 64, "rope_theta": 600000, "rope_scaling": None, "max_position_embeddings": 16384, "intermediate_size": 5120,
    "first_k_dense_replace": 1, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
    "num_shared_experts": 1, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    "score_function": "sigmoid", "router_dtype": "fp32", "moe_router_enable_expert_bias": True, "use_bias": False,
    "use_qkv_bias": False, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "pad_token_id": 156892,
    "sliding_window": 4096, "use_sliding_window": False, "norm_head": False,
}  # fmt: skip

# The smallest file of the autoregressive parent: everything else comes from the defaults of its class.
LING = {
    "architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe", "vocab_size": 157184, "hidden_size": 2048,
    "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 5120,
    "moe_intermediate_size": 512,
}  # fmt: skip

LLADAMOE = json.loads((GOLDEN / "lladamoe" / "config.json").read_text())


def without(values, *keys):
    return {k: v for k, v in values.items() if k not in keys}


def test_llada2_mini():
    c = Config.from_dict(MINI)
    assert (c.family, c.causal) == ("llada2", False)
    assert (c.num_hidden_layers, c.hidden_size, c.head_dim, c.rotary_dim) == (20, 2048, 128, 64)
    assert c.moe_layers == (False,) + (True,) * 19
    assert (c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size, c.shared_expert_intermediate_size) == (256, 8, 512, 512)
    assert (c.n_group, c.topk_group, c.routed_scaling_factor, c.score_function) == (8, 4, 2.5, "sigmoid")
    assert c.norm_topk_prob and c.expert_bias and c.use_qk_norm and c.router_dtype == "fp32"
    assert not (c.use_bias or c.use_qkv_bias or c.tie_word_embeddings)
    assert (c.rope_theta, c.rms_norm_eps) == (600000.0, 1e-6)
    assert (c.pad_token_id, c.mask_token_id, c.eos_token_id) == (156892, 156895, 156892)
    assert c.qkv_size == (16 + 2 * 4) * 128


def test_llada2_takes_the_defaults_of_its_class():
    kept = without(
        MINI, "partial_rotary_factor", "rotary_dim", "rope_theta", "routed_scaling_factor", "use_bias", "rms_norm_eps",
        "num_shared_experts", "pad_token_id", "num_key_value_heads", "head_dim", "first_k_dense_replace", "n_group", "topk_group",
    )  # fmt: skip
    c = Config.from_dict(kept)
    assert (c.head_dim, c.rotary_dim, c.rope_theta, c.routed_scaling_factor) == (128, 64, 10000.0, 2.5)
    assert (c.use_bias, c.use_qk_norm, c.rms_norm_eps) == (True, True, 1e-5)
    assert (c.num_key_value_heads, c.shared_expert_intermediate_size, c.pad_token_id) == (16, 0, 126081)
    assert c.moe_layers == (True,) * 20 and (c.n_group, c.topk_group) == (8, 4)


def test_parent_takes_the_defaults_of_its_class():
    c = Config.from_dict(LING)
    assert (c.family, c.causal) == ("bailing_moe_v2", True)
    # Both differ from LLaDA2: no key means that every dim rotates, and that weights are not scaled.
    assert (c.rotary_dim, c.routed_scaling_factor) == (128, 1.0)
    assert (c.rope_theta, c.rms_norm_eps, c.use_bias, c.use_qk_norm) == (600000.0, 1e-6, False, True)
    assert (c.num_experts, c.num_experts_per_tok, c.shared_expert_intermediate_size) == (256, 8, 512)
    assert c.moe_layers == (False, True, True, True)


@pytest.mark.parametrize("model_type", ["bailing_moe", "bailing_moe_v2"])
def test_parent_without_groups(model_type):
    c = Config.from_dict(LING | {"model_type": model_type, "n_group": 0, "topk_group": 0})
    assert (c.n_group, c.topk_group) == (1, 1)
    assert c.to_dict()["n_group"] == 0, "an unchanged file is written back as it was"


def test_lladamoe():
    c = Config.from_dict(LLADAMOE | {"norm_topk_prob": True, "routed_scaling_factor": 3})
    assert (c.family, c.causal, c.score_function, c.router_dtype) == ("lladamoe", False, "softmax", "model")
    assert (c.norm_topk_prob, c.routed_scaling_factor, c.expert_bias) == (False, 1.0, False), "the official code ignores these keys"
    assert (c.head_dim, c.rotary_dim, c.moe_intermediate_size, c.intermediate_size) == (16, 16, 32, 96)
    assert (c.rms_norm_eps, c.rope_theta, c.use_qk_norm, c.eos_token_id) == (1e-5, 50000.0, True, 252)
    assert Config.from_dict(LLADAMOE | {"moe_layer_freq": [0, 1]}).moe_layers == (False, True)


def test_merged_layout_is_the_same_model():
    merged = Config.from_dict(MINI | {"model_type": "llada2_moe_veomni"})
    assert merged == Config.from_dict(MINI)
    assert merged.to_dict()["model_type"] == "llada2_moe_veomni"


def test_top_k_of_one_is_not_normalised():
    assert not Config.from_dict(MINI | {"num_experts_per_tok": 1, "norm_topk_prob": True}).norm_topk_prob
    assert Config.from_dict(MINI | {"norm_topk_prob": False}).norm_topk_prob, "the official code does not read this key"


def test_rope_parameters_of_newer_files():
    nested = without(MINI, "rope_theta", "partial_rotary_factor") | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 3000000, "partial_rotary_factor": 0.25}
    }
    c = Config.from_dict(nested)
    assert (c.rope_theta, c.rotary_dim) == (3e6, 32)
    assert Config.from_dict(replace(c, rope_theta=5.0).to_dict()).rope_theta == 5.0


@pytest.mark.parametrize("values", [MINI, LING, LLADAMOE], ids=["llada2", "parent", "lladamoe"])
def test_round_trip_keeps_unknown_keys(values):
    values = values | {"auto_map": {"AutoConfig": "a.B"}, "made_up": [1, {"x": None}], "torch_dtype": "bfloat16"}
    before = copy.deepcopy(values)
    c = Config.from_dict(values)
    assert c.to_dict() == before and values == before
    changed = replace(c, rope_theta=1234.0, num_experts_per_tok=2)
    written = changed.to_dict()
    assert Config.from_dict(written) == changed
    assert {k for k in written if written[k] != before.get(k)} == {"rope_theta", "num_experts_per_tok"}
    fresh = replace(c, raw={})
    assert Config.from_dict(json.loads(json.dumps(fresh.to_dict()))) == fresh


@pytest.mark.parametrize("key", ["pad_token_id", "mask_token_id", "eos_token_id"])
@pytest.mark.parametrize("values", [MINI, MINI | {"pad_token_id": 316, "mask_token_id": 317, "eos_token_id": 318}, LING, LLADAMOE])
def test_a_token_id_that_is_taken_away_stays_away(values, key):
    """Whether config.json named it or the family's default stood in: null means none, a missing key the default."""
    before = Config.from_dict(values)
    changed = replace(before, **{key: None})
    again = Config.from_dict(json.loads(json.dumps(changed.to_dict())))
    assert getattr(again, key) is None and again == changed
    assert Config.from_dict(replace(again, **{key: 5}).to_dict()) == replace(before, **{key: 5})
    fresh = replace(changed, raw={})
    assert Config.from_dict(fresh.to_dict()) == fresh
    assert getattr(Config.from_dict(without(MINI, key)), key) in (126081, 156895, 156892)


@pytest.mark.parametrize("case", sorted(p.parent.name for p in GOLDEN.glob("*/model.safetensors")))
def test_golden_configs_round_trip(case):
    values = json.loads((GOLDEN / case / "config.json").read_text())
    c = Config.from_pretrained(GOLDEN / case)
    assert c.to_dict() == values and c.vocab_size == values["vocab_size"]
    assert c.mask_token_id is None, "the family's default lies outside this vocabulary"


def test_as_diffusion():
    values = LING | {"num_nextn_predict_layers": 1, "auto_map": {"AutoModel": "x.Y"}, "kept": 1}
    written = Config.from_dict(values).as_diffusion().to_dict()
    assert written["architectures"] == ["LLaDA2MoeModelLM"] and written["model_type"] == "llada2_moe"
    assert written["kept"] == 1 and "auto_map" not in written and "num_nextn_predict_layers" not in written
    # What the parent's class had as default is spelled out, because the defaults of LLaDA2 differ.
    assert (written["partial_rotary_factor"], written["routed_scaling_factor"], written["use_bias"]) == (1.0, 1.0, False)
    c = Config.from_dict(written)
    assert (c.family, c.causal, c.mask_token_id) == ("llada2", False, 156895)
    assert replace(c, family="bailing_moe_v2", causal=True) == Config.from_dict(LING)
    assert Config.from_dict(LING | {"vocab_size": 100}).as_diffusion(mask_token_id=99).mask_token_id == 99
    with pytest.raises(ValueError, match="mask_token_id: expected a token id"):
        Config.from_dict(LING | {"vocab_size": 100}).as_diffusion()
    with pytest.raises(ValueError, match="family: expected"):
        Config.from_dict(LLADAMOE).as_diffusion()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures: expected one of LLaDA2MoeModelLM, .* got 'LlamaForCausalLM'"),
        ({"architectures": ["LLaDAModelLM"], "model_type": "llada"}, "architectures: .* got 'LLaDAModelLM' .*dense"),
        ({"architectures": None, "model_type": "llada"}, "architectures: .* got None .*'llada' is also a dense model"),
        ({"architectures": [], "model_type": ["x"]}, "architectures: expected one of"),
        ({"architectures": [3]}, "architectures: expected one of .* got 3"),
        ({"model_type": "qwen"}, "model_type: expected 'llada2_moe' or 'llada2_moe_veomni' .* got 'qwen'"),
        ({"hidden_size": "2048"}, r"hidden_size: expected an integer, got '2048' \(str\)"),
        ({"hidden_size": True}, r"hidden_size: expected an integer, got True \(bool\)"),
        ({"hidden_size": None}, "hidden_size: expected a value in config.json, got null"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected an integer of 1 to 1024, got 0"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers: expected an integer of 1 to 1024"),
        ({"num_experts": 10**9}, "num_experts: expected an integer of 1 to 4096"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: expected a positive number, got 0"),
        ({"rope_theta": float("inf")}, "rope_theta: expected a finite number"),
        ({"rope_theta": float("nan")}, "rope_theta: expected a finite number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false, got 1"),
        ({"num_key_value_heads": 5}, r"num_key_value_heads: expected a divisor of 16 \(num_attention_heads\), got 5"),
        ({"partial_rotary_factor": 2.0}, "rotary_dim: expected an even number .* got 256"),
        ({"partial_rotary_factor": 0.01}, "rotary_dim: expected an even number .* got 1"),
        ({"n_group": 7}, r"n_group: expected a divisor of 256 \(num_experts\), got 7"),
        ({"n_group": 256}, "n_group: expected groups of at least two experts, got 256"),
        ({"topk_group": 9}, r"topk_group: expected 1 to 8 \(n_group\), got 9"),
        ({"num_experts_per_tok": 200}, "num_experts_per_tok: expected 1 to 128 .* got 200"),
        ({"pad_token_id": 157184}, r"pad_token_id: expected a token id of 0 to 157183 \(vocab_size - 1\), got 157184"),
        ({"mask_token_id": -1}, "mask_token_id: expected a token id"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu' .* got 'gelu'"),
        ({"norm_head": True}, "norm_head: expected False"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config: expected null or no such key \(.*\), got {'bits': 4} \(dict\)"),
        ({"score_function": "softmax"}, "score_function: expected 'sigmoid'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_scaling: expected null or the rope type 'default'"),
        ({"expert_capacity": 48}, "expert_capacity: .*LLaDA2.2.* got 48"),
        ({"intermediate_size": None}, "intermediate_size: expected a value"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size: expected an integer of 1"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict(MINI | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe_layer_freq": [1]}, r"moe_layer_freq: expected a list of 2 \(num_hidden_layers\) entries"),
        ({"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias: expected 0 or False"),
        ({"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size: expected 0"),
        ({"clip_qkv": 3.0}, "clip_qkv: expected"),
        ({"router_num_group": 4}, "router_num_group: expected 0"),
        ({"model_type": "llada2_moe"}, "model_type: expected 'llada' for LLaDAMoEModelLM"),
        ({"num_experts": None}, "num_experts: expected a value"),
    ],
)
def test_bad_lladamoe_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict(LLADAMOE | change)


def test_architecture_decides_without_model_type_and_the_other_way_round():
    assert Config.from_dict(without(MINI, "model_type")).family == "llada2"
    assert Config.from_dict(without(MINI, "architectures")).family == "llada2"
    with pytest.raises(ValueError, match="'bailing_moe' also Ling 1"):
        Config.from_dict(without(LING, "architectures"))


def test_not_a_config_file(tmp_path):
    with pytest.raises(TypeError, match="config: expected a mapping"):
        Config.from_dict([1])
    with pytest.raises(ValueError, match="config.json: expected a file, found none"):
        Config.from_pretrained(tmp_path)
    file = tmp_path / "config.json"
    for text, message in [
        (b"[1]", "expected a JSON object, got list"),
        (b"{", "expected JSON"),
        (b"\xff\xfe", "expected UTF-8"),
        (b"[" * 200000, "expected JSON"),
        (b'{"a": ' + b"1" * 10000 + b"}", "expected JSON"),
        (b" " * (5 << 20), "expected at most 4194304 bytes"),
    ]:
        file.write_bytes(text)
        with pytest.raises(ValueError, match=message):
            Config.from_pretrained(tmp_path)


def test_direct_construction_is_validated():
    c = Config.from_dict(MINI)
    with pytest.raises(ValueError, match="moe_layers: expected 20 entries"):
        replace(c, moe_layers=(True,))
    with pytest.raises(ValueError, match="moe_layers: expected dense layers only before"):
        replace(c, moe_layers=(True, False) * 10)
    with pytest.raises(ValueError, match="family: expected one of"):
        replace(c, family="gpt")
    with pytest.raises(ValueError, match="eos_token_id: expected None or a token id"):
        replace(c, eos_token_id=10**6)
    assert Config.from_dict(MINI | {"eos_token_id": [156892, 156900]}).eos_token_id == 156892


@pytest.mark.parametrize(
    ("field", "wrong", "message"),
    [
        ("vocab_size", "320", "vocab_size: expected an int, got str '320'"),
        ("hidden_size", 64.5, "hidden_size: expected an int, got float 64.5"),
        ("num_experts", True, "num_experts: expected an int, got bool True"),
        ("rope_theta", "1e4", "rope_theta: expected a number, got str '1e4'"),
        ("rope_theta", None, "rope_theta: expected a number, got NoneType None"),
        ("use_bias", 1, "use_bias: expected True or False, got int 1"),
        ("mask_token_id", 3.0, "mask_token_id: expected an int or None, got float 3.0"),
        ("score_function", 3, "score_function: expected a str, got int 3"),
        ("moe_layers", (0, 1, 1), r"moe_layers: expected a tuple of True and False, got tuple \(0, 1, 1\)"),
        ("moe_layers", 3, "moe_layers: expected a tuple of True and False, got int 3"),
        ("raw", [], "raw: expected a dict, got list"),
    ],
)
def test_fields_have_their_types(field, wrong, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        replace(Config.from_pretrained(GOLDEN / "forward_full"), **{field: wrong})


def test_moe_layers_may_be_a_list():
    config = Config.from_pretrained(GOLDEN / "forward_full")
    again = replace(config, moe_layers=list(config.moe_layers))
    assert again == config and hash(again.moe_layers) == hash(config.moe_layers)


def test_the_file_may_have_any_name(tmp_path):
    (tmp_path / "mini").write_text(json.dumps(MINI))
    assert Config.from_pretrained(tmp_path / "mini") == Config.from_dict(MINI)
    for name, message in (("none.json", "none.json: expected a file, found none"), ("none", "path: expected a directory")):
        with pytest.raises(ValueError, match=message):
            Config.from_pretrained(tmp_path / name)
    with pytest.raises(TypeError, match="path: expected a path or a hub id, got int"):
        Config.from_pretrained(3)
