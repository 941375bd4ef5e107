"""grouped_gemm: the gate and up product of the mini model's experts."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from llada_kernels.ops.grouped_gemm import grouped_gemm

from .checks import as_exact_as
from .harness import Case, Settings, Variant, backends
from .runner import main
from .shapes import MINI, expert_weights, mini_routing

OP = importlib.import_module("llada_kernels.ops.grouped_gemm")
FULL = {torch.bfloat16: (32, 512, 2048, 8192), torch.float32: (32, 2048)}
QUICK = {torch.bfloat16: (32,), torch.float32: (32,)}


def cases(settings: Settings) -> Iterator[Case]:
    hidden, width, experts = (256, 64, 16) if settings.quick else (MINI["H"], MINI["I"], MINI["E"])
    for dtype, all_tokens in (QUICK if settings.quick else FULL).items():
        weights = None
        for tokens in all_tokens:
            if settings.wants(name := f"{tokens} tokens, uniform, forward", dtype):
                weights = expert_weights(dtype, experts, width, hidden)[0] if weights is None else weights
                yield forward(name, tokens, weights)


def forward(name: str, tokens: int, weights: Tensor) -> Case:
    experts, n, k = weights.shape
    routing = mini_routing(tokens, "uniform", experts=experts)
    offsets = routing.offsets
    rows = int(offsets[-1])
    a = torch.randn(rows, k, generator=torch.Generator().manual_seed(1)).to(weights.dtype)
    transposed = weights.mT

    sample = torch.randperm(rows, generator=torch.Generator().manual_seed(2))[:64]
    group = torch.searchsorted(offsets[1:], sample.to(torch.int32), right=True)

    def values(dtype: torch.dtype) -> Tensor:
        return torch.stack([weights[g].to(dtype) @ a[r].to(dtype) for r, g in zip(sample.tolist(), group.tolist(), strict=True)])

    def grouped_mm() -> Tensor:
        return F.grouped_mm(a, transposed, offs=offsets[1:])

    distinct = int((offsets.diff() > 0).sum())
    size = (distinct * n * k + a.numel() + rows * n) * a.element_size()
    return Case(
        "grouped_gemm", name, weights.dtype,
        {"rows": rows, "n": n, "k": k, "groups": experts, "groups_with_rows": distinct},
        [*backends(OP, lambda backend: grouped_gemm(a, weights, offsets, backend=backend)), Variant("F.grouped_mm", grouped_mm)],
        as_exact_as([values(torch.float64)], [values(weights.dtype)], lambda y: [y[sample]]), 2.0 * rows * n * k, float(size),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main("grouped_gemm", cases))
