"""lm_head_unmask at the mini and the bench model's geometry: LM head and sampler of up to a block of 32 tokens, against F.linear and a
sampler on its logits."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from llada_kernels.ops import threshold_unmask
from llada_kernels.ops.lm_head_unmask import lm_head_unmask
from llada_kernels.ops.threshold_unmask import Unmasked

from .bench_threshold_unmask import softmax_max
from .checks import close, equal
from .harness import Case, Settings, Variant, backends
from .runner import main
from .shapes import MINI

OP = importlib.import_module("llada_kernels.ops.lm_head_unmask")
LENGTH = 32


def cases(settings: Settings) -> Iterator[Case]:
    both = (torch.bfloat16, torch.float32)
    mini, small = ((64, 4096), (32, 1000)) if settings.quick else ((MINI["H"], MINI["V"]), (512, 32000))
    lengths = [1, LENGTH] if settings.quick else [1, 4, 8, 16, LENGTH]
    shapes = [(1, length, *size, dtype) for size in (mini, small) for dtype in both for length in lengths]
    shapes.append((8, LENGTH, *mini, torch.bfloat16))
    for rows, length, width, vocab, dtype in shapes:
        name = f"{rows} x {length} x {vocab}, hidden {width}"
        if settings.wants(name, dtype):
            yield sampler(name, rows, length, width, vocab, dtype)
    width, vocab = small
    if settings.wants(name := f"1 x {LENGTH} x {vocab}, hidden {width}, temperature 1", torch.float32):
        yield drawing(name, LENGTH, width, vocab)


def sampler(name: str, rows: int, length: int, width: int, vocab: int, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(0)
    lm_head = (torch.randn(vocab, width, generator=generator) * width**-0.5).to(dtype)
    mask_id = vocab - 1
    # Each position prefers one token, by more than products are rounded: the variants must choose the same.
    preferred = torch.randint(0, mask_id, (rows, length), generator=generator)
    sureness = torch.linspace(10, 20, length)[:, None]
    hidden = (torch.randn(rows, length, width, generator=generator) + sureness * lm_head[preferred].float()).to(dtype)
    tokens = torch.full((rows, length), mask_id)

    def unfused() -> Unmasked:
        return threshold_unmask(F.linear(hidden, lm_head), tokens, mask_id, 0.9)

    expected = lm_head_unmask(hidden, lm_head, tokens, mask_id, 0.9, backend="reference")
    same_choice = equal([preferred], lambda r: [r[1]])
    # bf16 rounds a logit of 20 by up to 0.06, and a probability by 6 %.
    # fp32 sums of 2048 products in another order differ by up to 1e-5 of a logit.
    confidence = close([expected.confidence], 0.1 if dtype == torch.bfloat16 else 3e-4, lambda r: [r[0]])

    def check(result: tuple[torch.Tensor, ...]) -> str | None:
        if isinstance(result, Unmasked):
            accepted = result.tokens != mask_id
            if not torch.equal(result.tokens[accepted], preferred[accepted]):
                return "tokens differ"
            return confidence((result.confidence,))
        return confidence(result) or same_choice(result)

    variants = backends(OP, lambda backend: lm_head_unmask(hidden, lm_head, tokens, mask_id, 0.9, backend=backend))
    variants.append(Variant("F.linear + threshold_unmask", unfused))
    variants.append(Variant("F.linear + softmax + max", lambda: softmax_max(F.linear(hidden, lm_head))))
    shapes = {"rows": rows, "length": length, "hidden": width, "vocabulary": vocab}
    flops, size = 2.0 * rows * length * width * vocab, float(lm_head.numel() * lm_head.element_size())
    return Case("lm_head_unmask", name, dtype, shapes, variants, check, flops, size)


def drawing(name: str, length: int, width: int, vocab: int) -> Case:
    """Tokens drawn at temperature 1: all variants from the same numbers of the same seed."""
    generator = torch.Generator().manual_seed(0)
    # Logits of standard deviation 2: no token is sure, so the draws decide.
    lm_head = torch.randn(vocab, width, generator=generator) * 2 * width**-0.5
    hidden = torch.randn(1, length, width, generator=generator)
    mask_id = vocab - 1
    tokens = torch.full((1, length), mask_id)
    arguments: dict[str, Any] = {"threshold": 0.0, "temperature": 1.0, "seed": 1}

    def unfused() -> Unmasked:
        return threshold_unmask(F.linear(hidden, lm_head), tokens, mask_id, **arguments)

    expected = lm_head_unmask(hidden, lm_head, tokens, mask_id, backend="reference", **arguments)
    exact, near = equal([expected.tokens], lambda r: [r.tokens]), close([expected.confidence], 3e-4, lambda r: [r.confidence])
    variants = backends(OP, lambda backend: lm_head_unmask(hidden, lm_head, tokens, mask_id, backend=backend, **arguments))
    variants.append(Variant("F.linear + threshold_unmask", unfused))
    shapes = {"rows": 1, "length": length, "hidden": width, "vocabulary": vocab, **arguments}
    flops, size = 2.0 * length * width * vocab, float(lm_head.numel() * lm_head.element_size())
    return Case("lm_head_unmask", name, torch.float32, shapes, variants, lambda r: exact(r) or near(r), flops, size)


if __name__ == "__main__":
    sys.exit(main("lm_head_unmask", cases))
