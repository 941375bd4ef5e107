"""The demo on a scale of seconds: every part runs, the figures and results are there, and conversion does what it claims."""

from __future__ import annotations

import io
import json
from dataclasses import asdict

import pytest
import torch
from rich.console import Console

from llada_kernels.config import Config
from llada_kernels.demo import FULL, QUICK, Scale, run_demo
from llada_kernels.demo.corpus import END, MASK, read_corpus, show_tokens, train_tokenizer
from llada_kernels.demo.display import Display
from llada_kernels.demo.plots import plot_order, smooth
from llada_kernels.demo.run import model_config
from llada_kernels.model import Model

TINY = Scale(
    characters=400_000, vocab_size=512, row_tokens=64, rows=8, ar_steps=60, conversion_steps=30, evaluation_rows=8,
    new_tokens=64, hidden_size=64, layers=2, learning_rate=5e-3,
)  # fmt: skip


def plain():
    text = io.StringIO()
    return text, Display(Console(file=text, highlight=False, width=100))


@pytest.fixture(scope="module")
def corpus():
    return read_corpus(400_000)


def test_demo_end_to_end(tmp_path):
    text, display = plain()
    results = run_demo(ablation=True, output=tmp_path, display=display, scale=TINY, threads=torch.get_num_threads())
    # Too few steps to convert well; long enough to see that the AR start helps and that all learn something.
    assert results.after < results.scratch < 512 and results.before < 512
    assert results.ar_perplexity < results.unigram_perplexity
    # What quantised experts cost: paired, the same masks on the same held-out text.
    assert results.quantized["int8"] / results.after <= 1.005 and results.quantized["int4"] / results.after <= 1.03
    assert len({results.after, *results.quantized.values()}) == 3, "the three models differ"
    assert results.same_tokens and results.cached_seconds > 0 and results.uncached_seconds > 0
    assert all(v >= 1.0 for v in results.tokens_per_forward.values())
    for name in ("training.png", "unmasking_order.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "results.json").read_text()) == asdict(results)
    config = Config.from_pretrained(tmp_path / "model")
    assert config.family == "llada2" and not config.causal
    assert Model.from_pretrained(tmp_path / "model").config.mask_token_id == 511
    shown = text.getvalue()
    for part in ("unigram", "block-size plan", "bit for bit", "[forward   1]", "tokens per forward", "with int4 experts", "left"):
        assert part in shown
    assert "\x1b" not in shown  # plain without a terminal


def test_live_display_shows_bars_and_panels():
    text = io.StringIO()
    display = Display(Console(file=text, force_terminal=True, width=100))
    display.heading("Part")
    with display.progress("training", 3) as update:
        for step in range(1, 4):
            update(step, f"loss {step}")
    with display.unmasking("title") as show:
        show("prompt ", "ab\u2591", 1)
    display.table("Results", [("a", "1")])
    shown = text.getvalue()
    assert "\x1b" in shown and "3/3" in shown and "loss 3" in shown and "forward 1" in shown and "Results" in shown


def test_corpus_is_split_by_module_and_is_the_same_each_time(corpus):
    again = read_corpus(400_000)
    assert again == corpus and corpus.characters >= 400_000
    assert not set(corpus.train) & set(corpus.held_out)
    assert any("def " in t for t in corpus.train) and any("Return" in t and "def " not in t for t in corpus.train)


def test_tokenizer_writes_any_text(corpus):
    tokenizer = train_tokenizer(corpus.train[:300], 512)
    assert tokenizer.get_vocab_size() == 512 and tokenizer.token_to_id(END) == 510 and tokenizer.token_to_id(MASK) == 511
    for text in (*corpus.held_out[:20], "π ≠ 3\t\r\n\x00 日本"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    ids = tokenizer.encode("return self").ids
    assert show_tokens(tokenizer, [*ids, 511, 511], 511, "_") == "return self__"
    assert show_tokens(tokenizer, [511, *ids, 511, *ids], 511, "_") == "_return self_return self"


def test_scales_are_the_llada2_architecture():
    for scale in (FULL, QUICK):
        config = model_config(scale)
        assert config.causal and config.as_diffusion().family == "llada2"
        assert config.moe_layers[0] is False and all(config.moe_layers[1:]) and config.expert_bias


def test_plots(tmp_path):
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0] * 3)
    plot_order(tmp_path / "order.png", [1, 2, 1, 3, 1], 4, ["a", "$b", "\n", "d", "e"], 3)
    assert (tmp_path / "order.png").read_bytes().startswith(b"\x89PNG")


def test_no_source_text(monkeypatch):
    monkeypatch.setattr("llada_kernels.demo.corpus._sources", lambda: iter([("a", lambda: ["x" * 300])]))
    with pytest.raises(ValueError, match="standard library: expected at least 200 kB"):
        read_corpus(1000)


def test_threads():
    with pytest.raises(ValueError, match="threads: expected at least 1, got 0"):
        run_demo(threads=0)
