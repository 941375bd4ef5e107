"""Attention on a GPU: training layout (T1), packed documents (T2), decoding (T4), prefill (T5), memory of a layer (T7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llada_kernels.masks import DiffusionMask
from llada_kernels.ops.block_attention import block_attention
from llada_kernels.ops.cached_block_attention import cached_block_attention
from llada_kernels.testing import random_document_lengths

from ..attention_baselines import additive, sdpa
from ..checks import as_exact_as, as_list
from ..harness import Case, Settings, Variant
from .inputs import normal, one_kv_head, qkv

__all__ = ["decode", "memory", "packed", "prefill", "training"]

BLOCK, DIM = 32, 128
#: A dense mask of (2 * 8192)^2 in bf16 is 512 MiB, beside its scores: longer rows are not tried.
DENSE_LIMIT = 8192


def training(settings: Settings) -> Iterator[Case]:
    """T1: one document, [x_t ; x_0]."""
    lengths = [64] if settings.quick else [8192, 2048, 4096, 32768, 1024, 16384]
    for heads, kv_heads in ((16, 4), (32, 4)):
        for length in lengths if heads == 16 else lengths[:1]:
            mask = DiffusionMask.block_diffusion([0, length], BLOCK).to(settings.device)
            for kind in ("forward", "backward"):
                if settings.wants(name := f"{heads}:{kv_heads}, {length} tokens, {kind}"):
                    yield attention("T1", name, mask, heads, kv_heads, kind, settings, {"documents": 1, "length": length})


def packed(settings: Settings) -> Iterator[Case]:
    """T2: log-normal documents (sigma 1) in one row."""
    shapes = [(128, 32)] if settings.quick else [(8192, 1024), (8192, 512), (8192, 2048), (32768, 1024)]
    for total, mean in shapes:
        lengths = random_document_lengths(total, mean, seed=1, multiple=BLOCK)
        mask = DiffusionMask.block_diffusion([0, *accumulate(lengths)], BLOCK).to(settings.device)
        for kind in ("forward", "backward"):
            if settings.wants(name := f"16:4, {total} tokens, documents of mean {mean}, {kind}"):
                yield attention("T2", name, mask, 16, 4, kind, settings, {"documents": len(lengths), "lengths": lengths})


def prefill(settings: Settings) -> Iterator[Case]:
    """T5: block-causal attention of a prompt."""
    for length in [64] if settings.quick else [8192, 2048, 32768]:
        mask = DiffusionMask.block_causal([0, length], BLOCK).to(settings.device)
        if settings.wants(name := f"16:4, block-causal {length}, forward"):
            yield attention("T5", name, mask, 16, 4, "forward", settings, {"length": length})


def attention(
    table: str, name: str, mask: DiffusionMask, heads: int, kv_heads: int, kind: str, settings: Settings, shapes: dict[str, Any]
) -> Case:
    """Forward, or backward alone (2.5 times the FLOPs of the forward, as the field counts)."""
    dtype, device = settings.dtype, settings.device
    tokens = mask.num_queries
    leaves = qkv(device, dtype, tokens, heads, kv_heads, DIM)
    backward = kind == "backward"
    if backward:
        leaves = tuple(x.requires_grad_() for x in leaves)  # type: ignore[assignment]
    grad = normal(device, dtype, tokens, heads, DIM, seed=9) if backward else None
    flops = 4.0 * DIM * heads * mask.visible_pairs() * (2.5 if backward else 1.0)

    def way(call: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: tuple[Tensor, ...] = leaves) -> Callable[[], Any]:
        if not backward:

            def forward() -> Tensor:
                with torch.no_grad():
                    return call(*inputs)

            return forward
        state: list[Tensor] = []

        def gradients() -> tuple[Tensor, ...]:
            if not state:  # the forward runs once, when the variant is first called
                state.append(call(*inputs))
            out = state[0]
            return torch.autograd.grad(out, inputs, grad if out.shape == leaves[0].shape else torch.ones_like(out), retain_graph=True)

        return gradients

    variants = [Variant("triton", way(lambda q, k, v: block_attention(q, k, v, mask, backend="triton")), "ours")]
    if settings.quick:  # on a CPU: the backend that serves there
        variants.append(Variant("native", way(lambda q, k, v: block_attention(q, k, v, mask)), "ours"))
    for size in (128, 64) if mask.num_keys == 2 * 8192 else (128,):  # compiling each takes half a minute
        variants.append(Variant(f"FlexAttention, blocks of {size}", way(flex(mask, size, settings))))
    if mask.num_keys <= 2 * DENSE_LIMIT:
        bias: list[Tensor] = []

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if not bias:
                bias.append(additive(mask, dtype))
            return sdpa(q, k, v, bias[0])

        variants.append(Variant("SDPA, dense mask", way(dense)))
    half = tuple(x[: tokens // 2].detach().requires_grad_(backward) for x in leaves)
    pairs = {"full": len(half[0]) ** 2, "causal": len(half[0]) * (len(half[0]) + 1) // 2}
    for what, count in pairs.items():
        run = way(lambda q, k, v, causal=what == "causal": cudnn(q, k, v, causal, settings), half)  # type: ignore[misc]
        work = 4.0 * DIM * heads * count * (2.5 if backward else 1.0)
        variants.append(Variant(f"cuDNN {what} at {len(half[0])}", run, "yardstick", flops=work))
    groups = heads // kv_heads

    def pick(result: Any) -> list[Tensor]:
        tensors = as_list(result)
        if backward:
            return [tensors[0][:, :groups], tensors[1][:, 0], tensors[2][:, 0]]
        return [tensors[0][:, :groups]]

    exact, same = ([x for x in one_kv_head(*leaves, mask, grad, d)] for d in (torch.float32, dtype))
    check = as_exact_as(exact[backward:], same[backward:], pick)
    more = {"heads": f"{heads}:{kv_heads}", "head_dim": DIM, "block": BLOCK, "visible_pairs": mask.visible_pairs()}
    return Case(f"{table} attention", name, dtype, {**shapes, **more}, variants, check, flops, None)


def cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, settings: Settings) -> Tensor:
    """The ceiling: cuDNN's own attention over half of the tokens, full or causal."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    backend = SDPBackend.CUDNN_ATTENTION if settings.device.type == "cuda" else SDPBackend.MATH
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)[0].transpose(0, 1)


