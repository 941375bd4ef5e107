"""``llada-kernels demo | info | generate | train``."""

from __future__ import annotations

import sys
import warnings
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

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Directory of an official checkpoint, or a hub id."""
    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """Text to continue; "-" reads it from standard input."""
    gen_length: int = 256
    """New tokens at most."""
    block_length: int | None = None
    """Tokens per diffusion block; default: 32, LLaDA-MoE 128."""
    decoding: Literal["llada2.0", "llada2.1", "quality", "speed", "low_confidence"] | None = None
    """Decoding rule; default: that of the model's family, LLaDA2.1 with --editing-threshold."""
    threshold: float | None = None
    """Confidence above which a token is unmasked; default: the decoding rule's."""
    editing_threshold: float | None = None
    """LLaDA2.1: confidence above which a token is replaced; 0: every changed token."""
    steps: int | None = None
    """Denoising steps: per block (LLaDA2.0), in all (LLaDA-MoE)."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int | None = None
    """At a temperature: draw among the k most probable tokens."""
    top_p: float | None = None
    """At a temperature: draw among the most probable tokens that sum to p."""
    seed: int | None = None
    """Of the draw at a temperature."""
    eos_early_stop: bool = False
    """LLaDA2.0: leave a block when the text through its first EOS is complete."""
    minimal_topk: int | None = None
    """LLaDA2.0: limits steps to gen_length // minimal_topk."""
    max_post_steps: int | None = None
    """LLaDA2.1: forwards on a block after its last mask is gone."""
    num_to_transfer: int | None = None
    """LLaDA2.1: tokens unmasked per step at least."""
    cfg_scale: float | None = None
    """LLaDA-MoE: strength of guidance."""
    remasking: Literal["low_confidence", "random"] | None = None
    """LLaDA-MoE: which tokens are unmasked first."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, cuda:1."""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Precision of the weights in memory."""
    expert_dtype: Literal["int8", "int4", "fp8"] | None = None
    """Quantise the experts' weights while they are read; fp8 for GPUs."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    def run(self) -> int:
        import torch

        from .model import Model

        device = _device(self.device)
        model = Model.from_pretrained(self.model, _dtype(self.dtype), device, revision=self.revision, expert_dtype=self.expert_dtype)
        tokenizer = _tokenizer(self.model, self.revision)
        text = sys.stdin.read() if self.prompt == "-" else self.prompt
        prompt = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
        given: dict[str, Any] = {name: value for name in _GENERATE if (value := getattr(self, name)) is not None}
        out = model.generate(prompt, eos_early_stop=self.eos_early_stop or None, **given)
        print(tokenizer.decode(out[0].tolist(), skip_special_tokens=True))
        print(f"{len(out[0])} tokens in {out.num_forwards} forwards", file=sys.stderr)
        return 0


# Options that Model.generate takes under the same names; what was not given has the rule's default.
_GENERATE = (
    "gen_length", "block_length", "decoding", "threshold", "editing_threshold", "steps", "temperature", "top_k", "top_p", "seed",
    "minimal_topk", "max_post_steps", "num_to_transfer", "cfg_scale", "remasking",
)  # fmt: skip


@dataclass
class Train:
    """Train on text files: convert an AR checkpoint to block diffusion (warm-up, stable, decay), or continue either kind."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Directory of an official checkpoint with a tokenizer.json, or a hub id."""
    texts: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT [TEXT ...]")]
    """Text files in UTF-8, at least one; each is a document."""
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
    """Continue from the newest checkpoint in the output directory. Only --checkpoint-every may change: to train a finished run
    further, give its newest checkpoint as MODEL and another --output."""
    seed: int = 0
    """Of the order of data and of noise."""
    device: str = "cpu"
    """Where the model is trained: cpu, cuda, cuda:1."""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Precision of the weights; the optimizer keeps them in float32 too."""
    gradient_checkpointing: bool = False
    """Keep each layer's input only: less memory, more time."""

    def run(self) -> int:
        from rich.console import Console

        from .demo.display import Display
        from .model import Model
        from .training import PackedDataset, Plan, TrainConfig, Trainer, wsd_plan

        if not self.texts:
            raise ValueError("texts: expected at least one text file, got none")
        texts, device = [_read(path) for path in self.texts], _device(self.device)
        model, tokenizer = Model.from_pretrained(self.model, _dtype(self.dtype), device), _tokenizer(self.model)
        if self.objective == "diffusion" and model.config.causal:
            model = model.as_diffusion()
        model.gradient_checkpointing = self.gradient_checkpointing
        end = [] if model.config.eos_token_id is None else [model.config.eos_token_id]
        documents = [[*tokenizer.encode(text).ids, *end] for text in texts]
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
        file = Path(self.model) / "tokenizer.json"
        if not file.exists():  # of a hub id
            self.output.mkdir(parents=True, exist_ok=True)
            file = self.output / "tokenizer.json"
            tokenizer.save(str(file))
        with display.progress("training", self.steps) as update:

            def on_step(m: dict[str, Any]) -> None:
                loss = "skipped" if m["loss"] is None else f"loss {m['loss']:.3f}"
                update(m["step"] + 1, loss)

            Trainer(model, data, config, output=self.output, on_step=on_step, resume=self.resume, extra_files=[file]).run()
        display.line(f"checkpoints, each an official model directory, are in {self.output}")
        return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"texts: expected UTF-8 text in {path}, got {error}") from None


def _dtype(name: str) -> Any:
    import torch

    return None if name == "stored" else getattr(torch, name)


def _device(name: str) -> Any:
    """The torch.device; ValueError where PyTorch cannot use it."""
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: expected a device that PyTorch can use here, got {name!r} ({reason})") from None


def _tokenizer(path: str, revision: str | None = None) -> Any:
    """tokenizer.json of a checkpoint directory or hub id."""
    from tokenizers import Tokenizer

    local = Path(path)
    if local.is_dir():
        file = local / "tokenizer.json"
        if not file.exists():
            raise ValueError(f"model: expected a tokenizer.json in {path}, found none")
        return Tokenizer.from_file(str(file))
    return Tokenizer.from_pretrained(path, revision=revision or "main")


_COMMANDS: dict[str, Callable[..., Any]] = {"demo": Demo, "info": Info, "generate": Generate, "train": Train}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 after an error of the user's, 130 after Ctrl-C."""
    shown = warnings.showwarning
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
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
    finally:
        warnings.showwarning = shown


if __name__ == "__main__":
    sys.exit(main())
