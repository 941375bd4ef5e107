"""``llada-kernels demo | info | generate | train``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

__all__ = ["main"]

# torch is imported when a command runs: --help answers at once.


@dataclass
class Demo:
    """Train a small AR model on text that ships with Python, convert it to block diffusion, and generate."""

    quick: bool = False
    """A smaller model and fewer steps: about a minute on two cores."""
    ablation: bool = False
    """Also train from random weights with the same number of steps."""
    output: Path = Path("demo-output")
    """Where the model, the figures and results.json go."""
    threads: int | None = None
    """Threads of torch; default: as torch chooses."""
    seed: int = 0
    """Of weights, order of data and noise."""

    def run(self) -> int:
        from .demo import run_demo

        run_demo(quick=self.quick, ablation=self.ablation, output=self.output, threads=self.threads, seed=self.seed)
        return 0


@dataclass
class Info:
    """Versions, CPU level, and which backends serve or why not."""

    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        from . import info

        info.main(["--json"] if self.json else [])
        return 0


@dataclass
class Generate:
    """Generate from a prompt with a checkpoint directory (or hub id) that has a tokenizer.json."""

    model: Annotated[str, tyro.conf.Positional]
    """Directory of an official checkpoint, or a hub id."""
    prompt: Annotated[str, tyro.conf.Positional]
    """Text to continue; "-" reads it from standard input."""
    gen_length: int = 256
    """New tokens at most."""
    block_length: int = 32
    """Tokens per diffusion block."""
    threshold: float | None = None
    """Confidence above which a token is unmasked; default: the decoding rule's."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int | None = None
    """Of the draw at a temperature."""
    decoding: str | None = None
    """Decoding rule; default: that of the model's family."""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Precision of the weights in memory."""

    def run(self) -> int:
        import torch

        from .model import Model

        dtype = None if self.dtype == "stored" else getattr(torch, self.dtype)
        model = Model.from_pretrained(self.model, dtype=dtype)
        tokenizer = _tokenizer(self.model)
        text = sys.stdin.read() if self.prompt == "-" else self.prompt
        prompt = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
        options: dict[str, Any] = {"threshold": self.threshold, "decoding": self.decoding, "seed": self.seed}
        out = model.generate(
            prompt, gen_length=self.gen_length, block_length=self.block_length, temperature=self.temperature,
            **{k: v for k, v in options.items() if v is not None},
        )  # fmt: skip
        print(tokenizer.decode(out[0].tolist(), skip_special_tokens=True))
        print(f"{len(out[0])} tokens in {out.num_forwards} forwards", file=sys.stderr)
        return 0


@dataclass
class Train:
    """Train on text files: convert an AR checkpoint to block diffusion (warm-up, stable, decay), or continue either kind."""

    model: Annotated[str, tyro.conf.Positional]
    """Directory of an official checkpoint with a tokenizer.json."""
    texts: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Text files; each is a document."""
    output: Path = field(default=Path("training-output"))
    """Where checkpoints and metrics.jsonl go."""
    steps: int = 1000
    """Optimizer steps."""
    objective: Literal["diffusion", "ar"] = "diffusion"
    """What to train."""
    plan: Literal["wsd", "fixed"] = "wsd"
    """Block sizes: the warm-up, stable, decay plan, or the final one throughout."""
    block_size: int = 32
    """The final block size."""
    row_tokens: int = 2048
    """Token budget of a packed row; longer documents are cut."""
    rows: int = 8
    """Rows per step."""
    accumulation: int = 1
    """Micro-batches per step."""
    learning_rate: float = 3e-5
    """Peak; falls to a tenth as a cosine."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    resume: bool = False
    """Continue from the newest checkpoint in the output directory."""
    seed: int = 0
    """Of the order of data and of noise."""

    def run(self) -> int:
        from rich.console import Console

        from .demo.display import Display
        from .model import Model
        from .training import PackedDataset, Plan, TrainConfig, Trainer, wsd_plan

        model, tokenizer = Model.from_pretrained(self.model), _tokenizer(self.model)
        if self.objective == "diffusion" and model.config.causal:
            model = model.as_diffusion()
        end = [] if model.config.eos_token_id is None else [model.config.eos_token_id]
        documents = [[*tokenizer.encode(p.read_text(encoding="utf-8")).ids, *end] for p in self.texts]
        data = PackedDataset(documents, self.row_tokens, seed=self.seed)
        plan = Plan([(1.0, self.block_size)])
        if self.plan == "wsd":
            plan = wsd_plan(data.longest_document, self.block_size)
        display = Display(Console(highlight=False))
        if self.objective == "diffusion":
            display.line(plan.describe(self.steps))
        config = TrainConfig(
            steps=self.steps, objective=self.objective, plan=plan.as_tuples(),
            rows=self.rows, accumulation=self.accumulation, seed=self.seed, learning_rate=self.learning_rate,
            final_learning_rate=self.learning_rate / 10, checkpoint_every=self.checkpoint_every,
        )  # fmt: skip
        with display.progress("training", self.steps) as update:

            def on_step(m: dict[str, Any]) -> None:
                loss = "skipped" if m["loss"] is None else f"loss {m['loss']:.3f}"
                update(m["step"] + 1, loss)

            extra = [file] if (file := Path(self.model) / "tokenizer.json").exists() else []
            Trainer(model, data, config, output=self.output, on_step=on_step, resume=self.resume, extra_files=extra).run()
        display.line(f"checkpoints, each an official model directory, are in {self.output}")
        return 0


def _tokenizer(path: str) -> Any:
    """tokenizer.json of a checkpoint directory or hub id."""
    from tokenizers import Tokenizer

    local = Path(path)
    if local.is_dir():
        file = local / "tokenizer.json"
        if not file.exists():
            raise ValueError(f"model: expected a tokenizer.json in {path}, found none")
        return Tokenizer.from_file(str(file))
    return Tokenizer.from_pretrained(path)


_COMMANDS: dict[str, Callable[..., Any]] = {"demo": Demo, "info": Info, "generate": Generate, "train": Train}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 after an error of the user's, 130 after Ctrl-C."""
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            _COMMANDS, prog="llada-kernels", description="Block-diffusion MoE language models.", args=arguments
        )
        return int(command.run())
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
