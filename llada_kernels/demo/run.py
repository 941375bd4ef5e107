"""The whole path on a small scale: train an AR model, convert it to block diffusion, save, load, generate."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ..config import Config
from ..generation import StepRecorder, plain
from ..model import Model
from ..training import PackedDataset, Plan, TrainConfig, Trainer, ar_perplexity, elbo_perplexity, unigram_perplexity, wsd_plan
from ..training.data import Batch
from .corpus import END, MASK, read_corpus, show_tokens, train_tokenizer
from .display import Display, clock
from .plots import plot_order, plot_training

__all__ = ["FULL", "QUICK", "Scale", "run_demo"]

BLOCK = 32
SHOWN_BLOCKS = 2
PROMPTS = ("def __init__(self, ", "Return the ", "If the argument is not a string, ", "for key, value in ")


@dataclass(frozen=True)
class Scale:
    """Sizes of a demo run; fixed numbers, so that every machine does the same work."""

    characters: int
    vocab_size: int
    row_tokens: int
    rows: int
    ar_steps: int
    conversion_steps: int
    evaluation_rows: int
    new_tokens: int
    hidden_size: int = 128
    layers: int = 4
    learning_rate: float = 3e-3


FULL = Scale(5_000_000, 2048, 256, 16, 500, 450, 64, 512)
QUICK = Scale(2_500_000, 1024, 128, 16, 250, 250, 96, 128, layers=3)


@dataclass
class Results:
    """What the demo measured; written to ``results.json``."""

    unigram_perplexity: float = 0.0
    ar_perplexity: float = 0.0
    before: float = 0.0
    after: float = 0.0
    scratch: float | None = None
    quantized: dict[str, float] = field(default_factory=dict)
    tokens_per_forward: dict[str, float] = field(default_factory=dict)
    cached_seconds: float = 0.0
    uncached_seconds: float = 0.0
    same_tokens: bool = False
    seconds: float = 0.0


def model_config(scale: Scale) -> Config:
    """The AR parent: the LLaDA2 architecture with causal attention."""
    end, mask = scale.vocab_size - 2, scale.vocab_size - 1
    return Config(
        vocab_size=scale.vocab_size, hidden_size=scale.hidden_size, num_hidden_layers=scale.layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, rotary_dim=16, rope_theta=10000.0,
        intermediate_size=3 * scale.hidden_size, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2,
        moe_layers=(False, *[True] * (scale.layers - 1)), shared_expert_intermediate_size=64, n_group=4, topk_group=2,
        routed_scaling_factor=1.0, pad_token_id=None, mask_token_id=mask, eos_token_id=end, max_position_embeddings=4096,
        initializer_range=0.05, family="bailing_moe_v2", causal=True,
    )  # fmt: skip


class Demo:
    """State shared by the parts of a run."""

    def __init__(self, scale: Scale, display: Display, output: Path, seed: int) -> None:
        self.scale, self.display, self.output, self.seed = scale, display, output, seed
        self.results = Results()
        output.mkdir(parents=True, exist_ok=True)
        self.config = model_config(scale)
        self.mask_id, self.end_id = scale.vocab_size - 1, scale.vocab_size - 2

    def prepare(self) -> None:
        """Text, tokenizer, packed rows."""
        self.display.heading("Text")
        corpus = read_corpus(self.scale.characters)
        self.tokenizer: Tokenizer = train_tokenizer(corpus.train, self.scale.vocab_size)
        if (self.tokenizer.token_to_id(END), self.tokenizer.token_to_id(MASK)) != (self.end_id, self.mask_id):
            raise ValueError(f"tokenizer: expected {self.scale.vocab_size} tokens, got {self.tokenizer.get_vocab_size()}")
        train, held_out = self._encode(corpus.train), self._encode(corpus.held_out)
        self.data = PackedDataset(train, self.scale.row_tokens, seed=self.seed)
        held = PackedDataset(held_out, self.scale.row_tokens, seed=self.seed)
        rows = min(self.scale.evaluation_rows, held.num_rows)
        self.held_out: list[Batch] = [held.batch(i, min(8, rows - i)) for i in range(0, rows, 8)]
        self.probe = self.held_out[: max(1, len(self.held_out) // 4)]
        seen = torch.cat([b.tokens for b in self.held_out])
        counted = torch.tensor([t for document in train for t in document])
        self.results.unigram_perplexity = unigram_perplexity(counted, seen, self.scale.vocab_size)
        self.display.line(
            f"Python's standard library: {corpus.characters / 1e6:.1f} M characters of documentation and code, "
            f"{len(counted) / 1e6:.2f} M tokens of a BPE vocabulary of {self.scale.vocab_size}; "
            f"held out: {len(seen)} tokens of modules never trained on"
        )

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*e.ids, self.end_id] for e in self.tokenizer.encode_batch(list(texts))]

    def pretrain(self) -> None:
        """The AR parent, and how it reads as a diffusion model."""
        self.display.heading("Autoregressive training")
        torch.manual_seed(self.seed)
        self.model = Model(self.config)
        parameters = sum(p.numel() for p in self.model.parameters())
        self.display.line(
            f"LLaDA2 architecture: {parameters / 1e6:.2f} M parameters, {self.scale.layers} layers, "
            f"{self.config.num_experts} experts of which {self.config.num_experts_per_tok} per token"
        )
        self.ar_metrics = self._train(self.model, "next token", self._train_config("ar", self.scale.ar_steps))[0]
        self.results.ar_perplexity = ar_perplexity(self.model, self.held_out)
        self.results.before = self._elbo(self.model, self.held_out)
        self.display.line(
            f"held-out perplexity: {self.results.ar_perplexity:.1f} reading left to right; read as a diffusion model "
            f"(block {BLOCK}) {self.results.before:.0f}; unigram {self.results.unigram_perplexity:.0f}"
        )

    def convert(self) -> None:
        """Warm-up, stable, decay."""
        self.display.heading("Conversion to block diffusion")
        config = self._train_config("diffusion", self.scale.conversion_steps)
        self.display.line(wsd_plan(self.scale.row_tokens, BLOCK).describe(self.scale.conversion_steps))
        self.model = self.model.as_diffusion(self.mask_id)
        self.conversion_metrics, self.curve = self._train(self.model, "conversion", config)
        self.results.after = self._elbo(self.model, self.held_out)
        self.display.line(f"held-out perplexity at block {BLOCK}: {self.results.before:.0f} before, {self.results.after:.1f} after")

    def ablate(self) -> None:
        """The same conversion steps from random weights."""
        self.display.heading("Ablation: the same steps from random weights")
        torch.manual_seed(self.seed)
        model = Model(self.config.as_diffusion(self.mask_id))
        self.scratch_curve = self._train(model, "from random", self._train_config("diffusion", self.scale.conversion_steps))[1]
        self.results.scratch = self._elbo(model, self.held_out)
        self.display.line(f"held-out perplexity at block {BLOCK}: {self.results.scratch:.1f}")

    scratch_curve: Sequence[tuple[int, float]] = ()

    def _elbo(self, model: Model, batches: Sequence[Batch]) -> float:
        return elbo_perplexity(model, batches, BLOCK, self.mask_id, draws=2, seed=self.seed)

    def _train_config(self, objective: Any, steps: int) -> TrainConfig:
        plan = wsd_plan(self.scale.row_tokens, BLOCK) if objective == "diffusion" else Plan([(1.0, BLOCK)])
        return TrainConfig(
            steps=steps, objective=objective, plan=plan.as_tuples(), rows=self.scale.rows, seed=self.seed,
            learning_rate=self.scale.learning_rate, final_learning_rate=self.scale.learning_rate / 20,
            warmup_steps=steps // 20, betas=(0.9, 0.98), weight_decay=0.1,
        )  # fmt: skip

    def _train(self, model: Model, label: str, config: TrainConfig) -> tuple[list[dict[str, Any]], list[tuple[int, float]]]:
        """Run a training with a bar; returns the metrics of every step and, for diffusion, a curve of held-out ELBOs."""
        metrics: list[dict[str, Any]] = []
        curve: list[tuple[int, float]] = []
        every = max(1, config.steps // 12)
        loss = 0.0

        def on_step(m: dict[str, Any]) -> None:
            nonlocal loss
            metrics.append(m)
            if m["loss"] is not None:
                loss = m["loss"] if len(metrics) == 1 else 0.95 * loss + 0.05 * m["loss"]
            size = f"  block {m['block_size']}" if m["block_size"] is not None else ""
            update(len(metrics), f"loss {loss:5.2f}{size}")
            if config.objective == "diffusion" and len(metrics) % every == 0:
                curve.append((len(metrics), self._elbo(model, self.probe)))

        if config.objective == "diffusion":
            curve.append((0, self._elbo(model, self.probe)))
        with self.display.progress(label, config.steps) as update:
            Trainer(model, self.data, config, on_step=on_step).run()
        return metrics, curve

    def save_and_load(self) -> None:
        """Through the official layout and back; then with quantised experts, as the same checkpoint is read for a small machine."""
        self.display.heading("Save and load")
        folder = self.output / "model"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run, perhaps of another size
        self.model.save_pretrained(folder)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        expected = self.model.state_dict()
        self.model = Model.from_pretrained(folder)
        same = all(torch.equal(v, expected[k]) for k, v in self.model.state_dict().items())
        self.display.line(f"official layout in {folder}; loaded back {'bit for bit' if same else 'WITH DIFFERENCES'}")
        for kind in ("int8", "int4"):  # fp8 takes widths that are multiples of 128
            small = Model.from_pretrained(folder, expert_dtype=kind)
            self.results.quantized[kind] = self._elbo(small, self.held_out)
            self.display.line(f"held-out perplexity with {kind} experts: {self._quantized(kind)}")

    def _quantized(self, kind: str) -> str:
        value = self.results.quantized[kind]
        return f"{value:.2f}   ({100 * (value / self.results.after - 1):+.2f} %)"

    def generate(self) -> None:
        """Show tokens being unmasked, count them per forward, and compare with the loop without cache."""
        self.display.heading("Generation, block by block")
        prompts = [self.tokenizer.encode(text).ids for text in PROMPTS]
        for number, (text, prompt) in enumerate(zip(PROMPTS, prompts, strict=True)):
            recorder = self._show(text, prompt)
            if number == 0:
                self._order(recorder, prompt)
        settings: tuple[tuple[str, dict[str, Any]], ...] = (
            ("threshold 0.9", {}), ("threshold 0.3", {"threshold": 0.3}), ("8 steps per block", {"steps": 8}),
        )  # fmt: skip
        for name, changes in settings:
            outs = [self.model.generate([p], **{**self._options(p, SHOWN_BLOCKS, 0.9), **changes}) for p in prompts]
            total, forwards = sum(len(o[0]) for o in outs), sum(o.num_forwards for o in outs if isinstance(o.num_forwards, int))
            self.results.tokens_per_forward[name] = total / forwards
        self._compare(prompts[1])

    def _options(self, prompt: list[int], blocks: int, threshold: float) -> dict[str, Any]:
        """Arguments of a generation that ends with its last block, so that no token is generated to be thrown away."""
        return {"gen_length": blocks * BLOCK - len(prompt) % BLOCK, "block_length": BLOCK, "threshold": threshold, "eos_id": -1}

    def _show(self, text: str, prompt: list[int]) -> StepRecorder:
        """Generate from one prompt, showing the text after every forward."""
        options = self._options(prompt, SHOWN_BLOCKS, 0.7)
        tokens = [*prompt, *[self.mask_id] * options["gen_length"]]
        forward = 0
        with self.display.unmasking(text.strip()) as show:

            def on_step(row: int, block_start: int, block: torch.Tensor) -> None:
                nonlocal forward
                forward += 1
                end = min(block_start + len(block), len(tokens))
                tokens[block_start:end] = block.tolist()[: end - block_start]
                shown = show_tokens(self.tokenizer, tokens[len(prompt) : end], self.mask_id)
                show(text, shown, forward)

            recorder = StepRecorder(self.mask_id, on_step)
            self.model.generate([prompt], **options, temperature=1.0, top_k=50, seed=self.seed, on_step=recorder)
        self.generated = tokens
        return recorder

    def _order(self, recorder: StepRecorder, prompt: list[int]) -> None:
        """The figure of the order in which tokens were unmasked, counted from 1 in each block."""
        order = recorder.order(0, len(prompt), len(self.generated))
        first: dict[int, int] = {}
        for place, forward in enumerate(order):
            block = (len(prompt) + place) // BLOCK
            first[block] = min(first.get(block, forward), forward)
        counted = [f - first[(len(prompt) + i) // BLOCK] + 1 for i, f in enumerate(order)]
        pieces = [self.tokenizer.decode([t]) for t in self.generated[len(prompt) :]]
        plot_order(self.output / "unmasking_order.png", counted, BLOCK, pieces, len(prompt))

    def _compare(self, prompt: list[int]) -> None:
        """Seconds with and without the cache for the same tokens."""
        options = self._options(prompt, self.scale.new_tokens // BLOCK, 0.9)
        self.model.generate([prompt], **self._options(prompt, 1, 0.9))  # warm
        begin = time.perf_counter()
        out = self.model.generate([prompt], **options)
        self.results.cached_seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        tokens, _ = plain.llada20(self.model, torch.tensor(prompt), mask_id=self.mask_id, **options)
        self.results.uncached_seconds = time.perf_counter() - begin
        self.results.same_tokens = tokens.tolist() == out[0].tolist()

    def finish(self, begin: float) -> None:
        """Figures, results.json and the table."""
        r = self.results
        plot_training(
            self.output / "training.png", self.ar_metrics, self.conversion_metrics, self.curve, r.unigram_perplexity,
            self.scratch_curve,
        )  # fmt: skip
        r.seconds = time.perf_counter() - begin
        (self.output / "results.json").write_text(json.dumps(asdict(r), indent=1) + "\n")
        rows = [
            ("unigram perplexity (held-out text)", f"{r.unigram_perplexity:.1f}"),
            ("AR model, left to right", f"{r.ar_perplexity:.1f}"),
            (f"AR model read as diffusion, block {BLOCK}", f"{r.before:.1f}"),
            (f"after conversion, block {BLOCK}", f"{r.after:.2f}   ({r.before / r.after:.1f}x lower)"),
        ]
        rows += [(f"after conversion, {kind} experts", self._quantized(kind)) for kind in r.quantized]
        if r.scratch is not None:
            rows.append(("the same steps from random weights", f"{r.scratch:.1f}   ({r.scratch / r.after:.2f}x higher)"))
        rows += [(f"tokens per forward, {name}", f"{v:.2f}") for name, v in r.tokens_per_forward.items()]
        rows += [
            (f"{self.scale.new_tokens} tokens with KV cache", f"{r.cached_seconds:.2f} s"),
            ("without", f"{r.uncached_seconds:.2f} s   ({r.uncached_seconds / r.cached_seconds:.1f}x)"),
            ("same tokens", "yes" if r.same_tokens else "NO"),
            ("time", clock(r.seconds)),
        ]
        self.display.table("Results", rows)
        self.display.line(f"figures, results.json and the model are in {self.output}")


def run_demo(
    *,
    quick: bool = False,
    ablation: bool = False,
    output: str | os.PathLike[str] = "demo-output",
    threads: int | None = None,
    seed: int = 0,
    display: Display | None = None,
    scale: Scale | None = None,
) -> Results:
    """Run the demo and return what it measured.

    Args:
        quick: a smaller model and fewer steps: about one minute on two cores.
        ablation: also train from random weights with the same steps.
        output: directory for the model, the figures and results.json; files of an earlier run are replaced.
        threads: threads of torch; None: as torch chose.
        seed: of weights, order of data and noise.
        display: where to show it; default the terminal.
        scale: other sizes than those of ``quick``.

    Raises:
        ValueError: Python without sources, or no matplotlib.
        OSError: ``output`` cannot be written.
    """
    begin = time.perf_counter()
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)
    demo = Demo(scale or (QUICK if quick else FULL), display or Display(), Path(output), seed)
    demo.prepare()
    demo.pretrain()
    demo.convert()
    if ablation:
        demo.ablate()
    demo.save_and_load()
    demo.generate()
    demo.finish(begin)
    return demo.results
