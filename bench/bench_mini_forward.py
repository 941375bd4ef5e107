"""The full geometry of LLaDA2.x-mini, 16 billion parameters with random weights, on int4 and int8 experts within 24 GB: a prompt, a block.

Weights are made in the form that they are used in; loading a checkpoint quantises it shard by shard into the same.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llada_kernels import Model
from llada_kernels.generation import KVCache
from llada_kernels.nn.moe import MoE, QuantizedWeight
from llada_kernels.ops import QuantizedExperts, threshold_unmask

from .harness import Case, Settings, Variant
from .moe_baselines import exact_tokens
from .runner import main
from .shapes import bench_config, mini_config, pool_model
from .train_steps import forget_peak, resident

BLOCK, STEPS = 32, 8
KINDS = ("int4", "int8")
#: of the memory of a machine: what a case says it needs must be there before it starts
HEADROOM = 1.5e9


def cases(settings: Settings) -> Iterator[Case]:
    prompt = 64 if settings.quick else 512
    for kind in KINDS:
        held = Held(kind, settings.quick)
        if settings.wants(name := f"prompt of {prompt} tokens, {kind} experts", torch.bfloat16):
            yield reading(name, held, prompt)
        if settings.wants(name := f"block of {BLOCK} at context {prompt}, {STEPS} steps, {kind} experts", torch.bfloat16):
            yield decoding(name, held, prompt)
        held.drop()


class Held:
    """One model at a time, made when the first of its cases runs; and what went into and out of two of its MoE layers last."""

    def __init__(self, kind: str, small: bool) -> None:
        self.kind, self.small = kind, small
        self.config = bench_config(True) if small else mini_config()
        self.seen: dict[str, tuple[MoE, Tensor, Tensor]] = {}
        self.made: Model | None = None

    @property
    def model(self) -> Model:
        assert self.made is not None
        return self.made

    def make(self) -> None:
        forget_peak()
        if self.made is not None:
            return
        with torch.device("meta"):
            empty = Model(self.config, torch.bfloat16).quantize_experts(self.kind)
        size = sum(t.numel() * t.element_size() for t in empty.state_dict().values())
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if found and int(found[1]) * 1024 < size + HEADROOM:
            text = f"{(size + HEADROOM) / 1e9:.1f} GB of memory are needed and {int(found[1]) * 1024 / 1e9:.1f} GB are available"
            raise MemoryError(f"this machine does not support this call now: {text}")
        self.made = pool_model(self.config, self.kind)
        layers = [(name, m) for name, m in self.made.named_modules() if isinstance(m, MoE)]
        for name, layer in (layers[0], layers[-1]):
            layer.register_forward_hook(lambda module, inputs, out, name=name: self.seen.update({name: (module, inputs[0], out)}))

    def drop(self) -> None:
        self.made = None
        self.seen.clear()
        ctypes.CDLL("libc.so.6").malloc_trim(0)

    @torch.no_grad()
    def check(self, logits: Tensor) -> str | None:
        """Finite logits, and the first and last MoE layer of the call against exact products of a few tokens."""
        if not bool(logits.isfinite().all()):
            return "logits that are not finite"
        for name, (layer, x, y) in self.seen.items():
            routing = layer.router(x).routing
            sample = torch.arange(0, len(x), max(1, len(x) // 3))
            gate_up, down = (Experts(w.value) for w in (layer.w_gate_up, layer.w_down) if isinstance(w, QuantizedWeight))
            expected = exact_tokens(x, routing, gate_up, down, sample, torch.float32)
            if layer.shared_expert is not None:
                expected += layer.shared_expert(x[sample]).float()
            error = float((y[sample].float() - expected).norm() / expected.norm())
            if not error <= 0.015:
                return f"{name}: relative error {error:.4f}, allowed 0.015"
        return None

    def touched(self) -> float:
        """Share of the experts that tokens of the last call use, in the layers that are watched."""
        shares = [float((m.router(x).routing.offsets.diff() > 0).float().mean()) for m, x, _ in self.seen.values()]
        return sum(shares) / len(shares)

    def work(self, tokens: int, pairs: int, kept: int) -> float:
        """FLOPs of a forward of ``tokens`` tokens that see ``pairs`` keys, with logits of ``kept`` of them."""
        c = self.config
        heads = c.hidden_size * (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        total = 4.0 * pairs * c.num_attention_heads * c.head_dim * c.num_hidden_layers + 2.0 * kept * c.hidden_size * c.vocab_size
        for moe in c.moe_layers:
            experts = c.num_experts_per_tok * c.moe_intermediate_size + c.shared_expert_intermediate_size
            mlp = 3 * c.hidden_size * experts + c.hidden_size * c.num_experts if moe else 3 * c.hidden_size * c.intermediate_size
            total += 2.0 * tokens * (heads + mlp)
        return total

    def weight_bytes(self) -> float:
        """Of all weights that the last call had to read once: those of touched experts alone, and no embeddings."""
        total, touched = 0.0, self.touched()
        for name, tensor in self.model.state_dict().items():
            if "embed_tokens" not in name:
                total += tensor.numel() * tensor.element_size() * (touched if ".w_gate_up." in name or ".w_down." in name else 1.0)
        return total

    def facts(self) -> dict[str, Any]:
        weights = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        return {"peak_bytes": resident("VmHWM"), "weight_bytes": weights, "share_of_experts_touched": round(self.touched(), 3)}

    def case(self, name: str, run: Any, tokens: int, flops: float, passes: int, shapes: dict[str, Any]) -> Case:
        case = Case("mini_forward", name, torch.bfloat16, shapes, [], self.check, flops, tokens=tokens, least=5)

        def check(logits: Tensor) -> str | None:
            case.bytes = passes * self.weight_bytes()  # known now: which experts the tokens chose
            return self.check(logits)

        case.check = check
        case.variants = [Variant("native", run, "ours", extra=self.facts, prepare=self.make)]
        return case


def reading(name: str, held: Held, prompt: int) -> Case:
    ids = torch.randint(0, held.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def run() -> Tensor:
        return held.model.forward(ids, logits_to_keep=BLOCK).logits

    shapes = {"prompt": prompt, "logits": BLOCK, "layers": held.config.num_hidden_layers, "experts": held.kind}
    return held.case(name, run, prompt, held.work(prompt, prompt**2, BLOCK), 1, shapes)


def decoding(name: str, held: Held, context: int) -> Case:
    """All denoising steps of one block after a cached context; every step accepts the surest of those that are left."""
    c = held.config
    generator = torch.Generator().manual_seed(1)
    mask_id = c.vocab_size - 1
    prompt = torch.randint(0, mask_id, (context,), generator=generator)
    # What a forward reads are random tokens: a model that knows nothing sends masks to the same few experts.
    block = torch.randint(0, mask_id, (1, BLOCK), generator=generator)
    caches: list[KVCache] = []

    @torch.inference_mode()
    def prepare() -> None:
        held.make()
        cache = KVCache(c.num_hidden_layers, 1, context + BLOCK, BLOCK, c.num_key_value_heads, c.head_dim, torch.bfloat16)
        held.model.forward(prompt, mask=cache.mask([context]), cache=cache, logits_to_keep=1)
        cache.commit([context])
        caches.append(cache)

    @torch.inference_mode()
    def run() -> Tensor:
        cache, tokens = caches[0], torch.full_like(block, mask_id)
        for _ in range(STEPS):
            mask = cache.mask([BLOCK])
            logits = held.model.forward(block[0], mask=mask, cache=cache, logits_to_keep=BLOCK).logits.view(1, BLOCK, -1)
            tokens = threshold_unmask(logits, tokens, mask_id, 1.0, min_unmask=BLOCK // STEPS).tokens
        if bool((tokens == mask_id).any()):
            raise ValueError(f"masks are left after {STEPS} steps")
        return logits

    shapes = {"context": context, "block": BLOCK, "steps": STEPS, "layers": c.num_hidden_layers, "experts": held.kind}
    case = held.case(name, run, BLOCK, STEPS * held.work(BLOCK, BLOCK * (context + BLOCK), BLOCK), STEPS, shapes)
    case.variants[0].prepare = prepare
    return case


class Experts:
    """Quantised weights that are dequantised expert by expert, as they are asked for."""

    def __init__(self, value: QuantizedExperts) -> None:
        self.value, self.shape = value, value.shape

    def __getitem__(self, e: int) -> Tensor:
        return self.value.expert(e).dequantize()[0]


if __name__ == "__main__":
    sys.exit(main("mini_forward", cases))
