"""threshold_unmask over the logits of a block of 32 tokens and the vocabulary of the mini model: greedy, and drawing at temperature 1.

softmax + max writes 20 MB of probabilities per call of the mini model's block, and what that costs depends on the allocator: the C library
may keep freed blocks (no page fault) or give them back to the system (5000 page faults a call), by what else the process has allocated.
So three baselines: as PyTorch comes, and both states by force.

Logits come from memory, other ones at each call. In a model the LM head has just written them, and what of them is still in a cache is
faster to read for all: cases of their own, where they are written anew before each call.
"""

from __future__ import annotations

import importlib
import itertools
import mmap
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llada_kernels.ops.threshold_unmask import Unmasked, threshold_unmask

from .checks import close, equal
from .harness import Case, Settings, Variant, backends
from .runner import main
from .shapes import MINI, rotate

OP = importlib.import_module("llada_kernels.ops.threshold_unmask")
LENGTH = 32


def cases(settings: Settings) -> Iterator[Case]:
    vocab = 4096 if settings.quick else MINI["V"]
    for dtype in (torch.float32, torch.bfloat16):
        if settings.wants(name := f"greedy 1 x {LENGTH} x {vocab}", dtype):
            yield sampler(name, 1, vocab, dtype, {"threshold": 0.9}, settings)
        if settings.device.type == "cpu" and settings.wants(name := f"greedy 1 x {LENGTH} x {vocab}, logits just written", dtype):
            yield sampler(name, 1, vocab, dtype, {"threshold": 0.9}, settings, just_written=True)
    if settings.wants(name := f"greedy 1 x 1 x {vocab}", torch.float32):
        yield sampler(name, 1, vocab, torch.float32, {"threshold": 0.9}, settings, length=1)
    if settings.wants(name := f"greedy 8 x {LENGTH} x {vocab}", torch.bfloat16):
        yield sampler(name, 8, vocab, torch.bfloat16, {"threshold": 0.9, "editing_threshold": 0.9}, settings)
    if settings.wants(name := f"temperature 1, top_p 0.95, 1 x {LENGTH} x {vocab}", torch.float32):
        yield sampler(name, 1, vocab, torch.float32, {"threshold": 0.9, "temperature": 1.0, "top_p": 0.95, "seed": 1}, settings)


def softmax_max(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence and choice of every position as the official loops compute them, without the decision that follows."""
    return logits.softmax(-1, dtype=torch.float32).max(-1)


def softmax_max_into(probabilities: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`softmax_max` in memory that is given; bf16 logits PyTorch first converts in a temporary of its own."""
    return torch.softmax(logits, -1, torch.float32, out=probabilities).max(-1)


def softmax_max_fresh(logits: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`softmax_max` in memory that the process did not have before the call."""
    memory = torch.frombuffer(mmap.mmap(-1, 4 * logits.numel()), dtype=torch.float32)
    return softmax_max_into(memory.view(logits.shape), logits)


def sampler(
    name: str, rows: int, vocab: int, dtype: torch.dtype, options: dict[str, Any], settings: Settings, length: int = LENGTH,
    just_written: bool = False,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    # A trained model is sure of some positions and not of others: spreads of 1 to 6.
    spread = torch.linspace(1, 6, length)[:, None]
    logits = (torch.randn(rows, length, vocab, generator=generator) * spread).to(dtype)
    mask_id = vocab - 1
    logits[..., mask_id] = -30.0
    tokens = torch.randint(0, mask_id, (rows, length), generator=generator)
    tokens[:, length // 4 :] = mask_id
    copies = rotate(logits.clone, logits.numel() * logits.element_size(), settings.quick)
    expected = threshold_unmask(logits, tokens, mask_id, backend="reference", **options)
    exact = equal([expected.tokens, expected.confidence, expected.counts])
    written = torch.full_like(logits, torch.nan) if just_written else None
    inputs = copies if written is None else itertools.repeat(written)
    variants = backends(OP, lambda backend: threshold_unmask(next(inputs), tokens, mask_id, backend=backend, **options))
    if "temperature" not in options:
        reused = torch.zeros(logits.shape)
        variants.append(Variant("softmax + max", lambda: softmax_max(next(inputs))))
        variants.append(Variant("softmax + max, fresh pages", lambda: softmax_max_fresh(next(inputs))))
        variants.append(Variant("softmax + max, one buffer reused", lambda: softmax_max_into(reused, next(inputs))))
    size: float | None = logits.numel() * logits.element_size()
    if written is not None:
        size = None  # some of it comes from a cache
        for variant in variants:
            variant.before = partial(lambda to: to.copy_(next(copies)), written)
    confidence = close([expected.confidence], 1e-4, lambda r: [r[0]])
    return Case(
        "threshold_unmask", name, dtype, {"rows": rows, "length": length, "vocabulary": vocab, **options}, variants,
        lambda r: exact(r) if isinstance(r, Unmasked) else confidence(r), None, size,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main("threshold_unmask", cases))
