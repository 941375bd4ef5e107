"""Kernels of other projects, where they are installed: what their users would run in the place of ours.

Each function makes a variant out of one package's call, as documented in the version that its docstring names, or returns None where the
package is not installed. A package is imported at the first, guarded call: one that cannot be loaded, or that refuses the call, has a row
that says why, and takes no other variant with it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from llada_kernels.ops import Routing

from ..harness import Settings, Variant

__all__ = [
    "PACKAGES", "Cached", "deep_gemm", "flash_causal", "flash_decode", "flashinfer_decode", "flashinfer_softmax", "grouped_gemm_package",
    "liger_loss", "some", "sonic_experts", "versions", "vllm_experts",
]  # fmt: skip

#: What the names of a package's variants begin with, and what is imported.
PACKAGES = {
    "FlashAttention 2": "flash_attn",
    "FlashAttention 3": "flash_attn_interface",
    "FlashInfer": "flashinfer",
    "vLLM": "vllm",
    "SonicMoE": "sonicmoe",
    "grouped_gemm": "grouped_gemm",
    "DeepGEMM": "deep_gemm",
    "Liger": "liger_kernel",
}
#: FlashInfer's own recommendation.
FLASHINFER_WORKSPACE = 128 << 20

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Experts = Callable[[Tensor, Routing, Any, Any], Tensor]


def some(*variants: Variant | None) -> list[Variant]:
    """Those that there are."""
    return [v for v in variants if v is not None]


def installed(label: str, settings: Settings) -> bool:
    """Whether a package can be tried, found without importing it."""
    module = PACKAGES[label]
    return module not in settings.without and (module in sys.modules or importlib.util.find_spec(module) is not None)


def versions(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    """The version of each package that has a time in ``rows``."""
    timed = [row["variant"] for row in rows if "seconds" in row]
    return {label: version(module) for label, module in PACKAGES.items() if any(name.startswith(label) for name in timed)}


def version(module: str) -> str:
    """Of an imported module: what it says itself, or what its distribution says."""
    stated = getattr(sys.modules.get(module), "__version__", None)
    if isinstance(stated, str):
        return stated
    names = metadata.packages_distributions().get(module, [])
    return metadata.version(names[0]) if names else "unknown"


def flash_causal(
    generation: int,
    lengths: list[int],
    way: Callable[[Attention], Callable[[], Any]],
    flops: float,
    settings: Settings,
    deterministic: bool | None = None,
) -> Variant | None:
    """Causal attention of packed documents: a yardstick, as no argument of it describes the block-diffusion mask.

    ``flash_attn_varlen_func`` of flash_attn 2.8 or of flash_attn_interface 3.0 (FlashAttention 3).

    Args:
        lengths: of the documents; q, k and v [sum(lengths), heads, D].
        way: makes a call without arguments of a call on q, k and v.
        flops: of that call.
        deterministic: of the backward; None: the package's default (not), and no word of it in the variant's name.
    """
    label = f"FlashAttention {generation}"
    if not installed(label, settings):
        return None
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=settings.device)
    longest = max(lengths)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        function = importlib.import_module(PACKAGES[label]).flash_attn_varlen_func
        out = function(q, k, v, offsets, offsets, longest, longest, causal=True, deterministic=bool(deterministic))
        return out[0] if isinstance(out, tuple) else out  # early releases of FlashAttention 3 returned the log-sum-exp as well

    kind = {None: "", True: ", deterministic", False: ", not deterministic"}[deterministic]
    return Variant(f"{label} causal{kind}", way(call), "yardstick", flops=flops)


@dataclass(frozen=True)
class Cached:
    """A block of queries per row, and what it sees: all keys of its row, new ones among them, so that no mask is needed.

    Attributes:
        q: [R * n, Hq, D].
        pages: keys and values, each [P, page, Hkv, D]; all pages of a row are full.
        table: int32 [R, pages of a row].
    """

    q: Tensor
    pages: tuple[Tensor, Tensor]
    table: Tensor

    @property
    def queries(self) -> Tensor:
        """[R, n, Hq, D]."""
        return self.q.unflatten(0, (len(self.table), -1))

    @property
    def length(self) -> int:
        """Keys of a row."""
        return self.table.shape[1] * self.pages[0].shape[1]

    def contiguous(self) -> tuple[Tensor, Tensor]:
        """Keys and values without pages, each [R, length, Hkv, D]."""
        keys, values = (x[self.table.long()].flatten(1, 2) for x in self.pages)
        return keys, values


def flash_decode(generation: int, cached: Cached, settings: Settings, paged: bool = False) -> Variant | None:
    """``flash_attn_with_kvcache`` of flash_attn 2.8 or of flash_attn_interface 3.0, over a contiguous cache or over our pages.

    The former wants pages of a multiple of 256 keys: ours are for the latter only.
    """
    label = f"FlashAttention {generation}"
    if not installed(label, settings):
        return None
    lengths = torch.full((len(cached.table),), cached.length, dtype=torch.int32, device=settings.device)
    keys, values = cached.pages if paged else cached.contiguous()
    table = {"page_table": cached.table} if paged else {}

    def run() -> Tensor:
        function = importlib.import_module(PACKAGES[label]).flash_attn_with_kvcache
        with torch.no_grad():
            out: Tensor = function(cached.queries, keys, values, cache_seqlens=lengths, causal=False, **table)
        return out.flatten(0, 1)

    return Variant(f"{label}, {'paged' if paged else 'contiguous'} cache", run, capture=True)


def flashinfer_decode(cached: Cached, settings: Settings) -> Variant | None:
    """``BatchPrefillWithPagedKVCacheWrapper`` of FlashInfer 0.6, planned once, as for all layers of a step."""
    if not installed("FlashInfer", settings):
        return None
    held: list[Any] = []

    def plan() -> None:
        workspace = torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=settings.device)
        wrapper = importlib.import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        (rows, per_row), (_, page, kv_heads, dim) = cached.table.shape, cached.pages[0].shape
        steps = torch.arange(rows + 1, dtype=torch.int32, device=settings.device)
        last = torch.full((rows,), page, dtype=torch.int32, device=settings.device)
        wrapper.plan(
            steps * (len(cached.q) // rows), steps * per_row, cached.table.flatten(), last, cached.q.shape[1], kv_heads, dim, page,
            causal=False, q_data_type=cached.q.dtype,
        )  # fmt: skip
        held.append(wrapper)

    def run() -> Tensor:
        out: Tensor = held[0].run(cached.q, cached.pages)
        return out

    return Variant("FlashInfer, paged cache", run, prepare=plan, capture=True)


def flashinfer_softmax(logits: Tensor, settings: Settings) -> Variant | None:
    """``sampling.softmax`` of FlashInfer 0.6 and the largest probability: the confidence of each position, without the decision."""
    if not installed("FlashInfer", settings):
        return None

    def run() -> tuple[Tensor, Tensor]:
        probabilities = importlib.import_module("flashinfer.sampling").softmax(logits.flatten(0, 1))
        confidence, choice = probabilities.max(-1)
        return confidence.view(logits.shape[:2]), choice.view(logits.shape[:2])

    return Variant("FlashInfer softmax + max", run, capture=True)


def vllm_experts(way: Callable[[Experts], Callable[[], Tensor]], settings: Settings) -> Variant | None:
    """``fused_experts`` of vLLM 0.11: its Triton kernels, with the configuration that it holds for this GPU and shape, if any."""
    if not installed("vLLM", settings):
        return None

    def call(x: Tensor, routing: Routing, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
        function = importlib.import_module("vllm.model_executor.layers.fused_moe").fused_experts
        out: Tensor = function(x, w_gate_up, w_down, routing.topk_weights, routing.topk_ids.to(torch.int32))
        return out

    return Variant("vLLM fused_experts", way(call), capture=True)


class Interleaved:
    """The gradient of weights whose rows are gate and up in turn, an expert at a time in our order: all gates, then all ups."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def __getitem__(self, expert: int) -> Tensor:
        weights = self.weights[expert]
        return torch.cat([weights[::2], weights[1::2]])


