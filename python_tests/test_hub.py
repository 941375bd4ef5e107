"""Checkpoints: official layouts in and out bitwise, crash safety, memory."""

import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llada_kernels import Config, Model, hub
from llada_kernels._tensor_names import tensor_slots

from .checkpoints import GOLDEN, LLADA2, MERGED, assert_bitwise, checkpoint, ling, problems, stored

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
    assert Model.from_pretrained(source, dtype="float32").dtype == torch.float32
    assert Model.from_pretrained(source, dtype="auto").dtype == torch.bfloat16
    for wrong in (torch.int8, "bf16", "int8", "nn", 3):
        with pytest.raises(ValueError, match=f"dtype: expected a floating torch.dtype or its name, 'auto' or None, got {wrong!r}"):
            Model.from_pretrained(source, dtype=wrong)


@pytest.mark.parametrize("device", ["foo", "cuda:999", 1.5])
def test_a_device_that_is_none_is_named(device, monkeypatch):
    monkeypatch.setattr(hub, "find_tensors", lambda *a: pytest.fail("the checkpoint was read first"))
    message = f"device: expected None or a device that PyTorch can use here, got {device!r}: "
    with pytest.raises(ValueError, match=message):
        Model.from_pretrained(LLADA2.parent, device=device)


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


def test_a_checkpoint_of_another_configuration_is_not_overwritten(tmp_path, monkeypatch):
    """Weights and config.json are two files: between their renames the weights of the one would load as the other."""
    parent = Model.from_pretrained(ling(tmp_path))
    parent.save_pretrained(tmp_path / "saved")
    before = {f.name: f.read_bytes() for f in (tmp_path / "saved").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(parent, "config", parent.config.as_diffusion(mask_token_id=319))
        with pytest.raises(ValueError, match=r"path: expected an empty directory or .*, got .*saved, whose config.json differs in arch"):
            parent.save_pretrained(tmp_path / "saved")
        with pytest.raises(ValueError, match="differs in torch_dtype: save to another directory"):
            Model.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
        assert {f.name: f.read_bytes() for f in (tmp_path / "saved").iterdir()} == before
        (tmp_path / "saved" / "config.json").unlink()  # no checkpoint any more
        parent.save_pretrained(tmp_path / "saved")
    assert not Model.from_pretrained(tmp_path / "saved").config.causal


def test_generation_config_of_the_previous_checkpoint_goes_with_it(tmp_path):
    m = Model.from_pretrained(LLADA2.parent)
    m.generation_config = {"eos_token_id": 7}
    m.save_pretrained(tmp_path)
    assert Model.from_pretrained(tmp_path).generation_config == {"eos_token_id": 7}
    m.generation_config = {}
    m.save_pretrained(tmp_path)
    assert Model.from_pretrained(tmp_path).generation_config == {} and not (tmp_path / "generation_config.json").exists()


def test_every_file_is_on_the_disk_before_any_gets_its_name(tmp_path, monkeypatch):
    """fsync of every file, then the renames, each followed by fsync of the directory, and only then the old files go."""
    m = Model.from_pretrained(LLADA2.parent)
    m.generation_config = {"eos_token_id": 7}
    m.save_pretrained(tmp_path, max_shard_size="200KB")
    events = []
    real_fsync, real_replace, real_unlink = os.fsync, os.replace, Path.unlink

    def fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(("fsync", path, path.stat().st_size))
        real_fsync(descriptor)

    def replace_(source, target):
        events.append(("rename", Path(source), Path(source).stat().st_size))
        real_replace(source, target)

    def unlink(self, missing_ok=False):
        if self.exists():
            events.append(("unlink", self, 0))
        real_unlink(self, missing_ok)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace_)
    monkeypatch.setattr(Path, "unlink", unlink)
    m.save_pretrained(tmp_path, max_shard_size="100KB")
    names = [path.name for what, path, _ in events if what == "rename"]
    assert len(names) > 8 and [n.split(".")[1] for n in names[-2:]] == ["config", "generation_config"]
    first = next(i for i, event in enumerate(events) if event[0] == "rename")
    synced = {path.name: size for what, path, size in events[:first] if what == "fsync"}
    for i, (what, path, size) in enumerate(events):
        if what == "rename":
            assert synced.get(path.name) == size > 0, f"{path.name} was not synced whole before the first rename"
            assert events[i + 1][:2] == ("fsync", tmp_path), f"the rename of {path.name} was not synced"
    removed = [i for i, event in enumerate(events) if event[0] == "unlink"]
    assert len(removed) >= 4 and min(removed) > max(i for i, event in enumerate(events) if event[0] == "rename")


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
