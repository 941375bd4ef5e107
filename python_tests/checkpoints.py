"""Checkpoints for the tests of loading and saving: golden ones, copied or changed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llada_kernels import Model
from llada_kernels._checkpoint_files import CheckpointError

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


def ling(tmp_path, extra=None, config=None):
    values = {"architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe", "num_nextn_predict_layers": 1}
    return checkpoint(tmp_path / "ling", load_file(LLADA2) | (extra or {}), config=values | (config or {}))
