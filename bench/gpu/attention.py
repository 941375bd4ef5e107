"""Attention on a GPU: training layout (T1), packed documents (T2), determinism (T3), decoding (T4), prefill (T5), memory (T7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, product
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
from . import others
from .inputs import normal, one_kv_head, qkv

__all__ = ["decode", "determinism", "memory", "packed", "prefill", "training"]

BLOCK, DIM = 32, 128
#: A dense mask of (2 * 8192)^2 in bf16 is 512 MiB, beside its scores: longer rows are not tried.
DENSE_LIMIT = 8192
#: The backward of the reference keeps the scores of all pairs and what it made of them: at 16 heads and (2 * 4096)^2 in fp32 4.3 GB each.
REFERENCE_LIMIT = 4096
#: The reference of decoding holds fp32 scores of 512 queries and the keys of all rows at a time: 32 rows of 8192 would be 9 GB.
REFERENCE_SCORES = 1 << 31

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def training(settings: Settings) -> Iterator[Case]:
    """T1: one document, [x_t ; x_0]."""
    lengths = [64] if settings.quick else [8192, 2048, 4096, 32768, 1024, 16384]
    for heads, kv_heads in ((16, 4), (32, 4)):
        for length in lengths if heads == 16 else lengths[:1]:
            mask = DiffusionMask.block_diffusion([0, length], BLOCK).to(settings.device)
            for kind in ("forward", "backward"):
                if settings.wants(name := f"{heads}:{kv_heads}, {length} tokens, {kind}"):
                    yield attention("T1", name, mask, heads, kv_heads, kind, settings, [length], {"length": length})


def packed(settings: Settings) -> Iterator[Case]:
    """T2: log-normal documents (sigma 1) in one row."""
    shapes = [(128, 32)] if settings.quick else [(8192, 1024), (8192, 512), (8192, 2048), (32768, 1024)]
    for total, mean in shapes:
        lengths = random_document_lengths(total, mean, seed=1, multiple=BLOCK)
        mask = DiffusionMask.block_diffusion([0, *accumulate(lengths)], BLOCK).to(settings.device)
        for kind in ("forward", "backward"):
            if settings.wants(name := f"16:4, {total} tokens, documents of mean {mean}, {kind}"):
                yield attention("T2", name, mask, 16, 4, kind, settings, lengths, {"lengths": lengths})


def prefill(settings: Settings) -> Iterator[Case]:
    """T5: block-causal attention of a prompt."""
    for length in [64] if settings.quick else [8192, 2048, 32768]:
        mask = DiffusionMask.block_causal([0, length], BLOCK).to(settings.device)
        if settings.wants(name := f"16:4, block-causal {length}, forward"):
            yield attention("T5", name, mask, 16, 4, "forward", settings, [length], {"length": length})


def determinism(settings: Settings) -> Iterator[Case]:
    """T3: are the bits the same over 100 runs of forward and backward, and what does that cost? Ours has no other way."""
    total, mean = (96, 40) if settings.quick else (8192, 1024)
    for what, lengths in {"one document": [total], f"documents of mean {mean}": random_document_lengths(total, mean, 1, BLOCK)}.items():
        if not settings.wants(name := f"16:4, {total} tokens, {what}, forward+backward"):
            continue
        mask = DiffusionMask.block_diffusion([0, *accumulate(lengths)], BLOCK).to(settings.device)
        leaves = tuple(x.requires_grad_() for x in qkv(settings.device, settings.dtype, mask.num_queries, 16, 4, DIM))
        grad = normal(settings.device, settings.dtype, mask.num_queries, 16, DIM, seed=9)
        part = tuple(x[:total].detach().requires_grad_() for x in leaves)
        each = 3.5 * 4.0 * DIM * 16

        def causal(call: Call, part: tuple[Tensor, ...] = part, grad: Tensor = grad) -> Callable[[], Any]:
            return both_of(call, part, grad)

        ours = both_of(lambda q, k, v, m=mask: block_attention(q, k, v, m), leaves, grad)  # type: ignore[misc]
        variants = [
            Variant("ours", ours, "ours"),
            Variant("FlexAttention, blocks of 128", both_of(flex(mask, 128, settings), leaves, grad)),
        ]
        run = causal(lambda q, k, v: cudnn(q, k, v, True, settings))
        variants.append(Variant(f"cuDNN causal at {total}", run, "yardstick", flops=each * causal_pairs([total])))
        for generation, strict in product((2, 3), (True, False)):
            flops = each * causal_pairs(lengths)
            variants += others.some(others.flash_causal(generation, lengths, causal, flops, settings, deterministic=strict))
        for variant in variants:
            variant.extra = partial(repeats, variant.run, settings)
        shapes = {"lengths": lengths, "heads": "16:4", "head_dim": DIM, "block": BLOCK}
        yield Case("T3 determinism", name, settings.dtype, shapes, variants, finite, each * mask.visible_pairs(), None)


def repeats(run: Callable[[], tuple[Tensor, ...]], settings: Settings) -> dict[str, int]:
    """How many runs gave other bits than the first."""
    runs = 3 if settings.quick else 100
    first = run()
    different = sum(not all(torch.equal(a, b) for a, b in zip(run(), first, strict=True)) for _ in range(runs - 1))
    return {"runs": runs, "different_runs": different}


def attention(
    table: str, name: str, mask: DiffusionMask, heads: int, kv_heads: int, kind: str, settings: Settings, lengths: list[int],
    shapes: dict[str, Any],
) -> Case:  # fmt: skip
    """Forward, or backward alone (2.5 times the FLOPs of the forward, as the field counts), over documents of the given lengths."""
    dtype, device = settings.dtype, settings.device
    tokens = mask.num_queries
    leaves = qkv(device, dtype, tokens, heads, kv_heads, DIM)
    backward = kind == "backward"
    if backward:
        leaves = tuple(x.requires_grad_() for x in leaves)  # type: ignore[assignment]
    grad = normal(device, dtype, tokens, heads, DIM, seed=9) if backward else None
    flops = 4.0 * DIM * heads * mask.visible_pairs() * (2.5 if backward else 1.0)

    def way(call: Call, inputs: tuple[Tensor, ...] = leaves) -> Callable[[], Any]:
        return forward_of(call, inputs) if grad is None else backward_of(call, inputs, grad)

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
    if mask.num_keys <= 2 * (REFERENCE_LIMIT if backward else DENSE_LIMIT):
        variants.append(Variant("reference", way(lambda q, k, v: block_attention(q, k, v, mask, backend="reference"))))
    count = sum(lengths)  # in the training layout half of the tokens: the other half is what they attend to
    part = tuple(x[:count].detach().requires_grad_(backward) for x in leaves)
    each = 4.0 * DIM * heads * (2.5 if backward else 1.0)
    for what, pairs in {"full": count**2, "causal": causal_pairs([count])}.items():
        run = way(lambda q, k, v, causal=what == "causal": cudnn(q, k, v, causal, settings), part)  # type: ignore[misc]
        variants.append(Variant(f"cuDNN {what} at {count}", run, "yardstick", flops=each * pairs))
    for generation in (2, 3):
        packed_flops = each * causal_pairs(lengths)
        variants += others.some(others.flash_causal(generation, lengths, lambda call: way(call, part), packed_flops, settings))
    groups = heads // kv_heads

    def pick(result: Any) -> list[Tensor]:
        tensors = as_list(result)
        if backward:
            return [tensors[0][:, :groups], tensors[1][:, 0], tensors[2][:, 0]]
        return [tensors[0][:, :groups]]

    exact, same = ([x for x in one_kv_head(*leaves, mask, grad, d)] for d in (torch.float32, dtype))
    check = as_exact_as(exact[backward:], same[backward:], pick)
    more = {
        "heads": f"{heads}:{kv_heads}", "head_dim": DIM, "block": BLOCK, "visible_pairs": mask.visible_pairs(), "documents": len(lengths),
    }  # fmt: skip
    return Case(f"{table} attention", name, dtype, {**shapes, **more}, variants, check, flops, None)


def causal_pairs(lengths: list[int]) -> int:
    """Query-key pairs of causal attention within documents."""
    return sum(n * (n + 1) // 2 for n in lengths)


def forward_of(call: Call, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """A forward that keeps nothing for a backward."""

    def run() -> Tensor:
        with torch.no_grad():
            return call(*inputs)

    return run


def backward_of(call: Call, inputs: tuple[Tensor, ...], grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """The backward alone: the forward runs once, when this is first called. Of fewer queries than ``grad`` has the first are meant."""
    state: list[Tensor] = []

    def run() -> tuple[Tensor, ...]:
        if not state:
            state.append(call(*inputs))
        return torch.autograd.grad(state[0], inputs, grad[: len(state[0])], retain_graph=True)

    return run


def both_of(call: Call, inputs: tuple[Tensor, ...], grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward: the output and the gradients of the inputs."""

    def run() -> tuple[Tensor, ...]:
        out = call(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, grad[: len(out)])

    return run


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


