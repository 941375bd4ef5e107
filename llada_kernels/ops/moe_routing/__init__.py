"""The router of the family: which experts serve each token, with which weight, sorted by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import check_same, check_shape, check_tensor
from ..dispatch import run
from . import native, reference, triton
from .routing import Routing
from .rule import Rule

__all__ = ["BACKENDS", "Routing", "moe_routing"]

BACKENDS = (native.BACKEND, triton.BACKEND, reference.BACKEND)


def moe_routing(
    logits: Tensor,
    expert_bias: Tensor | None,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    scale: float = 1.0,
    score: str = "sigmoid",
    normalize: bool = True,
    block_pool: tuple[int, int] | None = None,
    *,
    backend: str | None = None,
) -> Routing:
    """Choose ``top_k`` of E experts for every token by the exact rule of LLaDA2 (or LLaDA-MoE with
    ``score="softmax"``).

    s = sigmoid(logits) (or softmax over all experts); r = s + expert_bias selects, s alone weighs.
    With groups, each group of E / n_group consecutive experts scores the sum of its two largest r
    and only the ``topk_group`` best groups take part. The top_k largest r that are left are chosen,
    listed in descending order of r. Wherever values tie, the lowest index wins (NaN counts as the
    largest value).

    Args:
        logits: fp32 [T, E] (fp64: reference only). Router logits.
        expert_bias: fp32 [E] or None. Added for the selection only; gets no gradient.
        top_k: K, experts per token.
        n_group: number of groups of experts, a divisor of E.
        topk_group: groups that a token may use.
        scale: factor of the weights.
        score: "sigmoid" or "softmax".
        normalize: divide each token's weights by (their sum + 1e-20); as in the official code not
            when top_k is 1.
        block_pool: None, or (block_size, expert_capacity): the tokens of each block of block_size
            consecutive tokens may use only the expert_capacity experts with the largest maximum of
            r over the block (LLaDA2.2; excludes groups).
        backend: None chooses by the arguments; a name never falls back.

    Returns:
        :class:`Routing`: topk_ids int32 [T, K], topk_weights fp32 [T, K] (differentiable with
        respect to logits), offsets int32 [E + 1], permutation int32 [T * K].

    Precision: fp32 throughout. Determinism: bitwise, independent of the number of threads.

    Raises:
        TypeError: an argument is not a tensor or an int where one is expected.
        ValueError: a wrong shape, dtype or device; numbers of experts, groups and choices that do
            not fit together.
    """
    check_tensor("logits", logits, 2, (torch.float32, torch.float64))
    tokens, experts = logits.shape
    if experts < 1:
        raise ValueError(f"logits: expected at least one expert, got shape {tuple(logits.shape)}")
    if expert_bias is not None:
        check_tensor("expert_bias", expert_bias, 1, (torch.float32, torch.float64))
        check_shape("expert_bias", expert_bias, experts)
        check_same("expert_bias", expert_bias, "logits", logits, dtype=False)
    for name, number in (("top_k", top_k), ("n_group", n_group), ("topk_group", topk_group)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name}: expected an int, got {type(number).__name__}")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k: expected 1 to {experts} (the number of experts), got {top_k}")
    if score not in ("sigmoid", "softmax"):
        raise ValueError(f"score: expected 'sigmoid' or 'softmax', got {score!r}")
    if n_group < 1 or experts % n_group:
        raise ValueError(f"n_group: expected a divisor of {experts} (the number of experts), got {n_group}")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group: expected 1 to {n_group} (n_group), got {topk_group}")
    if n_group > 1 and experts // n_group < 2:
        raise ValueError(f"n_group: expected at least two experts per group, got {n_group} groups of {experts // n_group}")
    if topk_group * (experts // n_group) < top_k:
        raise ValueError(
            f"topk_group: expected groups with at least {top_k} experts (top_k), got {topk_group} of {experts // n_group} experts each"
        )
    if block_pool is not None:
        pair = isinstance(block_pool, tuple | list) and len(block_pool) == 2
        if not pair or any(isinstance(n, bool) or not isinstance(n, int) for n in block_pool):
            raise TypeError(f"block_pool: expected None or two ints (block_size, expert_capacity), got {block_pool!r:.80}")
        block_size, capacity = block_pool
        if n_group != 1:
            raise ValueError(f"n_group: expected 1 together with block_pool, got {n_group}")
        if block_size < 1 or tokens % block_size:
            raise ValueError(f"block_pool: expected a block size that divides {tokens} tokens, got {block_size}")
        if not top_k <= capacity <= experts:
            raise ValueError(f"block_pool: expected an expert capacity of {top_k} (top_k) to {experts}, got {capacity}")
        block_pool = (int(block_size), int(capacity))
    rule = Rule(top_k, n_group, topk_group, float(scale), score, bool(normalize), block_pool)
    return run("moe_routing", BACKENDS, backend, logits, expert_bias, rule)
