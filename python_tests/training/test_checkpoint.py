"""Checkpoints: whatever interrupts a save, the previous one loads; nothing is pickled."""

from __future__ import annotations

import errno
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import llada_kernels
from llada_kernels import hub
from llada_kernels.model import Model
from llada_kernels.training import Trainer, average_checkpoints, checkpoint, latest_checkpoint, load_checkpoint
from llada_kernels.training.checkpoint import checkpoints, is_complete, prune_checkpoints, save_checkpoint

from .conftest import tiny_data, tiny_model
from .test_trainer import config, same


def save(root, step, model):
    return save_checkpoint(root, step, model, {"exp_avg/norm.weight": torch.full((3,), float(step))}, {"next_sample": step})


def test_round_trip_and_official_layout(tmp_path):
    model = tiny_model()
    model.layers[1].mlp.router.expert_bias.copy_(torch.arange(8) / 7)
    path = save(tmp_path, 5, model)
    other = tiny_model(seed=1)
    tensors, state = load_checkpoint(path, other)
    assert same(other.state_dict(), model.state_dict()) and state["step"] == 5 and state["next_sample"] == 5
    assert tensors["exp_avg/norm.weight"].tolist() == [5.0] * 3
    assert same(Model.from_pretrained(path).state_dict(), model.state_dict())
    assert {p.suffix for p in path.iterdir()} == {".json", ".safetensors"}


def test_latest_passes_over_incomplete_and_damaged(tmp_path):
    model = tiny_model()
    paths = [save(tmp_path, step, model) for step in (1, 2, 3)]
    assert latest_checkpoint(tmp_path) == paths[2]
    with open(paths[2] / "optimizer.safetensors", "r+b") as file:
        file.truncate(20)
    (tmp_path / ".saving-step_00000009-1").mkdir()
    (tmp_path / "step_00000007").mkdir()
    assert latest_checkpoint(tmp_path) == paths[1] and checkpoints(tmp_path) == paths[:2]
    with pytest.raises(ValueError, match="complete checkpoint"):
        load_checkpoint(paths[2], model)
    assert latest_checkpoint(tmp_path / "nowhere") is None
    repaired = save(tmp_path, 3, model)
    assert is_complete(repaired) and not list(tmp_path.glob(".saving-*"))


def test_prune(tmp_path):
    for step in (1, 2, 10, 11):
        save(tmp_path, step, tiny_model())
    prune_checkpoints(tmp_path, 0)
    assert len(checkpoints(tmp_path)) == 4
    prune_checkpoints(tmp_path, 2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step_00000010", "step_00000011"]


class FullDisk:
    """A file object whose disk fills up after some bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if len(memoryview(data).cast("B")) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(memoryview(data).cast("B"))
        return self.file.write(data)


def test_every_file_is_synced_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b))[1])
    path = save(tmp_path, 1, tiny_model())
    before = events[: events.index("rename")]
    assert {p.name for p in path.iterdir()} <= set(before)
    assert events[events.index("rename") + 1 :] == [tmp_path.name]


@pytest.mark.parametrize("room", [0, 500, 20_000])
@pytest.mark.parametrize("where", [hub, checkpoint])
def test_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, where, room):
    trainer = Trainer(tiny_model(), tiny_data(), config(), output=tmp_path)
    trainer.run(until=2)
    trainer.save()
    kept = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.run(until=4)
    write = where.write_safetensors
    with monkeypatch.context() as patch:
        patch.setattr(where, "write_safetensors", lambda file, *rest: write(FullDisk(file, room), *rest))
        with pytest.raises(OSError, match="No space left"):
            trainer.save()
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["step_00000002"]
    other = tiny_model(seed=1)
    load_checkpoint(latest_checkpoint(tmp_path), other)
    assert same(other.state_dict(), kept)
    trainer.run()  # and goes on when there is room again
    assert latest_checkpoint(tmp_path).name == "step_00000006"


@pytest.mark.parametrize("stage", ["write_safetensors", "fsync", "rename", "rename_done"])
def test_killed_within_a_save(tmp_path, stage):
    """SIGKILL at chosen points of the second save, in a forked process: the newest complete checkpoint loads."""
    first = tiny_model()
    save(tmp_path, 1, first)
    second = tiny_model(seed=1)
    pid = os.fork()
    if pid == 0:
        _die_at(stage)
        save(tmp_path, 2, second)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    newest = latest_checkpoint(tmp_path)
    assert newest.name == ("step_00000002" if stage == "rename_done" else "step_00000001")
    other = tiny_model(seed=2)
    load_checkpoint(newest, other)
    assert same(other.state_dict(), (second if stage == "rename_done" else first).state_dict())
    save(tmp_path, 3, first)
    assert not list(tmp_path.glob(".saving-*"))


def _die_at(stage):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if stage == "write_safetensors":
        checkpoint.write_safetensors = die
    elif stage == "fsync":
        checkpoint.sync = die
    elif stage == "rename":
        os.rename = die
    else:
        rename = os.rename
        os.rename = lambda *a: (rename(*a), die())


def test_average(tmp_path):
    models = [tiny_model(seed=s) for s in range(3)]
    paths = [save(tmp_path, s, m) for s, m in enumerate(models)]
    merged = average_checkpoints(paths, tmp_path / "merged")
    states = [m.state_dict() for m in models]
    for name, value in Model.from_pretrained(merged).state_dict().items():
        expected = torch.stack([s[name].double() for s in states]).mean(0).to(value.dtype)
        assert torch.equal(value, expected)
    with pytest.raises(FileExistsError, match="output"):
        average_checkpoints(paths, merged)
    with pytest.raises(ValueError, match="at least one"):
        average_checkpoints([], tmp_path / "x")
    (tmp_path / "empty").mkdir()
    for wrong, why in ((tmp_path / "none", ", which is none"), (tmp_path / "empty", "")):
        with pytest.raises(ValueError, match=f"paths: expected directories with safetensors files, got {wrong}{why}$"):
            average_checkpoints([paths[0], wrong], tmp_path / "x")
    other = save(tmp_path / "other", 0, tiny_model(num_hidden_layers=3, moe_layers=(False, True, True)))
    with pytest.raises(ValueError, match="same tensors"):
        average_checkpoints([paths[0], other], tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith((".", "x"))) == []


def test_bf16_weights_and_masters_resume(tmp_path):
    cfg = config(steps=4)

    def model(seed=0):
        return tiny_model(seed).to(torch.bfloat16)

    whole = Trainer(model(), tiny_data(), cfg)
    whole.run()
    first = Trainer(model(), tiny_data(), cfg, output=tmp_path)
    first.run(until=2)
    first.save()
    second = Trainer(model(1), tiny_data(), cfg, output=tmp_path, resume=True)
    second.run()
    assert same(whole.model.state_dict(), second.model.state_dict())
    assert load_file(latest_checkpoint(tmp_path) / "optimizer.safetensors")["master/lm_head.weight"].dtype == torch.float32


def test_no_pickle_in_the_package():
    pattern = re.compile(r"\bimport pickle|\bpickle\.|torch\.load\(|torch\.save\(|np\.load\(|joblib|\bshelve\b|\bmarshal\b")
    sources = sorted(Path(llada_kernels.__file__).parent.rglob("*.py"))
    assert len(sources) > 20
    assert [str(p) for p in sources if pattern.search(p.read_text(encoding="utf-8"))] == []
