"""lm_loss against cross entropy on full logits: loss and both gradients, half of the positions with weight."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from llada_kernels.ops.lm_loss import lm_loss

from .checks import as_exact_as
from .harness import Case, Settings, Variant, backends
from .runner import main
from .shapes import MINI

OP = importlib.import_module("llada_kernels.ops.lm_loss")
#: name, positions, hidden, vocabulary, dtypes
FULL = [("bench model", 2048, 512, 32000, (torch.float32, torch.bfloat16)), ("mini", 512, MINI["H"], MINI["V"], (torch.bfloat16,))]
QUICK = [("small", 64, 64, 1000, (torch.float32, torch.bfloat16))]


def cases(settings: Settings) -> Iterator[Case]:
    for name, positions, hidden, vocab, dtypes in QUICK if settings.quick else FULL:
        for dtype in dtypes:
            full = f"{name}, {positions} positions, forward+backward"
            if settings.wants(full, dtype):
                yield loss(full, positions, hidden, vocab, dtype)


def full_logits(hidden: Tensor, lm_head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The official way: logits of every position, in fp32, then cross entropy."""
    logits = F.linear(hidden, lm_head).to(torch.promote_types(torch.float32, hidden.dtype))
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()


def loss(name: str, positions: int, width: int, vocab: int, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, width, generator=generator).to(dtype)
    lm_head = (torch.randn(vocab, width, generator=generator) * 4 * width**-0.5).to(dtype)
    targets = torch.randint(0, vocab, (positions,), generator=generator)
    weights = (torch.rand(positions, generator=generator) < 0.5).float() / positions

    def both(call: Callable[..., Tensor], d: torch.dtype = dtype) -> tuple[Tensor, ...]:
        leaves = [hidden.to(d, copy=True).requires_grad_(), lm_head.to(d).detach().requires_grad_()]
        value = call(*leaves, targets, weights.to(torch.promote_types(torch.float32, d)))
        return value.detach(), *torch.autograd.grad(value, leaves)

    sample = torch.cat([targets[:256], torch.randint(0, vocab, (256,), generator=generator)])

    def pick(result: tuple[Tensor, ...]) -> list[Tensor]:
        return [result[0], result[1], result[2][sample]]  # of the head's gradient some rows: all of them in fp64 are gigabytes

    # fp64 logits of the mini geometry would take gigabytes; for bf16 fp32 is exact enough.
    wider = torch.float32 if dtype == torch.bfloat16 else torch.float64
    used = int((weights != 0).sum())
    flops, size = 6.0 * used * width * vocab, 3.0 * lm_head.numel() * lm_head.element_size()
    variants = backends(OP, lambda backend: both(lambda *a: lm_loss(*a, backend=backend).loss))
    variants.append(Variant("full logits + cross entropy", lambda: both(full_logits)))
    shapes = {"positions": positions, "weighted": used, "hidden": width, "vocabulary": vocab}
    check = as_exact_as(pick(both(full_logits, wider)), pick(both(full_logits)), pick)
    return Case("lm_loss", name, dtype, shapes, variants, check, flops, size)


if __name__ == "__main__":
    sys.exit(main("lm_loss", cases))
