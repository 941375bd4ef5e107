"""block_attention: training layout, packed documents, prefill; forward, and with backward, which FlexAttention has none of on a CPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from llada_kernels.masks import DiffusionMask
from llada_kernels.ops.block_attention import block_attention
from llada_kernels.testing import random_document_lengths

from .attention_baselines import additive, exact_rows, flex, sdpa, sdpa_per_document, with_gradients
from .checks import as_exact_as
from .harness import Case, Settings, Variant, backends
from .runner import main
from .shapes import MINI

OP = importlib.import_module("llada_kernels.ops.block_attention")
BLOCK = 32
DTYPES = (torch.bfloat16, torch.float32)


def cases(settings: Settings) -> Iterator[Case]:
    length, packed = (128, 256) if settings.quick else (2048, 8192)
    training = DiffusionMask.block_diffusion([0, length], BLOCK)
    for dtype in DTYPES:
        if settings.wants(name := f"training {length} forward", dtype):
            yield forward(name, training, dtype, settings)
        if settings.wants(name := f"training {length} forward+backward", dtype):
            yield forward_backward(name, training, dtype)
    lengths = random_document_lengths(packed, packed // 16, seed=1, multiple=BLOCK)
    if settings.wants(name := f"packed {packed} forward", torch.bfloat16):
        yield packed_forward(name, lengths, torch.bfloat16, settings)
    if settings.wants(name := f"prefill {length} forward", torch.bfloat16):
        yield forward(name, DiffusionMask.block_causal([0, length], BLOCK), torch.bfloat16, settings)


def inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (MINI["Hq"], MINI["Hkv"], MINI["Hkv"])
    q, k, v = (torch.randn(tokens, h, MINI["D"], generator=generator).to(dtype) for h in heads)
    return q, k, v


def shapes(mask: DiffusionMask, **more: Any) -> dict[str, Any]:
    return {"queries": mask.num_queries, "heads": "16:4", "head_dim": 128, "block": BLOCK, "visible_pairs": mask.visible_pairs(), **more}


def flops(mask: DiffusionMask) -> float:
    return 4.0 * MINI["D"] * MINI["Hq"] * mask.visible_pairs()


def check_rows(q: Tensor, k: Tensor, v: Tensor, mask: DiffusionMask, count: int = 96) -> Any:
    """The error rule on some queries: all of them in fp64 would take longer than the bench."""
    rows = torch.randperm(len(q), generator=torch.Generator().manual_seed(3))[:count]
    visible = mask.mask_mod()(None, None, rows[:, None], torch.arange(len(k))[None])
    exact = exact_rows(q[rows], k, v, visible, torch.float64)
    same = exact_rows(q[rows], k, v, visible, q.dtype)
    return as_exact_as([exact], [same], lambda result: [result[rows]])


def forward(name: str, mask: DiffusionMask, dtype: torch.dtype, settings: Settings) -> Case:
    q, k, v = inputs(mask.num_queries, dtype)
    bias = additive(mask, dtype)
    variants = [
        *backends(OP, lambda backend: block_attention(q, k, v, mask, backend=backend)),
        Variant("SDPA, dense mask", lambda: sdpa(q, k, v, bias)),
        Variant("SDPA unmasked", lambda: sdpa(q, k, v, None), "yardstick", flops=4.0 * MINI["D"] * MINI["Hq"] * len(q) * len(k)),
    ]
    variants += flex_variant(q, k, v, mask, settings)
    return Case("block_attention", name, dtype, shapes(mask), variants, check_rows(q, k, v, mask), flops(mask), element_bytes(q, k, v, q))


def flex_variant(q: Tensor, k: Tensor, v: Tensor, mask: DiffusionMask, settings: Settings) -> list[Variant]:
    """FlexAttention, of a full run alone: compiling it takes up to a minute."""
    call = flex(q, k, v, mask)
    return [] if settings.quick else [Variant("FlexAttention", call, prepare=call)]


def forward_backward(name: str, mask: DiffusionMask, dtype: torch.dtype) -> Case:
    leaves = inputs(mask.num_queries, dtype)
    grad = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    bias = additive(mask, dtype)
    wider = torch.float32 if dtype == torch.bfloat16 else torch.float64
    exact_bias = additive(mask, wider)
    exact = with_gradients(lambda q, k, v: sdpa(q, k, v, exact_bias), tuple(x.to(wider) for x in leaves), grad)
    dense = partial(with_gradients, lambda q, k, v: sdpa(q, k, v, bias), leaves, grad)
    unmasked = partial(with_gradients, lambda q, k, v: sdpa(q, k, v, None), leaves, grad)
    variants = [
        *backends(OP, lambda backend: with_gradients(lambda q, k, v: block_attention(q, k, v, mask, backend=backend), leaves, grad)),
        Variant("SDPA, dense mask", dense),
        Variant("SDPA unmasked", unmasked, "yardstick", flops=14.0 * MINI["D"] * MINI["Hq"] * mask.num_queries * mask.num_keys),
    ]
    size = element_bytes(*leaves, leaves[0]) * 2
    return Case("block_attention", name, dtype, shapes(mask), variants, as_exact_as(exact, dense()), 3.5 * flops(mask), size)


def packed_forward(name: str, lengths: list[int], dtype: torch.dtype, settings: Settings) -> Case:
    """Many documents in one row: what a dense mask wastes most on."""
    total = sum(lengths)
    mask = DiffusionMask.block_diffusion([0, *accumulate(lengths)], BLOCK)
    q, k, v = inputs(mask.num_queries, dtype)
    bias = additive(mask, dtype)
    starts = [0, *accumulate(lengths)]
    index = [torch.cat([torch.arange(a, b), torch.arange(total + a, total + b)]) for a, b in zip(starts, starts[1:], strict=False)]
    masks = [additive(DiffusionMask.block_diffusion([0, n], BLOCK), dtype) for n in lengths]
    variants = [
        *(b for b in backends(OP, lambda backend: block_attention(q, k, v, mask, backend=backend)) if b.role == "ours"),
        Variant("SDPA, dense mask", lambda: sdpa(q, k, v, bias)),
        Variant("SDPA, document by document", lambda: sdpa_per_document(q, k, v, index, masks)),
        *flex_variant(q, k, v, mask, settings),
    ]
    shown = shapes(mask, documents=len(lengths), lengths="log-normal, sigma 1, seed 1")
    return Case("block_attention", name, dtype, shown, variants, check_rows(q, k, v, mask), flops(mask), element_bytes(q, k, v, q))


def element_bytes(*tensors: Tensor) -> float:
    return float(sum(x.numel() * x.element_size() for x in tensors))


if __name__ == "__main__":
    sys.exit(main("block_attention", cases))
