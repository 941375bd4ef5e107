"""Checkpoints: official layouts in and out bitwise, every refusal, crash safety, memory."""

import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llada_kernels import Config, Model, hub
from llada_kernels._checkpoint_files import CheckpointError
from llada_kernels._tensor_names import tensor_slots

GOLDEN = Path(__file__).parent / "golden"
LLADA2, MERGED = GOLDEN / "forward_full" / "model.safetensors", GOLDEN / "forward_full" / "model_merged.safetensors"


def checkpoint(folder: Path, tensors=None, case="forward_full", config=None) -> Path:
    """A directory with a config and one safetensors file: those of a golden case, or changed ones."""
    folder.mkdir(exist_ok=True)
    values = json.loads((GOLDEN / case / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(values))
    if tensors is None:
        shutil.copyfile(GOLDEN / case / "model.safetensors", folder / "model.safetensors")
    else:
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by the reader of safetensors."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_bitwise(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert torch.equal(a[name].contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8)), name


def problems(folder: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        Model.from_pretrained(folder)
    assert isinstance(caught.value, ValueError) and str(folder) in str(caught.value)
    assert all(p in str(caught.value) for p in caught.value.problems)
    return caught.value.problems


# --- reading


def test_fused_parameters_hold_the_official_rows():
    m, official = Model.from_pretrained(LLADA2.parent), load_file(LLADA2)
    layer, prefix = m.layers[2], "model.layers.2."
    assert not m.training and m.load_report == hub.LoadReport()
    assert torch.equal(layer.attention.qkv.weight, official[prefix + "attention.query_key_value.weight"])
    assert torch.equal(layer.mlp.w_gate_up[3, :16], official[prefix + "mlp.experts.3.gate_proj.weight"])
    assert torch.equal(layer.mlp.w_gate_up[3, 16:], official[prefix + "mlp.experts.3.up_proj.weight"])
    assert torch.equal(layer.mlp.w_down[15], official[prefix + "mlp.experts.15.down_proj.weight"])
    assert torch.equal(layer.mlp.shared_expert.gate_up.weight[16:], official[prefix + "mlp.shared_experts.up_proj.weight"])
    assert torch.equal(layer.mlp.router.expert_bias, official[prefix + "mlp.gate.expert_bias"])
    assert "layers.2.mlp.router.expert_bias" not in dict(m.named_parameters())
    assert torch.equal(m.layers[0].mlp.gate_up.weight[:96], official["model.layers.0.mlp.gate_proj.weight"])
    assert torch.equal(m.lm_head_weight, official["lm_head.weight"])
    moe = Model.from_pretrained(GOLDEN / "lladamoe")
    official = load_file(GOLDEN / "lladamoe" / "model.safetensors")
    parts = [official[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(moe.layers[1].attention.qkv.weight, torch.cat(parts))


def test_merged_layout_gives_the_same_model(tmp_path):
    folder = checkpoint(tmp_path / "m", load_file(MERGED), config={"model_type": "llada2_moe_veomni"})
    assert_bitwise(Model.from_pretrained(folder).state_dict(), Model.from_pretrained(LLADA2.parent).state_dict())


@pytest.mark.parametrize("layout", ["per_expert", "merged"])
@pytest.mark.parametrize("shard", ["5GB", "100KB"])
@pytest.mark.parametrize("case", ["forward_full", "forward_hd128", "lladamoe"])
def test_round_trip_is_bitwise(tmp_path, case, shard, layout):
    source = checkpoint(tmp_path / "source", case=case)
    (source / "generation_config.json").write_text('{"eos_token_id": [7, 8], "unknown": {"a": null}}')
    m = Model.from_pretrained(source)
    m.save_pretrained(tmp_path / "saved", layout=layout, max_shard_size=shard)
    assert ((tmp_path / "saved" / "model.safetensors.index.json").exists()) == (shard == "100KB")
    again = Model.from_pretrained(tmp_path / "saved")
    assert_bitwise(again.state_dict(), m.state_dict())
    assert again.config == m.config and again.generation_config == {"eos_token_id": [7, 8], "unknown": {"a": None}}
    again.save_pretrained(tmp_path / "back")
    # Not only ours to ours: the official file comes back, name by name and bit by bit, and so does its config.
    assert_bitwise(stored(tmp_path / "back"), stored(source))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert not [f for f in (tmp_path / "saved").iterdir() if f.name.startswith(".")]


def test_written_merged_file_is_the_official_one(tmp_path):
    Model.from_pretrained(LLADA2.parent).save_pretrained(tmp_path, layout="merged")
    assert_bitwise(stored(tmp_path), load_file(MERGED))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llada2_moe_veomni"


def test_index_names_every_tensor_and_its_size(tmp_path):
    m = Model.from_pretrained(LLADA2.parent)
    m.save_pretrained(tmp_path, max_shard_size=200_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    official = load_file(LLADA2)
    assert index["weight_map"].keys() == official.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in official.values())
    for name in set(index["weight_map"].values()):
        held = load_file(tmp_path / name)
        assert {k for k, v in index["weight_map"].items() if v == name} == held.keys()
        assert sum(t.numel() * t.element_size() for t in held.values()) <= 200_000


def test_dtypes():
    source = GOLDEN / "forward_hd128"
    kept = Model.from_pretrained(source)
    assert kept.dtype == torch.bfloat16 and kept.layers[1].mlp.router.expert_bias.dtype == torch.float32
    wide = Model.from_pretrained(source, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert torch.equal(wide.layers[1].mlp.w_down, kept.layers[1].mlp.w_down.float())
    with pytest.raises(ValueError, match="dtype: expected a floating torch.dtype or None, got torch.int8"):
        Model.from_pretrained(source, dtype=torch.int8)
    with pytest.raises(ValueError, match="dtype: expected a floating torch.dtype"):
        Model.from_pretrained(source, dtype="bf16")


def test_router_and_bias_are_never_narrowed(tmp_path):
    tensors = {k: v if "mlp.gate." in k else v.bfloat16() for k, v in load_file(LLADA2).items()}
    folder = checkpoint(tmp_path / "c", tensors)
    for m in (Model.from_pretrained(folder), Model.from_pretrained(folder, dtype=torch.bfloat16)):
        assert m.dtype == torch.bfloat16
        assert torch.equal(m.layers[1].mlp.router.weight, tensors["model.layers.1.mlp.gate.weight"])
        assert torch.equal(m.layers[1].mlp.router.expert_bias, tensors["model.layers.1.mlp.gate.expert_bias"])
    m = m.to(torch.bfloat16).to(torch.float16)
    assert torch.equal(m.layers[1].mlp.router.expert_bias, tensors["model.layers.1.mlp.gate.expert_bias"])
    Model.from_pretrained(folder).save_pretrained(tmp_path / "d")
    assert_bitwise(stored(tmp_path / "d"), tensors)


def test_converted_tensors_are_listed(tmp_path):
    tensors = {k: v.bfloat16() for k, v in load_file(LLADA2).items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    m = Model.from_pretrained(checkpoint(tmp_path / "c", tensors))
    biases = ("model.layers.1.mlp.gate.expert_bias", "model.layers.2.mlp.gate.expert_bias")
    assert m.load_report.converted == (*biases, "model.norm.weight")


def ling(tmp_path, extra=None, config=None):
    values = {"architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe", "num_nextn_predict_layers": 1}
    return checkpoint(tmp_path / "ling", load_file(LLADA2) | (extra or {}), config=values | (config or {}))


def test_parent_drops_multi_token_prediction_and_says_so(tmp_path):
    extra = {
        "model.layers.3.enorm.weight": torch.ones(64), "model.layers.3.eh_proj.weight": torch.ones(64, 128),
        "model.layers.3.mlp.experts.0.up_proj.weight": torch.ones(16, 64), "model.rotary_emb.inv_freq": torch.ones(4),
    }  # fmt: skip
    m = Model.from_pretrained(ling(tmp_path, extra))
    assert m.config.causal and set(m.load_report.dropped) == extra.keys()
    assert_bitwise(m.state_dict(), Model.from_pretrained(LLADA2.parent).state_dict())


def test_only_the_parent_may_drop_layers(tmp_path):
    tensors = load_file(LLADA2) | {"model.layers.3.enorm.weight": torch.ones(64)}
    assert problems(checkpoint(tmp_path / "c", tensors)) == (
        "tensor model.layers.3.enorm.weight: unknown in a llada2 model, got F32 (64,) in model.safetensors",
    )


def test_optional_expert_bias_and_biases(tmp_path):
    config = Config.from_pretrained(LLADA2.parent)
    tensors = {k: v for k, v in load_file(LLADA2).items() if "expert_bias" not in k}
    folder = checkpoint(tmp_path / "c", tensors, config={"moe_router_enable_expert_bias": False})
    assert not Model.from_pretrained(folder).layers[1].mlp.router.expert_bias.any()
    assert len(problems(checkpoint(tmp_path / "d", tensors))) == 2
    m = Model(replace(config, use_bias=True, use_qkv_bias=True, use_qk_norm=False, tie_word_embeddings=True))
    for name, p in m.named_parameters():
        assert (".bias" in name) == bool((p == 0).all())
        p.data.uniform_()
    m.save_pretrained(tmp_path / "e")
    names = stored(tmp_path / "e").keys()
    assert "lm_head.weight" not in names and "model.layers.0.attention.dense.bias" in names
    assert "model.layers.0.attention.query_key_value.bias" in names and "model.layers.0.attention.key_layernorm.weight" not in names
    assert_bitwise(Model.from_pretrained(tmp_path / "e").state_dict(), m.state_dict())


def test_random_model_round_trip_of_lladamoe_options(tmp_path):
    config = Config.from_pretrained(GOLDEN / "lladamoe")
    m = Model(replace(config, use_bias=True, use_qkv_bias=True, moe_layers=(False, True)), dtype=torch.float16)
    m.save_pretrained(tmp_path)
    again = Model.from_pretrained(tmp_path)
    assert_bitwise(again.state_dict(), m.state_dict())
    assert again.config.moe_layers == (False, True) and again.dtype == torch.float16
    assert "model.layers.0.mlp.gate_proj.weight" in stored(tmp_path)


# --- refusals


def test_all_problems_are_listed_at_once(tmp_path):
    tensors = load_file(LLADA2)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.experts.7.up_proj.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :32]
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].long()
    tensors["model.surprise"] = torch.zeros(3)
    found = problems(checkpoint(tmp_path / "c", tensors))
    assert set(found) == {
        "tensor model.norm.weight: missing (expected shape (64,))",
        "tensor model.layers.1.mlp.experts.7.up_proj.weight: missing (expected shape (16, 64))",
        "tensor lm_head.weight: expected shape (320, 64), got (320, 32) in model.safetensors",
        "tensor model.layers.0.mlp.up_proj.weight: expected dtype F64, F32, F16, BF16, got I64 in model.safetensors",
        "tensor model.surprise: unknown in a llada2 model, got F32 (3,) in model.safetensors",
    }


def test_nothing_is_allocated_before_the_problems_are_known(tmp_path, monkeypatch):
    tensors = load_file(LLADA2)
    del tensors["model.norm.weight"]
    monkeypatch.setattr(Model, "to_empty", lambda *a, **k: pytest.fail("memory was allocated"))
    problems(checkpoint(tmp_path / "c", tensors))


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    Model.from_pretrained(LLADA2.parent).save_pretrained(folder, max_shard_size=200_000)
    return folder


def test_missing_and_truncated_shards_are_listed_together(sharded):
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) >= 4
    shards[0].unlink()
    data = shards[1].read_bytes()
    shards[1].write_bytes(data[:-1000])
    shards[2].write_bytes(data[:5])
    found = "\n".join(problems(sharded))
    assert f"shard {shards[0].name}: missing" in found
    assert f"{shards[1].name}: truncated: 1000 bytes are missing, for the tensors model." in found
    assert f"{shards[2].name}: truncated or not safetensors: 5 bytes" in found


def test_index_and_shards_must_agree(sharded):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    names = sorted(set(index["weight_map"].values()))
    home = index["weight_map"]["model.norm.weight"]
    assert home != names[0]
    index["weight_map"]["model.norm.weight"] = names[0]
    del index["weight_map"]["model.layers.2.attention.dense.weight"]
    file.write_text(json.dumps(index))
    found = "\n".join(problems(sharded))
    assert f"tensor model.norm.weight: missing from {names[0]}, where the index places it" in found
    assert f"tensor model.norm.weight: found in {home}, but the index places it in {names[0]}" in found
    assert "tensor model.layers.2.attention.dense.weight: found in" in found and "no shard" in found


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "x.bin", 3, None])
def test_index_may_not_lead_elsewhere(sharded, name):
    shutil.copyfile(LLADA2, sharded.parent / "evil.safetensors")
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = name
    file.write_text(json.dumps(index))
    assert any("weight_map['model.norm.weight']: expected the plain name of a .safetensors file" in p for p in problems(sharded))


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": []}', '{"weight_map": {}}', "{}", "[" * 100_000])
def test_broken_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in problems(sharded)[0]


def header(entries, data=b"", length=None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or not safetensors: 0 bytes"),
        (b"\x80\x02}q\x00.", "truncated or not safetensors"),
        (header({}, length=2**63), "of which the header claims 9223372036854775808"),
        (header({}, length=2**64 - 1), "truncated or not safetensors"),
        (header(b" " * (17 << 20)), "expected a header of at most 16777216 bytes"),
        (header(b"\xff{}"), "expected a JSON header"),
        (header(b"[1]"), "expected a JSON object as header, got list"),
        (header(b"{" * 100_000), "expected a JSON header"),
        (header(b'{"x": ' + b"[" * 100_000), "expected a JSON header"),
        (header(b'{"x": {}, "x": {}}'), "occurs twice"),
        (header({"x": 3}), "expected dtype, shape and data_offsets, got 3"),
        (header({"x": {"dtype": "F32"}}), "expected dtype, shape and data_offsets"),
        (header({"x": entry(dtype="F31")}, b"0" * 8), "dtype: expected one of .* got 'F31'"),
        (header({"x": entry(dtype=["F32"])}, b"0" * 8), "dtype: expected one of"),
        (header({"x": entry(shape=(-2,))}, b"0" * 8), r"shape: expected at most 8 sizes of at least 0, got \[-2\]"),
        (header({"x": entry(shape=(2.0,))}, b"0" * 8), "shape: expected"),
        (header({"x": entry(shape=(True, 2))}, b"0" * 8), "shape: expected"),
        (header({"x": entry(shape=(1,) * 100)}, b"0" * 8), "shape: expected"),
        (header({"x": entry(shape=(2**40, 2**40))}, b"0" * 8), "data_offsets: expected 4835703278458516698824704 bytes"),
        (header({"x": entry(shape=(10**30,))}, b"0" * 8), "shape: expected"),
        (header({"x": entry(offsets=(8, 0))}, b"0" * 8), "data_offsets: expected two rising positions"),
        (header({"x": entry(offsets=(-8, 0))}, b"0" * 8), "data_offsets: expected two rising positions"),
        (header({"x": entry(offsets=(0, 4))}, b"0" * 8), r"data_offsets: expected 8 bytes for F32 of shape \(2,\), got 4"),
        (header({"x": entry()}, b"0" * 7), "truncated: 1 bytes are missing, for the tensors x"),
        (header({"x": entry(offsets=(2**61, 2**61 + 8))}, b"0" * 8), "truncated: 2305843009213693952 bytes"),
        (header({"x": entry(), "y": entry(offsets=(4, 12))}, b"0" * 12), "tensor y: its bytes overlap those of x"),
        (header({"x": entry(), "y": entry()}, b"0" * 8), "its bytes overlap those of"),
        (header({"x": entry(offsets=(4, 12))}, b"0" * 12), "tensor x: expected data from byte 0, got 4"),
        (header({"x": entry()}, b"0" * 9), "expected 8 bytes of data by its header, got 9"),
    ],
)
def test_hostile_headers(tmp_path, content, message):
    folder = checkpoint(tmp_path / "c")
    (folder / "model.safetensors").write_bytes(content)
    found = problems(folder)
    assert any(re.search(message, p) for p in found), found[:3]


def test_pickles_are_refused(tmp_path):
    folder = checkpoint(tmp_path / "c")
    (folder / "model.safetensors").unlink()
    assert "expected model.safetensors or model.safetensors.index.json" in problems(folder)[0]
    marker = tmp_path / "ran"
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    assert "pickled weights (pytorch_model.bin): refused" in problems(folder)[0]
    with pytest.raises(ValueError, match="pickled weights are refused"):
        Model.from_pretrained(folder / "pytorch_model.bin")
    assert not marker.exists()


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="path: expected a directory or a hub id 'owner/name', got '/no/such'"):
        Model.from_pretrained("/no/such")
    with pytest.raises(ValueError, match="config.json: expected a file, found none"):
        Model.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="path: expected a path or a hub id, got int"):
        Model.from_pretrained(3)
    with pytest.raises(ValueError, match="got the file"):
        Model.from_pretrained(LLADA2)


