"""cached_block_attention: a denoising step of one block over a long cached context, alone and for several sequences."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llada_kernels.masks import DiffusionMask
from llada_kernels.ops.cached_block_attention import cached_block_attention

from .attention_baselines import exact_rows, sdpa
from .checks import as_exact_as
from .harness import Case, Settings, Variant, backends
from .runner import main
from .shapes import MINI, rotate

OP = importlib.import_module("llada_kernels.ops.cached_block_attention")
BLOCK = 32
DTYPES = (torch.bfloat16, torch.float32)


class Inputs(NamedTuple):
    """One call: new tokens, pages, and the same keys and values one row after the other as a contiguous cache holds them."""

    q: Tensor
    k_new: Tensor
    v_new: Tensor
    cache_k: Tensor
    cache_v: Tensor
    page_table: Tensor
    rows: list[tuple[Tensor, Tensor]]

    def copied(self) -> Inputs:
        q, k_new, v_new, cache_k, cache_v, page_table = (x.clone() for x in self[:6])
        return Inputs(q, k_new, v_new, cache_k, cache_v, page_table, [(k.clone(), v.clone()) for k, v in self.rows])


def cases(settings: Settings) -> Iterator[Case]:
    context = 128 if settings.quick else 4096
    for dtype in DTYPES:
        if settings.wants(name := f"decode {context}", dtype):
            yield decode(name, [context], dtype, settings)
    contexts = [context * (i + 1) // 8 // BLOCK * BLOCK for i in range(8)]
    if settings.wants(name := f"decode 8 rows, {contexts[0]}-{contexts[-1]}", torch.bfloat16):
        yield decode(name, contexts, torch.bfloat16, settings)
    if not settings.quick and settings.wants(name := "decode 16384", torch.bfloat16):
        yield decode(name, [16384], torch.bfloat16, settings)


def decode(name: str, contexts: list[int], dtype: torch.dtype, settings: Settings) -> Case:
    inputs = make(contexts, dtype)
    mask = DiffusionMask.cached(contexts, [BLOCK] * len(contexts), BLOCK)
    cache = 2 * sum(contexts) * MINI["Hkv"] * MINI["D"] * inputs.q.element_size()
    copies = rotate(inputs.copied, 2 * cache, settings.quick)

    def ours(backend: str) -> Tensor:
        i = next(copies)
        return cached_block_attention(i.q, i.k_new, i.v_new, i.cache_k, i.cache_v, i.page_table, mask, backend=backend)

    def by_row(repeat: bool) -> Tensor:
        i = next(copies)
        return torch.cat([sdpa(q, k, v, None, repeat) for q, (k, v) in zip(i.q.split(BLOCK), i.rows, strict=True)])

    exact, same = (exact_all(inputs, kind) for kind in (torch.float64, dtype))
    pairs = sum(BLOCK * (n + BLOCK) for n in contexts)
    shapes = {"rows": len(contexts), "new_tokens": BLOCK, "contexts": contexts, "heads": "16:4", "head_dim": 128, "page": BLOCK}
    return Case(
        "cached_block_attention", name, dtype, shapes,
        [
            *backends(OP, ours),
            Variant("SDPA, repeat_kv", lambda: by_row(True)),
            Variant("SDPA, enable_gqa", lambda: by_row(False)),
        ],
        as_exact_as([exact], [same]), 4.0 * MINI["D"] * MINI["Hq"] * pairs, float(cache),
    )  # fmt: skip


def make(contexts: list[int], dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tokens, kv = BLOCK * len(contexts), (MINI["Hkv"], MINI["D"])
    q, k_new, v_new = normal(tokens, MINI["Hq"], MINI["D"]), normal(tokens, *kv), normal(tokens, *kv)
    needed = [n // BLOCK for n in contexts]
    cache_k, cache_v = normal(sum(needed), BLOCK, *kv), normal(sum(needed), BLOCK, *kv)
    order = torch.randperm(sum(needed), generator=generator).to(torch.int32)  # a cache in use is not in order
    page_table = torch.zeros(len(contexts), max(needed), dtype=torch.int32)
    rows: list[Any] = []
    for r, pages in enumerate(order.split(needed)):
        page_table[r, : len(pages)] = pages
        new = slice(r * BLOCK, (r + 1) * BLOCK)
        rows.append(tuple(torch.cat([c[pages.long()].flatten(0, 1), n[new]]) for c, n in ((cache_k, k_new), (cache_v, v_new))))
    return Inputs(q, k_new, v_new, cache_k, cache_v, page_table, rows)


def exact_all(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    parts = zip(inputs.q.split(BLOCK), inputs.rows, strict=True)
    return torch.cat([exact_rows(q, k, v, torch.ones(len(q), len(k), dtype=torch.bool), dtype) for q, (k, v) in parts])


if __name__ == "__main__":
    sys.exit(main("cached_block_attention", cases))
