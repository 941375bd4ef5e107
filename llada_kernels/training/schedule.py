"""What changes over a run, as data: the block-size plan of a conversion and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ._checks import check_block_size, check_choice, check_int, check_number

__all__ = ["BlockSize", "LearningRate", "Plan", "Stage", "wsd_plan"]

BlockSize = int | Literal["full"]

SCHEDULES = ("constant", "cosine", "linear", "wsd")

_WARM_UP = (1, 4, 32, 64)
_DECAY = (2048, 1024, 512, 256, 128, 64)


@dataclass(frozen=True)
class Stage:
    """A part of a plan: a share of the steps trained at one block size ("full": MDLM over whole documents)."""

    fraction: float
    block_size: BlockSize


@dataclass(frozen=True)
class Plan:
    """Block size over a run: ``[(fraction, block_size | "full"), ...]``, fractions summing to 1; another Plan is copied.

    Raises:
        TypeError: neither a Plan nor a list of pairs.
        ValueError: no stage, a fraction below 0, fractions that do not sum to 1, a block size that is neither "full" nor
            an integer of at least 1.
    """

    stages: tuple[Stage, ...]

    def __init__(self, stages: Plan | Sequence[Stage | tuple[float, BlockSize]]) -> None:
        items = stages.stages if isinstance(stages, Plan) else stages
        if not isinstance(items, tuple | list):
            raise TypeError(f"plan: expected {_PLAN}, got {items!r}")
        object.__setattr__(self, "stages", tuple(_stage(item) for item in items))
        if not self.stages:
            raise ValueError("plan: expected at least one stage, got none")
        for stage in self.stages:
            check_block_size("plan", stage.block_size)
            check_number("plan", stage.fraction, 1.0)
        total = sum(s.fraction for s in self.stages)
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"plan: expected fractions that sum to 1, got {total}")

    def boundaries(self, steps: int) -> list[int]:
        """First step of each stage, and ``steps`` at the end: the rounded running sums of the fractions."""
        edges, total = [0], 0.0
        for stage in self.stages:
            total += stage.fraction
            edges.append(round(total * steps))
        edges[-1] = steps
        return edges

    def block_size_at(self, step: int, steps: int) -> BlockSize:
        """Block size of step ``step`` of ``steps``; the last stage's beyond the end."""
        for stage, end in zip(self.stages, self.boundaries(steps)[1:], strict=True):
            if step < end:
                return stage.block_size
        return self.stages[-1].block_size

    def describe(self, steps: int) -> str:
        """One line per stage: its steps, its share and its block size."""
        edges = self.boundaries(steps)
        lines = [f"block-size plan over {steps} steps:"]
        for stage, begin, end in zip(self.stages, edges, edges[1:], strict=False):
            lines.append(f"  steps {begin:>7} - {end:<7} {stage.fraction:6.1%}  block size {stage.block_size}")
        return "\n".join(lines)

    def as_tuples(self) -> tuple[tuple[float, BlockSize], ...]:
        """(fraction, block size) of each stage."""
        return tuple((s.fraction, s.block_size) for s in self.stages)

    def to_list(self) -> list[list[float | BlockSize]]:
        """The plan as JSON data; ``Plan(...)`` of it is equal to this plan."""
        return [[s.fraction, s.block_size] for s in self.stages]


_PLAN = 'a Plan or [(fraction, block size or "full"), ...]'


def _stage(item: Any) -> Stage:
    if isinstance(item, Stage):
        return item
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise TypeError(f"plan: expected {_PLAN}, got {item!r} for a stage")
    return Stage(*item)


def wsd_plan(sequence_length: int, final_block_size: int = 32) -> Plan:
    """Warm-up, stable, decay: 1, 4, 32, 64 at 5 % each; full sequence; halving from 2048 at 2 % each; the final size 8 %.

    Sizes that are not below ``sequence_length`` are left out and their share goes to the stable phase, which trains whole
    documents.

    Args:
        sequence_length: the longest document of the run, in tokens.
        final_block_size: the size that the model is meant to generate with.

    Raises:
        TypeError, ValueError: either size is no int, or below 1.
    """
    check_int("sequence_length", sequence_length, 1)
    check_int("final_block_size", final_block_size, 1)
    before = [Stage(0.05, b) for b in _WARM_UP if b < sequence_length]
    after = [Stage(0.02, b) for b in _DECAY if final_block_size < b < sequence_length]
    after.append(Stage(0.08, final_block_size))
    stable = 1.0 - sum(s.fraction for s in before) - sum(s.fraction for s in after)
    return Plan([*before, Stage(stable, "full"), *after])


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up to ``peak``, then ``kind`` down to ``final``.

    Attributes:
        peak: the highest rate.
        steps: length of the run.
        warmup_steps: steps of the linear rise; step s of them has rate peak (s+1)/warmup_steps.
        kind: "constant", "cosine" or "linear" over the rest, or "wsd": constant, then linear over the last
            ``decay_fraction`` of the run.
        final: the rate at the end of a falling schedule.
    """

    peak: float
    steps: int
    warmup_steps: int = 0
    kind: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    final: float = 0.0
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, SCHEDULES)
        check_int("steps", self.steps, 1)
        check_int("warmup_steps", self.warmup_steps, 0)
        check_number("peak", self.peak)
        check_number("final", self.final)
        check_number("decay_fraction", self.decay_fraction, 1.0)

    def at(self, step: int) -> float:
        """The rate of step ``step``."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        begin = self.warmup_steps
        if self.kind == "wsd":
            begin = max(begin, round(self.steps * (1.0 - self.decay_fraction)))
        progress = min(1.0, max(0.0, (step - begin) / max(1, self.steps - begin)))
        share = 0.5 * (1.0 + math.cos(math.pi * progress)) if self.kind == "cosine" else 1.0 - progress
        return self.final + (self.peak - self.final) * share
