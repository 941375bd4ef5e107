"""Crash-safe checkpoints: safetensors and JSON only.

A checkpoint is a directory ``step_00000120`` that is also a model in the official layout: ``Model.from_pretrained`` opens it.
It is written under a temporary name, every file is synced, and the directory is renamed: under its final name it is complete
or absent. The newest is found by looking, not by a pointer file that could be torn. ``trainer.json`` lists the size of every
file, so that a checkpoint damaged later is passed over.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from .._checkpoint_files import sync, write_safetensors
from ..model import Model

__all__ = [
    "average_checkpoints", "checkpoints", "is_complete", "latest_checkpoint", "load_checkpoint", "prune_checkpoints",
    "save_checkpoint",
]  # fmt: skip

_FORMAT = 1
_STATE = "trainer.json"
_OPTIMIZER = "optimizer.safetensors"
_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY = ".saving-"


def save_checkpoint(
    root: str | os.PathLike[str],
    step: int,
    model: Model,
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    extra_files: Sequence[str | os.PathLike[str]] = (),
) -> Path:
    """Write the checkpoint of ``step`` under ``root`` and return its directory.

    Whatever happens while writing (kill, power failure, full disk), earlier checkpoints stay as they are. A complete
    checkpoint of the same step is kept: runs are deterministic, so it holds the same bits.

    Args:
        root: directory of a run's checkpoints; created if absent.
        step: number of steps done.
        model: the weights, written by its ``save_pretrained``.
        optimizer: the optimizer's tensors.
        state: JSON data: data position, plan, configuration.
        extra_files: copied beside the weights: tokenizer.json.

    Raises:
        OSError: the disk is full or the place cannot be written; what was written of this checkpoint is removed.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step_{step:08d}"
    if is_complete(final):
        return final
    for leftover in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = root / f"{_TEMPORARY}{final.name}-{os.getpid()}"
    try:
        temporary.mkdir()
        model.save_pretrained(temporary)
        _write(temporary / _OPTIMIZER, optimizer)
        for extra in extra_files:
            shutil.copyfile(extra, temporary / Path(extra).name)
        files = {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}
        document = {"format": _FORMAT, "step": step, "files": files, **state}
        (temporary / _STATE).write_text(json.dumps(document, indent=1) + "\n")
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        if final.exists():  # incomplete: damaged after it was written
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with open(path, "wb") as file:
        write_safetensors(file, tensors)


def is_complete(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` holds every file of a checkpoint in full size."""
    path = Path(path)
    try:
        state = json.loads((path / _STATE).read_text())
        return state["format"] == _FORMAT and all((path / n).stat().st_size == size for n, size in state["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def checkpoints(root: str | os.PathLike[str]) -> list[Path]:
    """Complete checkpoints under ``root``, oldest first."""
    root = Path(root)
    if not root.is_dir():
        return []
    found = [(int(m[1]), p) for p in root.iterdir() if (m := _NAME.fullmatch(p.name)) and is_complete(p)]
    return [p for _, p in sorted(found)]


def latest_checkpoint(root: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint under ``root``, or None."""
    found = checkpoints(root)
    return found[-1] if found else None


def load_checkpoint(path: str | os.PathLike[str], model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load a checkpoint's weights into ``model``; return the optimizer's tensors and the JSON state.

    Raises:
        ValueError: ``path`` is not a complete checkpoint, or is one of another architecture.
    """
    path = Path(path)
    if not is_complete(path):
        raise ValueError(f"path: expected a complete checkpoint, got {path}")
    stored = Model.from_pretrained(path, dtype=model.dtype)
    weights, expected = stored.state_dict(), model.state_dict()
    wrong = sorted(
        k for k in weights.keys() | expected.keys()
        if k not in weights or k not in expected or weights[k].shape != expected[k].shape
    )  # fmt: skip
    if wrong:
        raise ValueError(f"path: expected a checkpoint of this model, got one that differs in {', '.join(wrong)}")
    model.load_state_dict(weights)
    return load_file(path / _OPTIMIZER), json.loads((path / _STATE).read_text())


def prune_checkpoints(root: str | os.PathLike[str], keep: int) -> None:
    """Remove all but the ``keep`` newest complete checkpoints, oldest first; 0 keeps all.

    A directory loses ``trainer.json`` first: a removal cut short leaves no checkpoint that looks complete.
    """
    if keep < 1:
        return
    for path in checkpoints(root)[:-keep]:
        (path / _STATE).unlink()
        shutil.rmtree(path)


def average_checkpoints(paths: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> Path:
    """Average the weights of several checkpoints in fp32, cast once to the stored dtype, and save in the same layout.

    The report's top-k merge: late checkpoints of a run, averaged, are usually better than any one of them.

    Args:
        paths: directories with the same tensors in safetensors files of the same names.
        output: directory to create.

    Precision: sums in fp64 (rounded once). Determinism: bitwise.

    Raises:
        ValueError: no path, or checkpoints that differ in files or tensors.
        FileExistsError: ``output`` exists.
    """
    sources = [Path(p) for p in paths]
    if not sources:
        raise ValueError("paths: expected at least one checkpoint, got none")
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"output: expected a new directory, got {output}")
    names = [sorted(f.name for f in s.glob("*.safetensors") if f.name != _OPTIMIZER) for s in sources]
    for source, found in zip(sources, names, strict=True):
        if not found:
            raise ValueError(
                f"paths: expected directories with safetensors files, got {source}{'' if source.is_dir() else ', which is none'}"
            )
    if any(n != names[0] for n in names):
        raise ValueError(f"paths: expected the same weight files in each, got {names}")
    temporary = output.with_name(f"{_TEMPORARY}{output.name}-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        for name in names[0]:
            _write(temporary / name, _average_file([s / name for s in sources]))
        for extra in sources[0].iterdir():
            if extra.is_file() and extra.suffix != ".safetensors" and extra.name != _STATE:
                shutil.copyfile(extra, temporary / extra.name)
        for path in temporary.iterdir():
            sync(path)
        os.rename(temporary, output)
        sync(output.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return output


def _average_file(files: Sequence[Path]) -> dict[str, Tensor]:
    """Mean of each tensor over files with the same tensors."""
    opened = [safe_open(f, framework="pt") for f in files]
    keys = [sorted(f.keys()) for f in opened]
    if any(k != keys[0] for k in keys):
        raise ValueError(f"paths: expected the same tensors in each {files[0].name}")
    result = {}
    for key in keys[0]:
        tensors = [f.get_tensor(key) for f in opened]
        if any(t.shape != tensors[0].shape for t in tensors):
            raise ValueError(f"paths: expected {key} in one shape, got {[tuple(t.shape) for t in tensors]}")
        mean = torch.stack([t.double() for t in tensors]).mean(0) if tensors[0].is_floating_point() else tensors[0]
        result[key] = mean.to(tensors[0].dtype)
    return result
