"""Killed at 20 random moments, a run ends with the same bits as one that was left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from llada_kernels.training import latest_checkpoint


def test_killed_at_random_moments(tmp_path):
    repository = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "python_tests.training.kill_driver", str(tmp_path), "20"],
        cwd=repository, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] == 20
    whole = latest_checkpoint(tmp_path / "whole")
    assert whole.name == "step_00000040"
    losses = metrics(tmp_path / "whole")
    assert len(losses) == 40
    for trial in report["trials"]:
        path = latest_checkpoint(tmp_path / trial)
        for name in ("model.safetensors", "optimizer.safetensors", "trainer.json", "config.json"):
            assert (path / name).read_bytes() == (whole / name).read_bytes(), (trial, name)
        assert metrics(tmp_path / trial) == losses
        assert not list((tmp_path / trial).glob(".saving-*"))


def metrics(root):
    """(step, loss) of every line of a run."""
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    return [(m["step"], m["loss"]) for m in lines]
