"""Attention under a block-diffusion mask: work proportional to the visible pairs."""

from __future__ import annotations

from torch import Tensor

from ...masks import DiffusionMask
from .._common import check_same, check_shape, check_tensor
from ..dispatch import run
from . import native, reference, triton

__all__ = ["block_attention"]

BACKENDS = (native.BACKEND, triton.BACKEND, reference.BACKEND)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: DiffusionMask | Tensor,
    softmax_scale: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention in which each query sees at most two intervals of keys; a query that sees no key gets 0.

    Args:
        q: (Tq, Hq, D), fp32 or bf16, on a GPU fp16 too (the reference takes any floating dtype).
        k: (Tk, Hkv, D), dtype of q; Hkv divides Hq and query head a uses KV head a // (Hq / Hkv).
        v: (Tk, Hkv, D), dtype of q.
        mask: Tq queries and Tk keys, not ``cached``; or a bool tensor (Tq, Tk) or (B, Tq / B, Tk / B), True where visible (reference only).
        softmax_scale: factor of the scores; None: 1 / sqrt(D).
        backend: "native" (D a multiple of 8), "triton" (GPU, D of 64 or 128) or "reference"; None takes the first that supports the call.

    Returns:
        (Tq, Hq, D), dtype of q.

    Raises:
        ValueError: wrong shape, dtype or device; mask and inputs differ in length; the named backend does not support the call.
        TypeError: an argument has a wrong Python type.

    Precision: scores and sums in fp32 (fp64 for fp64 inputs), one rounding at the end. Native rounds the probabilities of bf16 inputs
        to bf16 before they multiply v where the CPU multiplies bf16, as PyTorch does; triton does so for both 16-bit dtypes.
    Determinism: bitwise repeatable forward and backward, for any number of threads; differentiable in q, k and v.
    """
    check_attention_inputs(q, k, v, "k", "v")
    if isinstance(mask, DiffusionMask):
        if mask.kind == "cached":
            raise ValueError("mask: expected a mask without a cache, got kind 'cached' (use cached_block_attention)")
        check_mask(mask, q, k, "k")
    else:
        check_dense_mask(mask, q, k)
    return run("block_attention", BACKENDS, backend, q, k, v, mask, resolve_scale(softmax_scale, q))


def check_attention_inputs(q: Tensor, k: Tensor, v: Tensor, k_name: str, v_name: str) -> None:
    """Raise unless q [Tq, Hq, D] and k, v [Tk, Hkv, D] fit together."""
    check_tensor("q", q, 3)
    check_tensor(k_name, k, 3)
    check_tensor(v_name, v, 3)
    heads, kv_heads = q.shape[1], k.shape[1]
    check_shape(k_name, k, None, None, q.shape[2])
    check_shape(v_name, v, *k.shape)
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(f"{k_name}: expected a number of heads that divides the {heads} heads of q, got {kv_heads}")
    if q.shape[2] < 1 or not q.dtype.is_floating_point:
        raise ValueError(f"q: expected a floating dtype and a head dim of at least 1, got {q.dtype} {tuple(q.shape)}")
    check_same(k_name, k, "q", q)
    check_same(v_name, v, "q", q)


def check_mask(mask: DiffusionMask, q: Tensor, k: Tensor, k_name: str) -> None:
    """Raise unless ``mask`` has the queries of q and the keys of k, on their device."""
    if mask.num_queries != q.shape[0]:
        raise ValueError(f"mask: expected one row per token of q ({q.shape[0]}), got {mask.num_queries}")
    if mask.num_keys != k.shape[0]:
        raise ValueError(f"mask: expected one key per token of {k_name} ({k.shape[0]}), got {mask.num_keys}")
    if mask.device != q.device:
        raise ValueError(f"mask: expected device {q.device} (that of q), got {mask.device}")


def check_dense_mask(mask: object, q: Tensor, k: Tensor) -> None:
    """Raise unless ``mask`` is a bool tensor for the queries of q and the keys of k."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a DiffusionMask or a bool tensor, got {type(mask).__name__}")
    batch = mask.shape[0] if mask.dim() == 3 else 1
    fits = mask.dim() in (2, 3) and (batch * mask.shape[-2], batch * mask.shape[-1]) == (q.shape[0], k.shape[0])
    if not fits or "bool" not in str(mask.dtype):
        raise ValueError(
            f"mask: expected bool ({q.shape[0]}, {k.shape[0]}), or (B, S, S) with B * S tokens, got {mask.dtype} {tuple(mask.shape)}"
        )
    check_same("mask", mask, "q", q, dtype=False)


def resolve_scale(softmax_scale: float | None, q: Tensor) -> float:
    """The factor of the scores."""
    return q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
