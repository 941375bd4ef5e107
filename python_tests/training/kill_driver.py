"""Trains in child processes and kills them at random moments; run by test_kill.py in a process of its own.

Forking from here, before any tensor work, spares each of the killed processes the import of torch.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from llada_kernels.training import TrainConfig, Trainer
from python_tests.training.conftest import tiny_data, tiny_model

STEPS = 40


def train(root: Path) -> None:
    config = TrainConfig(
        steps=STEPS, plan=((0.3, 1), (0.4, "full"), (0.3, 4)), rows=2, learning_rate=5e-3, warmup_steps=4,
        checkpoint_every=1, keep_checkpoints=2, mask_noise_fraction=0.2,
    )  # fmt: skip
    Trainer(tiny_model(), tiny_data(), config, output=root, resume=True).run()


def start(root: Path) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            train(root)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def finish(root: Path) -> float:
    begin = time.perf_counter()
    status = os.waitpid(start(root), 0)[1]
    assert status == 0, f"training failed with status {status}"
    return time.perf_counter() - begin


def main(base: Path, kills: int) -> None:
    Trainer(tiny_model(), tiny_data(), TrainConfig(steps=1))  # what the optimizer imports late is imported here, once
    seconds = finish(base / "whole")
    chance = random.Random(0)
    trials: list[str] = []
    within_save = done = 0
    root = base / "trial0"
    while done < kills:
        pid = start(root)
        time.sleep(chance.uniform(0.0, min(0.5, seconds / 3)))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            done += 1
            within_save += bool(list(root.glob(".saving-*")))
        else:  # finished before the signal
            assert os.WEXITSTATUS(status) == 0, f"resumed training failed with status {status}"
            trials.append(root.name)
            root = base / f"trial{len(trials)}"
    finish(root)
    trials.append(root.name)
    print(json.dumps({"kills": done, "within_save": within_save, "trials": trials, "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
