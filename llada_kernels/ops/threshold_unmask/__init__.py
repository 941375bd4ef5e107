"""The sampler of block diffusion: choose a token per position, decide which positions take it."""

from __future__ import annotations

from torch import Tensor

from .._common import check_tensor
from ..dispatch import run
from . import native, reference, triton
from .arguments import PerRow, Unmasked, rule_arguments

__all__ = ["Unmasked", "threshold_unmask"]


def threshold_unmask(
    logits: Tensor,
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
    """One decoding step: unmask confident positions (M2T) and edit written ones (T2T).

    *Choice*, one token per position, never the mask token:

    - temperature 0: the largest logit, lowest id among equals. Its confidence is its softmax
      probability on the raw logits, the mask token in the denominator; top_k, top_p are ignored.
    - temperature > 0: the distribution is softmax(logits / temperature) cut by top_k (the k largest
      logits, lowest ids among equals), then by top_p (of what is left, renormalised, sorted by
      probability, lowest ids first among equals: the shortest prefix whose mass reaches top_p, at
      least one token). The mask token takes part in all of this. One token is drawn among the kept
      ones without the mask token, in proportion to their probabilities; its confidence is its
      probability in the kept distribution, which contains the mask token's mass if that was kept.
      If nothing but the mask token was kept (or the rest of what was kept rounds to 0 beside it), the
      largest other logit is chosen with confidence 0, which no threshold accepts.

    *M2T*: if at least ``min_unmask`` masked positions have confidence > threshold, exactly those
    take their token, else the ``min(min_unmask, number masked)`` most confident ones (lowest
    position first among equals). *T2T*: positions not masked before the call and editable whose
    chosen token differs take it where confidence > editing_threshold.

    Parameters marked "per row" are a number or one number per row (sequence or tensor [R]).

    Args:
        logits: [R, L, V] fp32 or bf16 (reference: any floating dtype).
        tokens: [R, L] int64: current tokens; masked is where they equal ``mask_token_id``.
        mask_token_id: id in [0, V).
        threshold: per row, in [0, 1].
        editing_threshold: None: no editing; 0.0 edits every changed token. Per row, in [0, 1]; in a
            sequence or tensor an entry below 0 turns the row's editing off.
        min_unmask: per row, at least 0.
        temperature: per row, at least 0.
        top_k: per row, at least 0; None or 0 is off.
        top_p: per row, in [0, 1]; None or 1 is off.
        seed: per row, int64, at least 0; None draws one from torch's generator when it is needed.
        editable: [R, L] bool: positions that editing may change; None: all.
        positions: [R, L] int64: absolute positions, which key the random numbers; None: 0..L-1.
        forward_index: per row, int64: which forward of the row this is.
        backend: use this backend or raise; by default the first that supports the call.

    Precision: at temperature 0 confidences within 1e-6 relative of the exact softmax (exponentials in
        fp32); at temperature > 0 exponentials and sums in fp64. Both are fixed to the bit (see
        reference.py). Comparisons in fp32.
    Determinism: the result is bitwise equal in all backends and on any number of threads. The
        random number of a position depends on (seed, position, forward_index) only, never on the
        batch.

    Returns:
        An Unmasked (tokens, confidence, counts).

    Raises:
        ValueError: a shape, dtype or device differs, a parameter is outside its range (entries of
            tensors are checked on a CPU), or, on a CPU, a position's logits hold NaN, +inf or
            nothing finite but the mask token's: the row and the position are named.
    """
    check_tensor("logits", logits, 3)
    if not logits.is_floating_point():
        raise ValueError(f"logits: expected a floating dtype, got {logits.dtype}")
    rules = rule_arguments(
        "logits", logits, logits.shape[2], tokens, mask_token_id, threshold, editing_threshold, min_unmask, temperature, top_k, top_p,
        seed, editable, positions, forward_index,
    )  # fmt: skip
    return Unmasked(*run("threshold_unmask", BACKENDS, backend, logits, rules))


BACKENDS = (native.BACKEND, triton.BACKEND, reference.BACKEND)
