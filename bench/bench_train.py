"""A training step of the bench model, ours against the official way, with its peak memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from functools import partial

import torch

from llada_kernels.masks import DiffusionMask

from .harness import Case, Settings, Variant
from .runner import main
from .shapes import bench_config
from .train_steps import BLOCK, official_step, our_step, peak_memory


def cases(settings: Settings) -> Iterator[Case]:
    documents, length = (1, 64) if settings.quick else (4, 512)
    for dtype in (torch.float32,) if settings.quick else (torch.float32, torch.bfloat16):
        if settings.wants(name := f"step, {documents} documents of {length}", dtype):
            yield training_step(name, documents, length, dtype, settings)


def training_step(name: str, documents: int, length: int, dtype: torch.dtype, settings: Settings) -> Case:
    small = settings.quick
    # The same loss and norm of all gradients from the same weights; bf16 rounds differently on the way.
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    expected: list[float] = []

    official = official_step(dtype, documents, length, small)

    def by_official() -> tuple[float, float]:
        result = official()
        if not expected:  # it comes first, and its first step is what ours is compared with: a step takes seconds
            expected.extend(result)
        return result

    def check(result: tuple[float, float]) -> str | None:
        if not expected:
            return "the official step gave nothing to compare with"
        for what, x, e in zip(("loss", "gradient norm"), result, expected, strict=True):
            if not (math.isfinite(x) and abs(x - e) <= tolerance * abs(e)):
                return f"{what} {x:.6f}, expected {e:.6f}"
        return None

    memory = partial(peak_memory, dtype=dtype, documents=documents, length=length, small=small, threads=settings.threads)
    variants = [
        Variant("official", by_official, extra=lambda: memory("official")),
        Variant("native", our_step(dtype, documents, length, small), "ours", extra=lambda: memory("ours")),
    ]
    shapes = {"documents": documents, "length": length, "block": BLOCK, "model": "small" if small else "bench model"}
    return Case("train", name, dtype, shapes, variants, check, true_flops(documents, length, small), None, least=3)


def true_flops(documents: int, length: int, small: bool) -> float:
    """FLOPs of a step without what has no effect: the logits of masked positions alone (on average 0.55 of them), visible pairs alone."""
    c = bench_config(small)
    noisy = documents * length
    attention = c.hidden_size * (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    attention += c.hidden_size * c.num_attention_heads * c.head_dim
    experts = 3 * c.hidden_size * (c.num_experts_per_tok * c.moe_intermediate_size + c.shared_expert_intermediate_size)
    pairs = DiffusionMask.block_diffusion([0, length], BLOCK).visible_pairs() * documents * c.num_attention_heads * c.head_dim
    total = 0.0
    for moe in c.moe_layers:
        mlp = experts + c.hidden_size * c.num_experts if moe else 3 * c.hidden_size * c.intermediate_size
        total += 2.0 * (attention + mlp) * 2 * noisy + 4.0 * pairs
    total += 2.0 * 0.55 * noisy * c.hidden_size * c.vocab_size
    return 3.0 * total


if __name__ == "__main__":
    sys.exit(main("train", cases))