def test_fp8_exports_are_refused(tmp_path):
    extra = {"model.layers.0.attention.dense.weight_scale_inv": torch.ones(1, 1)}
    found = problems(ling(tmp_path, extra))
    assert len(found) == 1 and "FP8 exports are not supported yet" in found[0]


def test_hub_id_is_fetched_without_code_or_pickles(monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(repo, **options):
        asked.update(options, repo=repo)
        return str(LLADA2.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    m = Model.from_pretrained("inclusionAI/LLaDA2.0-mini", revision="abc")
    assert m.config.vocab_size == 320 and asked["repo"] == "inclusionAI/LLaDA2.0-mini" and asked["revision"] == "abc"
    assert set(asked["allow_patterns"]) == {"*.json", "*.safetensors", "*.jinja"}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: 1 / 0)
    with pytest.raises(OSError, match="no directory 'a/b' here, and it could not be fetched"):
        Model.from_pretrained("a/b")


# --- writing


def test_save_arguments(tmp_path):
    m = Model.from_pretrained(LLADA2.parent)
    with pytest.raises(ValueError, match="layout: expected one of per_expert, merged, got 'x'"):
        m.save_pretrained(tmp_path / "a", layout="x")
    for size in ("5XB", 0, -1, True, 1.5, ""):
        with pytest.raises(ValueError, match="max_shard_size: expected"):
            m.save_pretrained(tmp_path / "a", max_shard_size=size)
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="path: expected a directory, got the file"):
        m.save_pretrained(tmp_path / "file")
    assert hub._bytes("5GB") == 5 * 10**9 and hub._bytes("1.5 KiB") == 1536 and hub._bytes("7B") == 7