def flex_decode(q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Callable[[], Tensor]:
    """FlexAttention of [R, heads, n, D] without a mask."""
    state: dict[str, Any] = {}

    def run() -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        if not state:
            state["call"] = torch.compile(flex_attention, dynamic=False) if settings.device.type == "cuda" else flex_attention
        with torch.no_grad():
            return state["call"](q, k, v, enable_gqa=True).transpose(1, 2).flatten(0, 1)

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
    # What others attend to: the new keys lie in a page of their own behind the context.
    keys, values = (torch.cat([c, n.view(rows, BLOCK, kv_heads, DIM)]) for c, n in ((cache_k, k_new), (cache_v, v_new)))
    own_pages = torch.arange(rows * pages, rows * (pages + 1), dtype=torch.int32, device=device)[:, None]
    cached = others.Cached(q, (keys, values), torch.cat([page_table, own_pages], 1))
    whole_k, whole_v = (x.transpose(1, 2) for x in cached.contiguous())
    queries = cached.queries.transpose(1, 2)

    def contiguous() -> Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(queries, whole_k, whole_v, enable_gqa=True)
        return out.transpose(1, 2).reshape(tokens, heads, DIM)

    def exact(kind: torch.dtype) -> Tensor:
        groups = heads // kv_heads
        scores = queries.to(kind) @ whole_k.to(kind).repeat_interleave(groups, 1).mT * DIM**-0.5
        return (scores.softmax(-1) @ whole_v.to(kind).repeat_interleave(groups, 1)).transpose(1, 2).reshape(tokens, heads, DIM)

    def ours(backend: str | None) -> Tensor:
        return cached_block_attention(q, k_new, v_new, cache_k, cache_v, page_table, mask, backend=backend)

    variants = [Variant("triton", lambda: ours("triton"), "ours", capture=True)]
    if settings.quick:
        variants.append(Variant("native", lambda: ours(None), "ours"))
    variants.append(Variant("SDPA, contiguous cache", contiguous, capture=True))
    if (heads, rows, context) == (16, 1, 8192) or settings.quick:  # compiling takes half a minute
        variants.append(Variant("FlexAttention, contiguous cache", flex_decode(queries, whole_k, whole_v, settings), capture=True))
    if 4 * min(512, tokens) * rows * context * heads <= REFERENCE_SCORES:
        variants.append(Variant("reference", lambda: ours("reference")))
    variants += others.some(
        others.flash_decode(2, cached, settings),
        others.flash_decode(3, cached, settings),
        others.flash_decode(3, cached, settings, paged=True),
        others.flashinfer_decode(cached, settings),
    )
    size = 2.0 * rows * context * kv_heads * DIM * q.element_size()
    shapes = {"rows": rows, "new_tokens": BLOCK, "context": context, "heads": f"{heads}:{kv_heads}", "head_dim": DIM, "page": BLOCK}
    flops = 4.0 * DIM * heads * rows * BLOCK * (context + BLOCK)
    check = as_exact_as([exact(torch.float32)], [exact(dtype)])
    return Case("T4 decode", name, dtype, shapes, variants, check, flops, size)


def memory(settings: Settings) -> Iterator[Case]:
    """T7: peak memory of attention forward and backward above its inputs: ours, SDPA with a dense mask, the reference (unfused)."""
    for length in [64] if settings.quick else [4096, 8192, 32768]:
        if not settings.wants(name := f"16:4, {length} tokens, forward+backward"):
            continue
        mask = DiffusionMask.block_diffusion([0, length], BLOCK).to(settings.device)
        leaves = tuple(x.requires_grad_() for x in qkv(settings.device, settings.dtype, mask.num_queries, 16, 4, DIM))
        grad = normal(settings.device, settings.dtype, mask.num_queries, 16, DIM, seed=9)
        calls: dict[str, Call] = {"ours": lambda q, k, v, m=mask: block_attention(q, k, v, m)}  # type: ignore[misc]
        if length <= DENSE_LIMIT:
            calls["SDPA, dense mask"] = lambda q, k, v, m=mask: sdpa(q, k, v, additive(m, q.dtype))  # type: ignore[misc]
        if length <= REFERENCE_LIMIT:
            calls["reference"] = lambda q, k, v, m=mask: block_attention(q, k, v, m, backend="reference")  # type: ignore[misc]
        variants = []
        for what, call in calls.items():
            run = both_of(call, leaves, grad)
            variants.append(Variant(what, run, "ours" if what == "ours" else "baseline", extra=partial(peak, run, settings)))
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