def flex(mask: DiffusionMask, size: int, settings: Settings) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention with a BlockMask that is built once; compiled on a GPU, plain PyTorch in a dry run."""
    state: dict[str, Any] = {}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if not state:
            compiled = settings.device.type == "cuda"
            if compiled:  # gradients are asked for more than once of the same forward
                import torch._functorch.config

                torch._functorch.config.donated_buffer = False
            make: Any = torch.compile(create_block_mask) if compiled and mask.num_keys > 32768 else create_block_mask
            visible = mask.mask_mod()
            state["mask"] = make(visible, None, None, mask.num_queries, mask.num_keys, device=q.device, BLOCK_SIZE=size)
            state["call"] = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
        q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
        return state["call"](q, k, v, block_mask=state["mask"], enable_gqa=True)[0].transpose(0, 1)

    return run


def decode(settings: Settings) -> Iterator[Case]:
    """T4: a denoising step of one block per row over a cached context."""
    full = [(16, 1, 8192), (32, 1, 8192), (16, 1, 1024), (16, 1, 32768), (16, 8, 8192), (16, 32, 8192)]
    for heads, rows, context in [(16, 1, 64)] if settings.quick else full:
        if settings.wants(name := f"{heads}:4, {rows} rows, context {context}"):
            yield decode_case(name, heads, rows, context, settings)


def decode_case(name: str, heads: int, rows: int, context: int, settings: Settings) -> Case:
    dtype, device, kv_heads = settings.dtype, settings.device, 4
    tokens, pages = rows * BLOCK, context // BLOCK
    q, k_new, v_new = qkv(device, dtype, tokens, heads, kv_heads, DIM)
    cache_k, cache_v = (normal(device, dtype, rows * pages, BLOCK, kv_heads, DIM, seed=s) for s in (5, 6))
    page_table = torch.randperm(rows * pages, generator=torch.Generator().manual_seed(3)).view(rows, pages).to(device, torch.int32)
    mask = DiffusionMask.cached([context] * rows, [BLOCK] * rows, BLOCK).to(device)
    whole = [
        torch.cat([c[page_table.long()].flatten(1, 2), n.view(rows, BLOCK, kv_heads, DIM)], 1).transpose(1, 2)
        for c, n in ((cache_k, k_new), (cache_v, v_new))
    ]
    queries = q.view(rows, BLOCK, heads, DIM).transpose(1, 2)

    def contiguous() -> Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(queries, *whole, enable_gqa=True)
        return out.transpose(1, 2).reshape(tokens, heads, DIM)

    def exact(kind: torch.dtype) -> Tensor:
        groups = heads // kv_heads
        scores = queries.to(kind) @ whole[0].to(kind).repeat_interleave(groups, 1).mT * DIM**-0.5
        return (scores.softmax(-1) @ whole[1].to(kind).repeat_interleave(groups, 1)).transpose(1, 2).reshape(tokens, heads, DIM)

    def ours(backend: str | None) -> Tensor:
        return cached_block_attention(q, k_new, v_new, cache_k, cache_v, page_table, mask, backend=backend)

    variants = [Variant("triton", lambda: ours("triton"), "ours", capture=True)]
    if settings.quick:
        variants.append(Variant("native", lambda: ours(None), "ours"))
    variants.append(Variant("SDPA, contiguous cache", contiguous, capture=True))
    size = 2.0 * rows * context * kv_heads * DIM * q.element_size()
    shapes = {"rows": rows, "new_tokens": BLOCK, "context": context, "heads": f"{heads}:{kv_heads}", "head_dim": DIM, "page": BLOCK}
    flops = 4.0 * DIM * heads * rows * BLOCK * (context + BLOCK)
    check = as_exact_as([exact(torch.float32)], [exact(dtype)])
    return Case("T4 decode", name, dtype, shapes, variants, check, flops, size)


def memory(settings: Settings) -> Iterator[Case]:
    """T7: peak memory of attention forward and backward above its inputs, ours and SDPA with a dense mask."""
    for length in [64] if settings.quick else [4096, 8192, 32768]:
        if not settings.wants(name := f"16:4, {length} tokens, forward+backward"):
            continue
        mask = DiffusionMask.block_diffusion([0, length], BLOCK).to(settings.device)
        leaves = tuple(x.requires_grad_() for x in qkv(settings.device, settings.dtype, mask.num_queries, 16, 4, DIM))

        def both(call: Callable[..., Tensor], leaves: tuple[Tensor, ...] = leaves) -> tuple[Tensor, ...]:
            out = call(*leaves)
            return torch.autograd.grad(out, leaves, torch.ones_like(out))

        def ours(mask: DiffusionMask = mask, both: Any = both) -> Any:
            return both(lambda q, k, v: block_attention(q, k, v, mask))

        def dense(mask: DiffusionMask = mask, both: Any = both) -> Any:
            return both(lambda q, k, v: sdpa(q, k, v, additive(mask, q.dtype)))

        variants = [Variant("ours", ours, "ours", extra=lambda run=ours: peak(run, settings))]  # type: ignore[misc]
        if length <= DENSE_LIMIT:
            variants.append(Variant("SDPA, dense mask", dense, extra=lambda run=dense: peak(run, settings)))  # type: ignore[misc]
        flops = 3.5 * 4.0 * DIM * 16 * mask.visible_pairs()
        yield Case("T7 memory", name, settings.dtype, {"length": length, "heads": "16:4"}, variants, finite, flops, None)


def finite(result: Any) -> str | None:
    """Values are checked in T1; here only that there are some."""
    return None if all(bool(x.isfinite().all()) for x in as_list(result)) else "values that are not finite"


def peak(run: Callable[[], Any], settings: Settings) -> dict[str, Any]:
    """Bytes above what was allocated before; nothing on a CPU."""
    if settings.device.type != "cuda":
        run()
        return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before}
