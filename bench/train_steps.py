"""One optimizer step on the same noised documents, ours and the official way, and its peak memory measured in a fresh process.

python -m bench.train_steps ours|official float32|bfloat16 DOCUMENTS LENGTH SMALL(0|1) THREADS
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from llada_kernels.training.data import Batch
from llada_kernels.training.objectives import Objective, Prepared, loss_terms, prepare
from llada_kernels.training.optimizer import AdamW

from .environment import ROOT
from .official import OfficialModel, block_diffusion_mask
from .shapes import bench_model

__all__ = ["BLOCK", "Step", "batch", "official_step", "our_step", "peak_memory"]

BLOCK = 32
LEARNING_RATE = 1e-5
Step = Callable[[], tuple[float, float]]
OBJECTIVE = Objective("diffusion", BLOCK, "masked", (0.3, 0.8))


def batch(documents: int, length: int, vocab: int) -> Batch:
    """Documents of random tokens, packed; all of them supervised."""
    total = documents * length
    tokens = torch.randint(0, vocab - 2, (total,), generator=torch.Generator().manual_seed(4))
    cu_seqlens = torch.arange(0, total + 1, length, dtype=torch.int32)
    return Batch(tokens, cu_seqlens, torch.ones(total, dtype=torch.bool), torch.zeros_like(tokens), torch.arange(total))


def prepared(data: Batch, mask_token_id: int) -> Prepared:
    """The noised layout, the same for both ways."""
    return prepare(data, OBJECTIVE, mask_token_id, seed=0, step=0)


def our_step(dtype: torch.dtype, documents: int, length: int, small: bool = False) -> Step:
    """As :class:`llada_kernels.training.Trainer` steps, noise and mask included. Returns loss and gradient norm."""
    model = bench_model(dtype, small).train()
    optimizer = AdamW(model)
    data = batch(documents, length, model.config.vocab_size)
    assert model.config.mask_token_id is not None
    mask_token_id = model.config.mask_token_id

    def step() -> tuple[float, float]:
        part = prepared(data, mask_token_id)
        loss = loss_terms(model, part).loss / part.count
        loss.backward()
        norm = optimizer.clip(1.0)
        optimizer.step(LEARNING_RATE)
        return float(loss.detach()), float(norm)

    return step


def official_step(dtype: torch.dtype, documents: int, length: int, small: bool = False) -> Step:
    """A document per row, logits of all 2 length positions, cross entropy of the masked ones; noise drawn beforehand."""
    source = bench_model(dtype, small)
    model = OfficialModel(source).train()
    assert source.config.mask_token_id is not None
    part = prepared(batch(documents, length, source.config.vocab_size), source.config.mask_token_id)
    del source
    # fp32 masters for bf16 weights, as the official trainer holds them.
    weights = list(model.parameters())
    masters = weights if dtype == torch.float32 else [p.detach().float() for p in weights]
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    noisy, clean = (x.view(documents, length) for x in part.input_ids.split(documents * length))
    ids = torch.cat([noisy, clean], 1)
    labels = torch.where(part.noised, part.targets, -100).view(documents, length)
    mask = block_diffusion_mask(length, BLOCK)
    positions = torch.arange(length).repeat(2)

    def step() -> tuple[float, float]:
        logits = model(ids, mask, positions)[:, :length].float()
        losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.flatten(), reduction="none", ignore_index=-100)
        loss = losses.sum() / (labels != -100).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        if masters is not weights:
            for master, weight in zip(masters, weights, strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
        optimizer.step()
        if masters is not weights:
            with torch.no_grad():
                for master, weight in zip(masters, weights, strict=True):
                    weight.copy_(master)
        for x in (*weights, *masters):
            x.grad = None
        return float(loss.detach()), float(norm)

    return step


STEPS: dict[str, Callable[[torch.dtype, int, int, bool], Step]] = {"ours": our_step, "official": official_step}


def peak_memory(way: str, dtype: torch.dtype, documents: int, length: int, small: bool, threads: int) -> dict[str, Any]:
    """Peak memory of a step above weights, gradients and optimizer state, in a process of its own (Linux)."""
    arguments = (way, str(dtype).removeprefix("torch."), documents, length, int(small), threads)
    command = [sys.executable, "-m", "bench.train_steps", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        return {"peak_memory_error": result.stderr.strip().splitlines()[-1:]}
    return dict(json.loads(result.stdout))


def resident(key: str) -> int:
    """Bytes that the kernel states of this process: "VmRSS", or "VmHWM" for the peak (Linux)."""
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def forget_peak() -> None:
    """Let the peak of this process start anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def _measure(way: str, dtype: torch.dtype, documents: int, length: int, small: bool) -> dict[str, int]:
    step = STEPS[way](dtype, documents, length, small)
    step()  # from here on the optimizer's state exists
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    forget_peak()
    step()
    peak = resident("VmHWM")
    # Both ways drop their gradients after a step, so they are not in ``before``; they exist at the peak and are not counted.
    gradients = sum(p.numel() * p.element_size() for p in bench_model(dtype, small).parameters())
    return {"peak_bytes": peak - before - gradients}


def _main(arguments: list[str]) -> int:
    way, dtype, documents, length, small, threads = arguments
    torch.set_num_threads(int(threads))
    print(json.dumps(_measure(way, getattr(torch, dtype), int(documents), int(length), bool(int(small)))))
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
