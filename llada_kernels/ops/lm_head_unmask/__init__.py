"""The LM head and the sampler of block diffusion in one, without the [R, L, V] logits."""

from __future__ import annotations

from torch import Tensor

from .._common import check_same, check_shape, check_tensor
from ..dispatch import run
from ..threshold_unmask.arguments import PerRow, Unmasked, rule_arguments
from . import native, reference, triton

__all__ = ["lm_head_unmask"]


def lm_head_unmask(
    hidden: Tensor,
    lm_head: Tensor,
    tokens: Tensor,
    mask_token_id: int,
    threshold: PerRow,
    editing_threshold: PerRow | None = None,
    min_unmask: PerRow = 1,
    temperature: PerRow = 0.0,
    top_k: PerRow | None = None,
    top_p: PerRow | None = None,
    seed: PerRow | None = None,
    editable: Tensor | None = None,
    positions: Tensor | None = None,
    forward_index: PerRow = 0,
    *,
    backend: str | None = None,
) -> Unmasked:
    """``threshold_unmask(hidden @ lm_head.T, tokens, ...)``: see there for the rules and the other arguments.

    At temperature 0 the native and Triton backends hold the logits of 1024 ids at a time (Triton:
    per program). Drawing tokens needs the logits several times, so a temperature above 0 (also one
    per row, whatever the numbers) stores them: native calls F.linear and threshold_unmask, Triton
    leaves it to the reference.

    Args:
        hidden: [R, L, H] fp32 or bf16 (reference: any floating dtype): final hidden states.
        lm_head: [V, H] dtype of hidden.
        tokens: [R, L] int64: current tokens; masked is where they equal ``mask_token_id``.
        backend: use this backend or raise; by default the first that supports the call.

    Precision: products accumulated in fp32 (fp64 for fp64 inputs) and rounded once to the dtype of
        hidden, as F.linear does. From these logits on the result is bitwise that of
        threshold_unmask; products may differ from those of F.linear by their rounding, and with
        them confidences, and choices between logits that are equal up to this rounding. Nothing is
        differentiated.
    Determinism: native: bitwise, on any number of threads; triton: bitwise; reference, and native where
        it draws: that of torch.matmul.

    Returns:
        An Unmasked (tokens, confidence, counts).

    Raises:
        ValueError: as threshold_unmask; bad logits are named by row and position.
    """
    check_tensor("hidden", hidden, 3)
    check_tensor("lm_head", lm_head, 2)
    check_shape("lm_head", lm_head, None, hidden.shape[2])
    check_same("lm_head", lm_head, "hidden", hidden)
    if not hidden.is_floating_point():
        raise ValueError(f"hidden: expected a floating dtype, got {hidden.dtype}")
    rules = rule_arguments(
        "hidden", hidden, lm_head.shape[0], tokens, mask_token_id, threshold, editing_threshold, min_unmask, temperature, top_k, top_p,
        seed, editable, positions, forward_index,
    )  # fmt: skip
    return Unmasked(*run("lm_head_unmask", BACKENDS, backend, hidden, lm_head, rules))


BACKENDS = (native.BACKEND, triton.BACKEND, reference.BACKEND)
