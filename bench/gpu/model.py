"""The mini geometry as a whole on a GPU (E), random weights: forwards, generation, a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from llada_kernels import Config, DiffusionMask, Model, use_backend
from llada_kernels.generation import generate
from llada_kernels.training.data import Batch
from llada_kernels.training.objectives import Objective, loss_terms, prepare
from llada_kernels.training.optimizer import AdamW

from ..harness import Case, Settings, Variant
from ..shapes import MINI, bench_config
from .attention import peak

__all__ = ["cases", "mini_config"]

BLOCK = 32
#: A step of AdamW holds 16 bytes per weight: of the mini model's 20 layers four fit beside everything else.
TRAINED_LAYERS = 4


def mini_config(layers: int = 20) -> Config:
    """LLaDA2.x-mini: 16 B parameters, 19 MoE layers after a dense one."""
    return Config(
        vocab_size=MINI["V"], hidden_size=MINI["H"], num_hidden_layers=layers, num_attention_heads=MINI["Hq"],
        num_key_value_heads=MINI["Hkv"], head_dim=MINI["D"], rotary_dim=MINI["D"] // 2, rope_theta=600000.0, intermediate_size=5120,
        moe_intermediate_size=MINI["I"], num_experts=MINI["E"], num_experts_per_tok=MINI["K"],
        moe_layers=(False, *[True] * (layers - 1)), shared_expert_intermediate_size=MINI["I"], n_group=8, topk_group=4,
        routed_scaling_factor=2.5, mask_token_id=156895, eos_token_id=156892,
    )  # fmt: skip


def geometry(settings: Settings, layers: int = 20) -> Config:
    """The mini model's; a tiny one in a dry run."""
    return bench_config(small=True) if settings.quick else mini_config(layers)


def model_of(config: Config, settings: Settings) -> Model:
    torch.manual_seed(0)
    return Model(config, settings.dtype, settings.device)


def cases(settings: Settings) -> Iterator[Case]:
    """E: each case with a model of its own; 32 GB of weights are drawn on the device."""
    holder: list[Model] = []

    def model() -> Model:
        if not holder:
            holder.append(model_of(geometry(settings), settings).eval())
        return holder[0]

    prompt, length = (64, 32) if settings.quick else (2048, 128)
    if settings.wants(name := f"forward, {prompt} tokens, block-causal"):
        yield forward(name, model(), prompt, settings)
    if settings.wants(name := f"generate {length} tokens, prompt {prompt // 2}"):
        yield generation(name, model(), prompt // 2, length, settings)
    documents, tokens = (2, 64) if settings.quick else (4, 2048)
    if settings.wants(name := f"forward+backward, {documents} documents of {tokens}"):
        yield gradients(name, model(), documents, tokens, settings)
    holder.clear()
    if settings.wants(name := f"training step with AdamW, {TRAINED_LAYERS} layers, {documents} documents of {tokens}"):
        yield training_step(name, documents, tokens, settings)


def random_tokens(model: Model, count: int, settings: Settings) -> Tensor:
    ids = torch.randint(0, model.config.vocab_size - 500, (count,), generator=torch.Generator().manual_seed(1))
    return ids.clamp(max=model.config.vocab_size - 3).to(settings.device)


def finite(result: Any) -> str | None:
    """Random weights have no right text: values are checked op by op and against the official outputs; here that they are sound."""
    return None if all(bool(torch.as_tensor(x).isfinite().all()) for x in result) else "values that are not finite"


def forward(name: str, model: Model, tokens: int, settings: Settings) -> Case:
    ids = random_tokens(model, tokens, settings)
    mask = DiffusionMask.block_causal([0, tokens], BLOCK).to(settings.device)
    last = torch.arange(tokens - BLOCK, tokens, device=settings.device)

    def run() -> tuple[Tensor]:
        with torch.no_grad():
            return (model(ids, mask=mask, logits_to_keep=last).logits,)

    def reference() -> tuple[Tensor]:
        with use_backend("reference"):
            return run()

    variants = [Variant("ours", run, "ours", extra=lambda: {"tokens": tokens, **peak(run, settings)})]
    # Of this case alone: 128 forwards of a generation would take it most of the table's time, the scores of a training batch the memory.
    variants.append(Variant("reference", reference, extra=lambda: peak(reference, settings)))
    return Case("E model", name, settings.dtype, {"tokens": tokens}, variants, finite, None, None)


def generation(name: str, model: Model, prompt: int, length: int, settings: Settings) -> Case:
    """Random weights are never sure of a token, so every block takes its 32 steps: the cost of a step, not of a text."""
    ids = random_tokens(model, prompt, settings).cpu()
    facts: dict[str, Any] = {}

    def run() -> tuple[Tensor]:
        out = generate(model, ids.to(settings.device), gen_length=length, block_length=BLOCK, steps=BLOCK, threshold=0.95, eos_id=-1)
        facts["forwards"] = out.num_forwards
        return (out[0],)

    variants = [Variant("ours", run, "ours", extra=lambda: {**facts, "new_tokens": length})]
    return Case("E model", name, settings.dtype, {"prompt": prompt, "new_tokens": length, "block": BLOCK}, variants, finite, None, None)


def packed(model: Model, documents: int, length: int) -> Batch:
    total = documents * length
    tokens = torch.randint(0, min(model.config.vocab_size - 2, 100000), (total,), generator=torch.Generator().manual_seed(4))
    cu_seqlens = torch.arange(0, total + 1, length, dtype=torch.int32)
    return Batch(tokens, cu_seqlens, torch.ones(total, dtype=torch.bool), torch.zeros_like(tokens), torch.arange(total))


def step_of(model: Model, documents: int, length: int, optimizer: AdamW | None, settings: Settings) -> Callable[[], tuple[Tensor, ...]]:
    data = packed(model, documents, length).to(settings.device)
    objective = Objective("diffusion", BLOCK, "masked", (0.3, 0.8))
    assert model.config.mask_token_id is not None
    mask_token_id = model.config.mask_token_id

    def run() -> tuple[Tensor, ...]:
        part = prepare(data, objective, mask_token_id, seed=0, step=0)
        loss = loss_terms(model, part).loss / part.count
        loss.backward()
        if optimizer is None:
            for parameter in model.parameters():
                parameter.grad = None
            return (loss.detach(),)
        norm = optimizer.clip(1.0)
        optimizer.step(1e-5)
        return loss.detach(), norm

    return run


def gradients(name: str, model: Model, documents: int, length: int, settings: Settings) -> Case:
    """All layers, gradients dropped: what fits beside 32 GB of weights and 32 GB of gradients."""
    model.train()
    model.gradient_checkpointing = True
    run = step_of(model, documents, length, None, settings)
    variants = [Variant("ours", run, "ours", extra=lambda: {"tokens": documents * length, **peak(run, settings)})]
    shapes = {"documents": documents, "length": length, "layers": model.config.num_hidden_layers, "checkpointing": True}
    return Case("E model", name, settings.dtype, shapes, variants, finite, None, None)


def training_step(name: str, documents: int, length: int, settings: Settings) -> Case:
    config = geometry(settings, TRAINED_LAYERS)
    model = model_of(config, settings).train()
    run = step_of(model, documents, length, AdamW(model), settings)
    variants = [Variant("ours", run, "ours", extra=lambda: {"tokens": documents * length, **peak(run, settings)})]
    shapes = {"documents": documents, "length": length, "layers": config.num_hidden_layers}
    return Case("E model", name, settings.dtype, shapes, variants, finite, None, None)
