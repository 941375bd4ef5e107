"""What is refused as a checkpoint: everything wrong is listed at once, nothing that a file claims is believed, no pickles."""

import json
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file

from llada_kernels import Config, Model

from .checkpoints import LLADA2, checkpoint, ling, problems


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
    asked.clear()
    assert Config.from_pretrained("inclusionAI/LLaDA2.0-mini", revision="abc").vocab_size == 320
    assert asked == {"repo": "inclusionAI/LLaDA2.0-mini", "revision": "abc", "allow_patterns": ["config.json"]}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: 1 / 0)
    for cls in (Model, Config):
        with pytest.raises(OSError, match="no directory 'a/b' here, and it could not be fetched"):
            cls.from_pretrained("a/b")
