"""The tables of the GPU part of docs/performance.md, and how each is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..harness import Case, Settings
from . import attention, model, moe, sampler

__all__ = ["GUARDS", "TABLES", "Table"]


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        about: what it shows, in a line.
        cases: makes its cases, the most wanted first: a run ends when its time is up.
        part: the part of ``bench/gpu.sh`` that measures it.
    """

    about: str
    cases: Callable[[Settings], Iterator[Case]]
    part: str = "bench"


TABLES = {
    "T1": Table("Attention in the training layout, one document; true work, backward alone is 2.5 times the FLOPs.", attention.training),
    "T2": Table("Attention in the training layout, packed documents.", attention.packed),
    "A": Table("A decoding layer of experts at the mini geometry, 1 to 4096 tokens, bf16, int8, int4 and FP8.", moe.decode),
    "S": Table("Sampler, LM head, routing, norm, rope and loss.", sampler.cases),
    "T4": Table("A denoising step of one block over a cached context.", attention.decode),
    "B": Table("A training layer of experts.", moe.training),
    "T5": Table("Prefill: block-causal attention.", attention.prefill),
    "C": Table("The grouped product alone.", moe.grouped),
    "T3": Table("Attention forward and backward: do 100 runs give the same bits, and at which speed?", attention.determinism),
    "T7": Table("Peak memory of attention, forward and backward, above its inputs.", attention.memory),
    "E": Table("The mini geometry as a whole, random weights.", model.cases, "model"),
}

#: Not a table of times: what :mod:`bench.gpu.guards` sees.
GUARDS = Table(
    "Over 100 batches of random lengths no sync and no recompilation; the same bits over 100 runs; CUDA graphs.", lambda _: iter(())
)
