"""The geometries that are benched, and inputs that look like real ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from llada_kernels import Config, Model
from llada_kernels.ops import Routing, moe_routing

from .ceilings import last_level_cache

__all__ = ["MINI", "bench_config", "bench_model", "expert_weights", "mini_config", "mini_routing", "pool_model", "rotate", "stays_out"]

#: LLaDA2.x-mini: hidden, expert width, experts, per token, query and KV heads, head dim, vocabulary
MINI: dict[str, int] = {"H": 2048, "I": 512, "E": 256, "K": 8, "Hq": 16, "Hkv": 4, "D": 128, "V": 157184}

#: Standard deviation of what the 32 tokens of a block share, beside what is the token's own (1): gives 69.5 distinct experts of 256 per
#: block, as published for LLaDA2 (about 162 without).
BLOCK_SHARE = 1.2

ROUTINGS = ("uniform", "zipf0.5", "llada-block")


def mini_routing(tokens: int, kind: str, seed: int = 0, experts: int = MINI["E"], top_k: int = MINI["K"]) -> Routing:
    """Routing of ``tokens`` tokens as the mini model does it: 8 groups of experts of which a token uses 4.

    Args:
        kind: "uniform": every expert is as likely; "zipf0.5": expert i's share falls as 1/sqrt(i) (in a random order of experts);
            "llada-block": tokens of a block of 32 prefer common experts.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, experts, generator=generator)
    groups, used = (8, 4) if experts >= 64 else (1, 1)
    if kind == "zipf0.5":
        share = torch.arange(1, experts + 1).float().rsqrt()[torch.randperm(experts, generator=generator)]
        # Gumbel noise over log shares draws experts without replacement in proportion to their shares.
        scores = share.log() - torch.rand(tokens, experts, generator=generator).clamp(1e-9).log().neg().log()
        groups = used = 1
    elif kind == "llada-block":
        shared = torch.randn((tokens + 31) // 32, experts, generator=generator)
        scores = scores + BLOCK_SHARE * shared.repeat_interleave(32, 0)[:tokens]
    elif kind != "uniform":
        raise ValueError(f"kind: expected one of {', '.join(ROUTINGS)}, got {kind!r}")
    return moe_routing(scores, None, top_k, groups, used, 2.5, backend="reference")


def expert_weights(dtype: torch.dtype, experts: int, width: int, hidden: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """w_gate_up and w_down with normal entries of variance 1/fan-in; experts are different stretches of one pool of numbers.

    Drawing the 805 million numbers of a mini layer one by one would take longer than the bench.
    """
    generator = torch.Generator().manual_seed(seed)
    size = 2 * width * hidden
    pool = torch.randn(size + 4096 * experts, generator=generator)
    gate_up = torch.empty(experts, 2 * width, hidden, dtype=dtype)
    down = torch.empty(experts, hidden, width, dtype=dtype)
    for e in range(experts):
        gate_up[e] = (pool[4096 * e :][:size] * hidden**-0.5).view(2 * width, hidden)
        down[e] = (pool[4096 * e + 1031 :][: size // 2] * width**-0.5).view(hidden, width)
    return gate_up, down


def rotate(make: Callable[[], Any], size: int, quick: bool = False) -> Iterator[Any]:
    """Endless copies of the same values at so many places that a call does not find its inputs in a cache.

    Args:
        make: a copy of the inputs of one call.
        size: their bytes.
    """
    copies = 1 if not stays_out(size) else 2 if quick else -(-2 * last_level_cache() // size) + 1
    return itertools.cycle([make() for _ in range(copies)])


def stays_out(size: int) -> bool:
    """Whether inputs of ``size`` bytes are worth keeping out of the caches: smaller ones are in a cache when a model needs them."""
    return size >= 1 << 20


def bench_config(small: bool = False) -> Config:
    """Hidden 512, 8 layers (the first dense), 64 experts of width 256, 4 per token, 8 query and 2 KV heads of 64, 32000 tokens.

    ``small``: the same architecture at sizes for a quick run.
    """
    vocab, hidden, layers, experts = (1000, 128, 2, 16) if small else (32000, 512, 8, 64)
    return Config(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        rotary_dim=32, rope_theta=600000.0, intermediate_size=4 * hidden, moe_intermediate_size=hidden // 2, num_experts=experts,
        num_experts_per_tok=4, moe_layers=(False, *[True] * (layers - 1)), shared_expert_intermediate_size=hidden // 2, n_group=8,
        topk_group=4, routed_scaling_factor=2.5, mask_token_id=vocab - 1, eos_token_id=vocab - 2,
    )  # fmt: skip


def bench_model(dtype: torch.dtype, small: bool = False, seed: int = 0) -> Model:
    """The bench model with random weights."""
    torch.manual_seed(seed)
    return Model(bench_config(small), dtype=dtype)


def mini_config(layers: int = 20, experts: int = 256) -> Config:
    """LLaDA2.x-mini: 16 billion parameters; fewer with fewer layers or experts."""
    return Config(
        vocab_size=157184, hidden_size=2048, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=4, head_dim=128,
        rotary_dim=64, rope_theta=600000.0, intermediate_size=5120, moe_intermediate_size=512, num_experts=experts, n_group=8,
        topk_group=4, num_experts_per_tok=8, moe_layers=(False, *[True] * (layers - 1)), shared_expert_intermediate_size=512,
        routed_scaling_factor=2.5,
    )  # fmt: skip


def pool_model(config: Config, expert_kind: str | None = None) -> Model:
    """A bf16 model whose weights are stretches of one pool of numbers: drawing billions of them would take longer than a bench.

    Weights have a standard deviation of 0.02; quantised experts are made in their packed form, without bf16 ones.
    """
    with torch.device("meta"):
        model = Model(config, dtype=torch.bfloat16)
    if expert_kind is not None:
        model.quantize_experts(expert_kind)
    model.to_empty(device="cpu")
    size = 1 << 21
    generator = torch.Generator().manual_seed(0)
    # Uniform integers of -127 .. 127 and of -8 .. 7 have standard deviations of 73.6 and 4.6.
    scale = 0.02 / {None: 1.0, "int8": 73.6, "int4": 4.6}[expert_kind]
    pools = {
        torch.int8: torch.randint(-127, 128, (2 * size,), generator=generator, dtype=torch.int8),
        torch.uint8: torch.randint(0, 256, (2 * size,), generator=generator, dtype=torch.uint8),
        torch.bfloat16: (torch.randn(2 * size, generator=generator) * 0.02).to(torch.bfloat16),
    }
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        if name.endswith(("norm.weight", ".scales", "expert_bias")):
            tensor.fill_(scale if name.endswith(".scales") else float(name.endswith("norm.weight")))
            continue
        pool = pools[tensor.dtype]
        for part_number, part in enumerate(tensor.view(-1).split(size)):
            place = (7919 * number + 104729 * part_number) % size
            part.copy_(pool[place : place + len(part)])
    return model.eval()
