"""The Python on docs/training.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from llada_kernels.demo.corpus import read_corpus, train_tokenizer
from llada_kernels.model import Model

from .training.conftest import tiny_config

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
SMALL = {"steps": 7, "row_tokens": 64, "checkpoint_every": 2, "warmup_steps": 2}


@pytest.fixture
def parent(tmp_path, monkeypatch):
    """A tiny autoregressive checkpoint with a tokenizer, and texts, where the page says that they are."""
    torch.manual_seed(0)
    corpus = read_corpus(300_000).train[:200]
    tokenizer = train_tokenizer(corpus, 400)
    Model(tiny_config(vocab_size=400, mask_token_id=399, eos_token_id=398, family="bailing_moe_v2", causal=True)).save_pretrained(
        tmp_path / "parent"
    )
    tokenizer.save(str(tmp_path / "parent" / "tokenizer.json"))
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / "texts" / f"{number}.txt").write_text(corpus[number][:400], encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def test_training_page(parent, capsys):
    assert len(BLOCKS) == 5 and "docs/training.md" in (ROOT / "README.md").read_text()
    names: dict[str, object] = {}
    for block in BLOCKS:
        for name, number in SMALL.items():
            block = re.sub(rf"\b{name}=\d+", f"{name}={number}", block)
        exec(compile(block, "docs/training.md", "exec"), names)
    assert "block-size plan over 7 steps" in capsys.readouterr().out
    converted = Model.from_pretrained("converted/step_00000007")
    assert not converted.config.causal and converted.dtype == torch.bfloat16 and Path("converted/step_00000007/tokenizer.json").exists()
    assert Path("tuned/step_00000007").is_dir() and len(list(Path("late").glob("step_*"))) == 4
    assert isinstance(names["model"], Model) and not names["model"].config.causal