LAYOUTS = [("5GB", "5GB"), ("5GB", "200KB"), ("200KB", "5GB"), ("200KB", "200KB"), ("200KB", "100KB")]


@pytest.mark.parametrize(("first", "second"), LAYOUTS)
def test_saving_over_a_checkpoint_leaves_exactly_the_new_one(tmp_path, first, second):
    m = Model.from_pretrained(LLADA2.parent)
    m.save_pretrained(tmp_path, max_shard_size=first)
    (tmp_path / "tokenizer.json").write_text("{}")
    with torch.no_grad():
        m.norm.weight.add_(1)
    m.save_pretrained(tmp_path, max_shard_size=second)
    assert_bitwise(Model.from_pretrained(tmp_path).state_dict(), m.state_dict())
    held = sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
    assert held < 1.3 * LLADA2.stat().st_size, "the files of the first checkpoint are gone"
    assert (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize(("first", "second"), LAYOUTS[:4])
def test_every_moment_of_saving_leaves_a_whole_checkpoint(tmp_path, monkeypatch, first, second):
    """Stop at each system call that changes the directory, as a kill would: the old or the new model loads, never a mixture."""
    m = Model.from_pretrained(LLADA2.parent)
    old = {k: v.clone() for k, v in m.state_dict().items()}
    m.save_pretrained(tmp_path / "start", max_shard_size=first)
    with torch.no_grad():
        for p in m.parameters():
            p.add_(1)

    class Killed(BaseException):
        pass

    def stop_at(step):
        left = [step]

        def counted(real):
            def call(*args, **kwargs):
                if left[0] <= 0:
                    raise Killed
                left[0] -= 1
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("replace", "fsync", "unlink"):
                patch.setattr(os, name, counted(getattr(os, name)))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            m.save_pretrained(tmp_path / "work", max_shard_size=second)

    outcomes, step = [], 0
    while True:
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        shutil.copytree(tmp_path / "start", tmp_path / "work")
        try:
            stop_at(step)
            finished = True
        except Killed:
            finished = False
        state = Model.from_pretrained(tmp_path / "work").state_dict()
        which = "old" if torch.equal(state["norm.weight"], old["norm.weight"]) else "new"
        assert_bitwise(state, old if which == "old" else m.state_dict())
        outcomes.append(which)
        if finished:
            break
        step += 1
    assert outcomes[0] == "old" and outcomes[-1] == "new" and outcomes == sorted(outcomes, reverse=True)
    m.save_pretrained(tmp_path / "work", max_shard_size=second)
    assert not [f for f in (tmp_path / "work").iterdir() if f.name.startswith(".")], "what a kill left behind is cleaned up"


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    m = Model.from_pretrained(LLADA2.parent)
    m.save_pretrained(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    real = hub.write_safetensors

    def full(file, tensors, metadata=None):
        file.write(b"some bytes")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        m.save_pretrained(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    monkeypatch.setattr(hub, "write_safetensors", real)


# --- memory


def test_peak_memory_is_the_model_plus_one_shard(tmp_path):
    """A sharded model of about 300 MB, loaded in a process of its own: peak resident memory above that of the first imports (PyTorch
    imports about 80 MB more when the meta device is first used)."""
    config = Config.from_pretrained(LLADA2.parent)
    big = replace(
        config, vocab_size=8192, hidden_size=1024, num_hidden_layers=5, num_experts=32, n_group=4, topk_group=2,
        num_experts_per_tok=4, moe_intermediate_size=256, shared_expert_intermediate_size=256, moe_layers=(False,) + (True,) * 4,
        intermediate_size=1024, raw={},
    )  # fmt: skip
    code = """
        import resource, sys, torch
        from llada_kernels import Model
        warm = torch.empty(4).normal_()
        def peak():
            for line in open("/proc/self/status"):
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) / 1024
        before = peak()
        model = Model.from_pretrained(sys.argv[1])
        print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20)
    """
    dtype_before = torch.get_default_dtype()
    m = Model(big, dtype=torch.bfloat16)
    m.save_pretrained(tmp_path, max_shard_size="40MB")
    del m
    assert torch.get_default_dtype() == dtype_before
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    rise, size = map(float, run.stdout.split())
    assert size > 200, size
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    assert rise <= size + 40 + 100, f"peak rose by {rise:.0f} MB for a model of {size:.0f} MB in shards of 40 MB"


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "c")
    real = Model.to_empty

    def shrink(self, **options):
        os.truncate(folder / "model.safetensors", 500_000)
        return real(self, **options)

    monkeypatch.setattr(Model, "to_empty", shrink)
    with pytest.raises(ValueError, match="got a file that ends within them"):
        Model.from_pretrained(folder)


def test_slots_cover_every_parameter_exactly_once():
    for case in ("forward_full", "lladamoe"):
        config = Config.from_pretrained(GOLDEN / case)
        for layout in ("per_expert", "merged"):
            state = Model(config).state_dict()
            for t in state.values():
                t.zero_()
            for slot in tensor_slots(config, layout).values():
                view = slot.of(state[slot.parameter])
                assert view.shape == slot.shape
                view.add_(1)
            assert all((t == 1).all() for t in state.values())


def test_the_released_models_have_the_published_numbers_of_tensors_and_weights():
    mini = Config(
        vocab_size=157184, hidden_size=2048, num_hidden_layers=20, num_attention_heads=16, num_key_value_heads=4, head_dim=128,
        rotary_dim=64, rope_theta=6e5, intermediate_size=5120, moe_intermediate_size=512, num_experts=256, num_experts_per_tok=8,
        moe_layers=(False,) + (True,) * 19, shared_expert_intermediate_size=512, n_group=8, topk_group=4,
    )  # fmt: skip
    flash = replace(
        mini, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=9216, moe_intermediate_size=1024,
        moe_layers=(False,) + (True,) * 31, shared_expert_intermediate_size=1024,
    )  # fmt: skip
    for config, tensors, billions in ((mini, 14813, 16.26), (flash, 24161, 102.89)):
        slots = tensor_slots(config)
        assert len(slots) == tensors
        assert round(sum(math.prod(slot.shape) for slot in slots.values()) / 1e9, 2) == billions