def interleave(w_gate_up: Tensor) -> Tensor:
    """[E, 2I, H], all gates and then all ups of an expert, as gate and up in turn."""
    return torch.stack(w_gate_up.chunk(2, 1), 2).flatten(1, 2)


def sonic_experts(
    way: Callable[[Experts, tuple[Tensor, Tensor]], Callable[[], Any]], routing: Routing, pair: tuple[Tensor, Tensor], settings: Settings
) -> Variant | None:
    """``moe_general_routing_inputs`` of SonicMoE 0.0.1 (Hopper): a given routing, its metadata made anew at each call as there.

    Its weights are views [2I, H, E] and [H, I, E] of expert-major memory, gate and up rows in turn; they are laid out so before the first
    call, and the gradient is put back into our order where it is looked at.
    """
    if not installed("SonicMoE", settings):
        return None
    held: list[Callable[[], Any]] = []

    def prepare() -> None:
        functional = importlib.import_module("sonicmoe.functional")
        swiglu = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
        stream = torch.cuda.current_stream().cuda_stream if settings.device.type == "cuda" else 0
        count, top_k = routing.topk_ids.shape
        tokens = torch.arange(count, dtype=torch.int32, device=settings.device).repeat_interleave(top_k)
        experts = routing.topk_ids.flatten().to(torch.int32)

        def call(x: Tensor, routing: Routing, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
            out, _ = functional.moe_general_routing_inputs(
                x, routing.topk_weights.flatten(), tokens, experts, w_gate_up.permute(1, 2, 0), None, w_down.permute(1, 2, 0), None,
                len(w_down), stream, swiglu, not torch.is_grad_enabled(),
            )  # fmt: skip
            return out

        held.append(way(call, (interleave(pair[0]), pair[1])))

    def run() -> Any:
        result = held[0]()
        return result if isinstance(result, Tensor) else (*result[:2], Interleaved(result[2]), *result[3:])

    return Variant("SonicMoE", run, prepare=prepare)


def grouped_gemm_package(a: Tensor, b: Tensor, counts: list[int], settings: Settings) -> Variant | None:
    """``ops.gmm`` of grouped_gemm 0.1.6 (what MegaBlocks runs); counts on the CPU, which all of its builds take."""
    if not installed("grouped_gemm", settings):
        return None
    sizes = torch.tensor(counts, dtype=torch.int64)

    def run() -> Tensor:
        out: Tensor = importlib.import_module("grouped_gemm.ops").gmm(a, b, sizes, trans_b=True)
        return out

    return Variant("grouped_gemm gmm", run)


def deep_gemm(a: Tensor, b: Tensor, counts: list[int], settings: Settings) -> Variant | None:
    """``m_grouped_bf16_gemm_nt_contiguous`` of DeepGEMM 2.6 (Hopper and Blackwell, bf16; groups of a multiple of 128 rows)."""
    if not installed("DeepGEMM", settings):
        return None
    expert_of_row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(settings.device, torch.int32)

    def run() -> Tensor:
        out = a.new_empty(a.shape[0], b.shape[1])
        importlib.import_module("deep_gemm").m_grouped_bf16_gemm_nt_contiguous(a, b, out, expert_of_row)
        return out

    return Variant("DeepGEMM m_grouped_bf16", run)


def liger_loss(
    targets: Tensor, gradients: Callable[[Callable[[Tensor, Tensor], Tensor]], Callable[[], Any]], settings: Settings
) -> Variant | None:
    """``LigerFusedLinearCrossEntropyLoss`` of liger_kernel 0.8, sums of gradients in fp32."""
    if not installed("Liger", settings):
        return None

    def call(hidden: Tensor, lm_head: Tensor) -> Tensor:
        transformers = importlib.import_module("liger_kernel.transformers")
        loss = transformers.LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
        return loss(lm_head, hidden, targets)

    return Variant("Liger fused linear cross entropy", gradients(call))
