"""The training loop: a step is a pure function of weights, optimizer state, step number and data position."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..model import Model
from ._checks import check_choice, check_int, check_kind, check_number, check_pair
from .checkpoint import checkpoints, latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from .data import PackedDataset
from .objectives import OBJECTIVES, Objective, Prepared, loss_terms, prepare
from .optimizer import AdamW
from .router import ExpertLoads, router_losses, update_expert_bias
from .schedule import SCHEDULES, BlockSize, LearningRate, Plan

__all__ = ["TrainConfig", "Trainer"]

# May differ between a run and its continuation: nothing in them changes the weights.
_FREE = ("checkpoint_every", "keep_checkpoints")

_COUNTS = {
    "steps": 1, "rows": 1, "accumulation": 1, "views": 1, "max_bad_steps": 1,
    "warmup_steps": 0, "confidence_warmup_steps": 0, "checkpoint_every": 0, "keep_checkpoints": 0,
}  # fmt: skip
_NUMBERS = (
    "learning_rate", "final_learning_rate", "weight_decay", "clip", "mask_noise", "expert_bias_rate", "router_aux_loss",
    "router_z_loss", "confidence", "confidence_temperature",
)  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """What a run does; together with the data and the first weights it decides every bit of the result.

    Attributes:
        steps: length of the run.
        objective: "ar" or "diffusion".
        plan: block sizes over the run, a Plan or ``[(fraction, block_size | "full"), ...]``, kept as such pairs; diffusion only.
        rows: packed rows per step, over all micro-batches.
        accumulation: micro-batches per step; divides ``rows``.
        seed: of noise.
        loss_norm, mask_ratio, views, complementary: see :class:`Objective`.
        learning_rate, final_learning_rate, warmup_steps, schedule, decay_fraction: see :class:`LearningRate`.
        betas, weight_decay, clip: AdamW, and the largest gradient norm (0: not clipped).
        mask_noise: noise on the embeddings of masked positions: its standard deviation at step 0 in units of the rms of
            the embedding table, falling linearly to 0 ...
        mask_noise_fraction: ... over this share of the steps.
        expert_bias_rate: step of the expert bias towards equal loads, after each step; 0: the bias stays.
        router_aux_loss, router_z_loss: weights of the load-balance and z losses.
        confidence, confidence_temperature, confidence_warmup_steps: CAP: weight of the entropy of correctly predicted
            masked tokens, its temperature, and the steps over which the weight rises from 0.
        checkpoint_every: steps between checkpoints; 0: only the last.
        keep_checkpoints: how many to keep; 0: all.
        max_bad_steps: steps in a row with a loss or gradient that is not finite before the run stops.

    Raises:
        TypeError: an attribute of the wrong Python type: a count that is no int, a plan that is none.
        ValueError: ``steps``, ``rows`` or ``accumulation`` below 1, rows that do not divide, a rate or count that is negative or not
            finite, an unknown name, a fraction above 1.
    """

    steps: int
    objective: Literal["ar", "diffusion"] = "diffusion"
    plan: Plan | Sequence[tuple[float, BlockSize]] = ((1.0, 32),)
    rows: int = 8
    accumulation: int = 1
    seed: int = 0
    loss_norm: Literal["elbo", "masked", "uniform"] = "elbo"
    mask_ratio: tuple[float, float] = (1e-3, 1.0)
    views: int = 1
    complementary: bool = False
    learning_rate: float = 3e-5
    final_learning_rate: float = 3e-6
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    decay_fraction: float = 0.2
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    mask_noise: float = 1.0
    mask_noise_fraction: float = 0.02
    expert_bias_rate: float = 1e-3
    router_aux_loss: float = 0.0
    router_z_loss: float = 0.0
    confidence: float = 0.0
    confidence_temperature: float = 1.0
    confidence_warmup_steps: int = 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    max_bad_steps: int = 10

    def __post_init__(self) -> None:
        for name, least in _COUNTS.items():
            check_int(name, getattr(self, name), least)
        check_int("seed", self.seed)
        if self.rows % self.accumulation:
            raise ValueError(f"rows: expected a multiple of accumulation {self.accumulation}, got {self.rows}")
        for name in _NUMBERS:
            check_number(name, getattr(self, name))
        for name in ("mask_noise_fraction", "decay_fraction"):
            check_number(name, getattr(self, name), 1.0)
        check_pair("betas", self.betas)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {self.betas}")
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("schedule", self.schedule, SCHEDULES)
        object.__setattr__(self, "plan", Plan(self.plan).as_tuples())  # plain data, so that runs can be compared
        self.objective_for(Plan(self.plan).stages[0].block_size)

    def objective_for(self, block_size: BlockSize) -> Objective:
        """The objective at a block size of the plan."""
        return Objective(self.objective, block_size, self.loss_norm, self.mask_ratio, self.views, self.complementary)

    def learning_rate_schedule(self) -> LearningRate:
        """The learning rate over the run."""
        return LearningRate(self.learning_rate, self.steps, self.warmup_steps, self.schedule, self.final_learning_rate, self.decay_fraction)


class Trainer:
    """Trains a model; all state is in the object.

    Args:
        model: trained in place.
        dataset: where samples come from; sample g is used in step ``g // rows``.
        config: the run.
        output: directory of checkpoints and ``metrics.jsonl``; None: neither is written.
        on_step: called after each step with its metrics.
        resume: continue from the newest complete checkpoint under ``output``, if there is one. Model, data and configuration
            are to be those of the run; only ``checkpoint_every`` and ``keep_checkpoints`` may change. Not even ``steps``: it
            stretches plan and learning rate. To train a finished run's model further, start a new run from its checkpoint.
        extra_files: copied into every checkpoint, so that it is complete for users: tokenizer.json.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: the model is frozen or quantised; it is causal and the objective diffusion (convert it first:
            :meth:`Model.as_diffusion`) or the reverse; ``output`` holds checkpoints and ``resume`` is False, or they are of
            another run; the data hold tokens outside the vocabulary or, for diffusion, the mask token.

    Warns:
        UserWarning: the plan's last block size, that of generation, has no step in so short a run.
    """

    def __init__(
        self,
        model: Model,
        dataset: PackedDataset,
        config: TrainConfig,
        *,
        output: str | os.PathLike[str] | None = None,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        resume: bool = False,
        extra_files: Sequence[str | os.PathLike[str]] = (),
    ) -> None:
        check_kind("model", model, Model)
        check_kind("dataset", dataset, PackedDataset)
        check_kind("config", config, TrainConfig)
        if resume and output is None:
            raise ValueError("resume: expected an output directory to continue from, got output=None")
        self.extra_files = tuple(extra_files)
        for file in self.extra_files:
            if not os.path.isfile(file):
                raise ValueError(f"extra_files: expected files, got {os.fspath(file)}, which is none")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("model: expected parameters that require gradients, got a frozen model (quantised experts cannot be trained)")
        self.model, self.dataset, self.config, self.on_step = model, dataset, config, on_step
        self.plan, self.learning_rate = Plan(config.plan), config.learning_rate_schedule()
        if config.objective == "diffusion" and model.config.causal:
            raise ValueError("model: expected a diffusion model for objective='diffusion', got a causal one; train model.as_diffusion()")
        if config.objective == "ar" and not model.config.causal:
            raise ValueError("model: expected a causal model for objective='ar', got a diffusion model, which would generate nonsense")
        if config.objective == "diffusion" and model.config.mask_token_id is None:
            raise ValueError("model: expected a configuration with a mask_token_id, got None")
        if config.objective == "diffusion" and len(edges := self.plan.boundaries(config.steps)) > 2 and edges[-2] == edges[-1]:
            last = self.plan.stages[-1]
            text = f"plan: block size {last.block_size}, the last, gets none of {config.steps} steps: its share is {last.fraction:.1%}"
            warnings.warn(f"{text}; the model is not trained for it", stacklevel=2)
        dataset.check_tokens(model.config.vocab_size, model.config.mask_token_id if config.objective == "diffusion" else None)
        self.optimizer = AdamW(model, betas=config.betas, weight_decay=config.weight_decay)
        self.output = None if output is None else Path(output)
        self.step, self.next_sample = 0, 0
        self.skipped_steps, self.bad_steps, self._bad_in_a_row = 0, 0, 0
        if self.output is not None and not resume and checkpoints(self.output):
            raise ValueError(f"output: expected a directory without checkpoints (or resume=True), got {self.output}")
        if resume and self.output is not None and (newest := latest_checkpoint(self.output)) is not None:
            self._restore(newest)
        self._trim_metrics()

    def run(self, until: int | None = None) -> None:
        """Train to step ``until`` (default: the end), saving as configured; the last step is always saved.

        Raises:
            FloatingPointError: ``max_bad_steps`` steps in a row were not finite, or the last loss of the run or its weights are
                not, or no step was. The last step is then not saved; :meth:`save` does it all the same.
            OSError: a checkpoint cannot be written. Earlier ones stay.

        Warns:
            UserWarning: no step had a supervised token.
        """
        if until is not None:
            check_int("until", until, 0)
        end = self.config.steps if until is None else min(until, self.config.steps)
        while self.step < end:
            metrics = self.train_step()
            self._log(metrics)
            if self.step == self.config.steps:
                self._check_end(metrics)
            every = self.config.checkpoint_every
            if self.output is not None and (self.step == self.config.steps or (every and self.step % every == 0)):
                self.save()
            if self.on_step is not None:
                self.on_step(metrics)

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics. A step without supervised tokens is skipped and counted."""
        begin, config, step = time.perf_counter(), self.config, self.step
        block_size = self.plan.block_size_at(step, config.steps)
        parts = self._prepare(block_size)
        self.step, self.next_sample = step + 1, self.next_sample + config.rows
        metrics: dict[str, Any] = {
            "step": step,
            "block_size": block_size if config.objective == "diffusion" else None,
            "learning_rate": self.learning_rate.at(step),
            "tokens": sum(p.input_ids.numel() for p in parts),
            "supervised": sum(p.count for p in parts),
        }
        count = metrics["supervised"]
        if not any(bool((p.weights != 0).any()) for p in parts):
            self.skipped_steps += 1
            return metrics | {"loss": None, "skipped": True, "seconds": time.perf_counter() - begin}
        loads = ExpertLoads()
        loss = self._backward(parts, count, loads, metrics)
        norm = self.optimizer.clip(config.clip if config.clip > 0 else math.inf)
        metrics |= {"loss": loss, "grad_norm": float(norm)}
        if math.isfinite(loss) and math.isfinite(metrics["grad_norm"]):
            self._bad_in_a_row = 0
            self.optimizer.step(metrics["learning_rate"])
            if config.expert_bias_rate:
                update_expert_bias(self.model, loads, config.expert_bias_rate)
            metrics["load_imbalance"] = loads.imbalance()
        else:
            self._drop_bad_step(metrics)
        return metrics | {"seconds": time.perf_counter() - begin}

    def _prepare(self, block_size: BlockSize) -> list[Prepared]:
        """Every micro-batch of the step, noised: counts are needed before the first forward."""
        config, device = self.config, self.model.device
        rows = config.rows // config.accumulation
        objective, mask_id = config.objective_for(block_size), self.model.config.mask_token_id or 0
        return [
            prepare(
                self.dataset.batch(self.next_sample + i * rows, rows).to(device), objective, mask_id,
                seed=config.seed, step=self.step,
            )
            for i in range(config.accumulation)
        ]  # fmt: skip

    def _backward(self, parts: list[Prepared], count: int, loads: ExpertLoads, metrics: dict[str, Any]) -> float:
        """Gradients of the whole step; returns its main loss."""
        config, step = self.config, self.step - 1
        warm = min(1.0, (step + 1) / config.confidence_warmup_steps) if config.confidence_warmup_steps else 1.0
        confidence = config.confidence * warm
        arguments: dict[str, Any] = {
            "embedding_sigma": self._embedding_sigma(step), "seed": config.seed, "step": step,
            "confidence": confidence > 0, "confidence_temperature": config.confidence_temperature,
            "every_token": bool(config.router_aux_loss or config.router_z_loss),
        }  # fmt: skip
        total_tokens = sum(p.input_ids.numel() for p in parts)
        correct = 0.0
        if confidence > 0 and len(parts) > 1:  # the denominator of the confidence term is known only after a forward
            with torch.no_grad():
                correct = float(sum(loss_terms(self.model, p, **arguments).correct for p in parts))
        loss = confidence_loss = 0.0
        for part in parts:
            routers: dict[int, Any] = {}
            terms = loss_terms(self.model, part, router_outputs=routers, **arguments)
            loads.add(routers)
            objective = terms.loss / count
            loss += float(terms.loss.detach()) / count
            if confidence > 0:
                term = terms.confidence / max(1.0, correct if len(parts) > 1 else float(terms.correct))
                objective = objective + confidence * term
                confidence_loss += float(term.detach())
            if config.router_aux_loss or config.router_z_loss:
                share = part.input_ids.numel() / total_tokens
                aux, z = router_losses(routers)
                objective = objective + share * (config.router_aux_loss * aux + config.router_z_loss * z)
            objective.backward()
        if confidence > 0:
            metrics["confidence_loss"] = confidence_loss
        return loss

    def _embedding_sigma(self, step: int) -> float:
        """Noise on mask embeddings: an AR parent has driven the mask token's row towards zero."""
        config = self.config
        length = config.mask_noise_fraction * config.steps
        if config.objective == "ar" or step >= length or config.mask_noise == 0.0:
            return 0.0
        table = self.model.embed_tokens.weight.detach()
        return config.mask_noise * float(table.float().pow(2).mean().sqrt()) * (1.0 - step / length)

    def _drop_bad_step(self, metrics: dict[str, Any]) -> None:
        """Leave the weights as they are; stop when it keeps happening."""
        self.optimizer.zero_grad()
        self.bad_steps += 1
        self._bad_in_a_row += 1
        metrics["not_finite"] = True
        if self._bad_in_a_row >= self.config.max_bad_steps:
            raise FloatingPointError(
                f"{self._bad_in_a_row} steps in a row with a loss or gradient that is not finite, last at step {metrics['step']}"
            )

    def _check_end(self, metrics: dict[str, Any]) -> None:
        """Weights that give no loss, or are no numbers, are no result."""
        if self.skipped_steps == self.step:
            warnings.warn("dataset: no step had a supervised token; the weights are as they were", stacklevel=3)
        loss = metrics["loss"]
        if (loss is not None and not math.isfinite(loss)) or 0 < self.bad_steps == self.step - self.skipped_steps:
            raise FloatingPointError(
                f"the run has diverged: loss {loss} at step {metrics['step']}, the last, and {self.bad_steps} of {self.step} steps were "
                f"not finite; nothing was saved after it. Try a learning_rate below {self.config.learning_rate:g}"
            )
        for name, parameter in self.optimizer.parameters.items():
            if parameter.numel() and not all(math.isfinite(float(v)) for v in parameter.detach().aminmax()):
                raise FloatingPointError(
                    f"the run has diverged: {name} is not finite after step {metrics['step']}, the last; nothing was saved after it. "
                    f"Try a learning_rate below {self.config.learning_rate:g}"
                )

    # Checkpoints and metrics

    def save(self) -> Path:
        """Write a checkpoint of the current step and remove old ones.

        Raises:
            ValueError: the trainer has no output directory.
            OSError: it cannot be written. Earlier ones stay.
        """
        if self.output is None:
            raise ValueError("output: expected a directory to save to, got None")
        state = {
            "next_sample": self.next_sample,
            "skipped_steps": self.skipped_steps,
            "bad_steps": self.bad_steps,
            "bad_in_a_row": self._bad_in_a_row,
            "plan": self.plan.to_list(),
            "config": _plain(self.config),
            "data": self._data_identity(),
        }
        tensors = self.optimizer.state_dict()
        path = save_checkpoint(self.output, self.step, self.model, tensors, state, self.extra_files)
        prune_checkpoints(self.output, self.config.keep_checkpoints)
        return path

    def _restore(self, path: Path) -> None:
        tensors, state = load_checkpoint(path, self.model)
        now = _plain(self.config)
        wrong = [k for k in now if k not in _FREE and now[k] != state["config"].get(k)]
        if wrong:
            shown = "; ".join(f"{k}: expected {state['config'].get(k)}, got {now[k]}" for k in wrong)
            remedy = f"continue with the same values ({' and '.join(_FREE)} may differ), or start a new run from that checkpoint"
            raise ValueError(f"config: {path} is of another run: {shown}; {remedy}, in another output directory")
        if state["data"] != self._data_identity():
            raise ValueError(f"dataset: {path} was trained on {state['data']}, got {self._data_identity()}")
        self.optimizer.load_state_dict(tensors)
        self.step, self.next_sample = state["step"], state["next_sample"]
        self.skipped_steps, self.bad_steps = state["skipped_steps"], state["bad_steps"]
        self._bad_in_a_row = state["bad_in_a_row"]

    def _data_identity(self) -> dict[str, Any]:
        """What decides every sample: a run does not go on with other data."""
        data = self.dataset
        return {"row_tokens": data.row_tokens, "seed": data.seed, "shuffle": data.shuffle, "tokens": data.num_tokens, "digest": data.digest}

    def _log(self, metrics: dict[str, Any]) -> None:
        if self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
            with open(self.output / "metrics.jsonl", "a") as file:
                file.write(json.dumps(metrics) + "\n")

    def _trim_metrics(self) -> None:
        """Drop lines of steps after the checkpoint that the run continues from: they will be written again."""
        if self.output is None or not (path := self.output / "metrics.jsonl").exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] < self.step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue  # torn by a kill
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, path)


def _plain(config: TrainConfig) -> dict[str, Any]:
    """The configuration as it comes back from JSON."""
    return dict(json.loads(json.dumps(asdict(config))))
