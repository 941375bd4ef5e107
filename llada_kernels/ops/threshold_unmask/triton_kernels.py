"""The kernels of the Triton backend. Imported at the first launch only.

The arithmetic is that of reference.py to the bit, multiply-adds fused where it says so: launch everything here with
``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

PART: tl.constexpr = tl.constexpr(1024)  # ids of a part
LANES: tl.constexpr = tl.constexpr(64)  # of the fp32 sum over a part


@triton.jit
def exponential32(z):
    """fp32 exp(z) for z <= 0, as the reference's of this name."""
    z = tl.maximum(z, -55.0)
    rounded = tl.fma(z, 1.44269504, 12582912.0)  # 1.5 * 2**23: the low bits are the nearest integer
    r = tl.fma(z, 1.44269504, 12582912.0 - rounded)
    p = tl.fma(r, 1.3264727e-3, 9.6715130e-3)
    p = tl.fma(p, r, 5.5507336e-2)
    p = tl.fma(p, r, 2.4022242e-1)
    p = tl.fma(p, r, 6.9314700e-1)
    p = tl.fma(p, r, 1.0)
    # Times 2**k, exact because nothing here is subnormal: k is added to the exponent.
    return (p.to(tl.int32, bitcast=True) + (rounded.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def exponential(z):
    """fp64 exp(z) for z <= 0, as the reference's of this name; 1 for anything larger."""
    z = tl.maximum(tl.minimum(z, 0.0), -64.0)
    k = (z * 1.4426950408889634 + 6755399441055744.0) - 6755399441055744.0
    r = (z - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10
    p = r * (1.0 / 39916800) + (1.0 / 3628800)
    p = p * r + (1.0 / 362880)
    p = p * r + (1.0 / 40320)
    p = p * r + (1.0 / 5040)
    p = p * r + (1.0 / 720)
    p = p * r + (1.0 / 120)
    p = p * r + (1.0 / 24)
    p = p * r + (1.0 / 6)
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    return p * ((k.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _add_halves(total, WIDTH: tl.constexpr):
    """Sum over the last dimension: its halves are added to each other until one number is left. [P, WIDTH] to [P]."""
    width: tl.constexpr = WIDTH // 2
    total = tl.sum(tl.reshape(total, (total.shape[0], 2, width)), 1)  # of two numbers: no order is left open
    if width == 1:
        return tl.reshape(total, (total.shape[0],))
    else:
        return _add_halves(total, width)


@triton.jit
def load_parts(ptrs, ids, VOCAB: tl.constexpr):
    """The logits of P parts, -inf beyond the vocabulary, as a tuple of 16 tensors [P, LANES], from pointers and ids of the first."""
    x = ()
    for i in tl.static_range(PART // LANES):
        x = x + (tl.load(ptrs + i * LANES, ids + i * LANES < VOCAB, other=float("-inf")),)
    return x


@triton.jit
def sum_parts(x):
    """Of load_parts: the largest logit of each part [P], inf if one is NaN, and the sum of exp(logit - largest) [P]."""
    largest = x[0].to(tl.float32)
    for i in tl.static_range(1, PART // LANES):
        largest = tl.maximum(largest, x[i].to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
    largest = tl.max(tl.where(largest == largest, largest, float("inf")), 1)
    # A part without a finite logit, or with a bad one, must not meet inf - inf.
    shift = tl.where(largest == float("inf"), 0.0, tl.maximum(largest, -3.4028234663852886e38))[:, None]
    total = exponential32(x[0].to(tl.float32) - shift)
    for i in tl.static_range(1, PART // LANES):
        total = total + exponential32(x[i].to(tl.float32) - shift)
    return largest, _add_halves(total, LANES)


@triton.jit
def largest_other(x, ids, mask_token_id):
    """Of load_parts: the largest logit [P] that is not the mask token's."""
    best = tl.where(ids == mask_token_id, float("-inf"), x[0].to(tl.float32))
    for i in tl.static_range(1, PART // LANES):
        best = tl.maximum(best, tl.where(ids + i * LANES == mask_token_id, float("-inf"), x[i].to(tl.float32)))
    return tl.max(best, 1)


@triton.jit(do_not_specialize=["mask_token_id"])
def parts_kernel(logits_ptr, largest_ptr, total_ptr, best_ptr, mask_token_id, VOCAB: tl.constexpr, P: tl.constexpr):
    """Largest logit, sum of exponentials and largest logit but the mask token's of P parts of a position: [positions, parts] each."""
    parts: tl.constexpr = triton.cdiv(VOCAB, PART)
    groups: tl.constexpr = triton.cdiv(parts, P)
    position = (tl.program_id(0) // groups).to(tl.int64)
    part = tl.program_id(0) % groups * P + tl.arange(0, P)
    ids = part[:, None] * PART + tl.arange(0, LANES)[None, :]
    x = load_parts(logits_ptr + position * VOCAB + ids, ids, VOCAB)
    largest, total = sum_parts(x)
    best = largest
    if mask_token_id // (PART * P) == tl.program_id(0) % groups:
        best = largest_other(x, ids, mask_token_id)
    out = position * parts + part
    tl.store(largest_ptr + out, largest, part < parts)
    tl.store(total_ptr + out, total, part < parts)
    tl.store(best_ptr + out, best, part < parts)


@triton.jit
def _confidence(
    largest_ptr, total_ptr, best_ptr, position, inside, VOCAB: tl.constexpr, SNAP: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Of positions [BL]: confidence, NaN where the logits are bad; the chosen logit; its part; whether the logits are bad."""
    parts: tl.constexpr = triton.cdiv(VOCAB, PART)
    top = tl.where(inside, float("-inf"), 0.0)
    best, best_part = tl.where(inside, float("-inf"), 0.0), tl.where(inside, 0, 0)
    for first in range(0, parts, BP):
        part = first + tl.arange(0, BP)
        offset = position[:, None] * parts + part[None, :]
        exist = inside[:, None] & (part < parts)[None, :]
        top = tl.maximum(top, tl.max(tl.load(largest_ptr + offset, exist, other=float("-inf")), 1))
        x = tl.load(best_ptr + offset, exist, other=float("-inf"))
        here = tl.max(x, 1)
        at = tl.min(tl.where(x == here[:, None], part[None, :], parts), 1)
        best_part = tl.where(here > best, at, best_part)  # the first of equal parts stays
        best = tl.maximum(best, here)
    bad = (top == float("inf")) | (best == float("-inf"))
    top = tl.where(bad, 0.0, top).to(tl.float64)
    total = tl.zeros_like(top)
    for first in range(0, parts, BP):
        part = first + tl.arange(0, BP)
        offset = position[:, None] * parts + part[None, :]
        exist = inside[:, None] & (part < parts)[None, :]
        scale = exponential(tl.load(largest_ptr + offset, exist, other=float("-inf")).to(tl.float64) - top[:, None])
        weight = tl.load(total_ptr + offset, exist, other=0.0).to(tl.float64) * scale
        total += tl.sum((weight + SNAP) - SNAP, 1)  # multiples of one unit: exact in any order
    chosen = exponential(tl.where(bad, 0.0, best).to(tl.float64) - top)
    confidence = (chosen / tl.where(total > 0, total, 1.0)).to(tl.float32)
    return tl.where(bad, float("nan"), confidence), best, best_part, bad & inside


@triton.jit
def _find(logits_ptr, position, inside, best, best_part, mask_token_id, VOCAB: tl.constexpr):
    """The lowest id, not the mask token, of part best_part whose logit is best."""
    found = best_part * 0 + VOCAB
    for first in range(0, PART, 256):
        ids = best_part[:, None] * PART + (first + tl.arange(0, 256))[None, :]
        x = tl.load(logits_ptr + position[:, None] * VOCAB + ids, inside[:, None] & (ids < VOCAB), other=float("nan")).to(tl.float32)
        found = tl.minimum(found, tl.min(tl.where((x == best[:, None]) & (ids != mask_token_id), ids, VOCAB), 1))
    return found


@triton.jit(
    do_not_specialize=["length", "mask_token_id"],
    do_not_specialize_on_alignment=["tokens_ptr", "threshold_ptr", "editing_ptr", "min_unmask_ptr", "editable_ptr"],
)
def rules_kernel(
    largest_ptr, total_ptr, best_ptr, ids_ptr, logits_ptr, tokens_ptr, threshold_ptr, editing_ptr, min_unmask_ptr, editable_ptr,
    out_ptr, confidence_ptr, counts_ptr, length, mask_token_id,
    VOCAB: tl.constexpr, SNAP: tl.constexpr, BL: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Combines the parts of every position of a row, then applies M2T and T2T to the row. One program per row, BL positions at a time.

    The chosen ids are those of ids_ptr [positions, parts], or, if that is None, are searched for among the logits of one part.
    """
    row = tl.program_id(0)
    threshold = tl.load(threshold_ptr + row)
    least = tl.load(min_unmask_ptr + row)
    confident, masks, edits, wrong = 0, 0, 0, 0
    for first in range(0, length, BL):
        index = first + tl.arange(0, BL)
        inside = index < length
        position = row.to(tl.int64) * length + index
        confidence, best, best_part, bad = _confidence(largest_ptr, total_ptr, best_ptr, position, inside, VOCAB, SNAP, BP)
        if ids_ptr is None:
            choice = _find(logits_ptr, position, inside, best, best_part, mask_token_id, VOCAB)
        else:
            choice = tl.load(ids_ptr + position * tl.cdiv(VOCAB, PART) + best_part, inside, other=0)
        choice = tl.where(bad, 0, choice).to(tl.int64)
        tokens = tl.load(tokens_ptr + position, inside, other=0)
        masked = inside & (tokens == mask_token_id)
        confident += tl.sum((masked & (confidence > threshold)).to(tl.int32), 0)
        masks += tl.sum(masked.to(tl.int32), 0)
        wrong += tl.sum(bad.to(tl.int32), 0)
        if editing_ptr is not None:
            limit = tl.load(editing_ptr + row)
            limit = tl.where(limit >= 0, limit, 2.0)  # below 0 is off: no confidence is above 1
            edited = inside & (tokens != mask_token_id) & (choice != tokens) & (confidence > limit)
            if editable_ptr is not None:
                edited = edited & tl.load(editable_ptr + position, inside, other=0).to(tl.int1)
            edits += tl.sum(edited.to(tl.int32), 0)
            choice = tl.where(edited | masked, choice, tokens)
        else:
            choice = tl.where(masked, choice, tokens)
        tl.store(out_ptr + position, choice, inside)  # a masked position's is taken back below if it is not unmasked
        tl.store(confidence_ptr + position, confidence, inside)
    tl.debug_barrier()
    enough = confident >= least
    for first in range(0, length, BL):
        index = first + tl.arange(0, BL)
        inside = index < length
        position = row.to(tl.int64) * length + index
        tokens = tl.load(tokens_ptr + position, inside, other=0)
        confidence = tl.load(confidence_ptr + position, inside, other=0.0)
        masked = inside & (tokens == mask_token_id)
        accepted = masked & (confidence > threshold)
        if not enough:
            rank = tl.zeros((BL,), tl.int32)  # how many masked positions come first
            for other_first in range(0, length, BL):
                other_index = other_first + tl.arange(0, BL)
                other_position = row.to(tl.int64) * length + other_index
                others = tl.load(confidence_ptr + other_position, other_index < length, other=-1.0)
                other_masked = tl.load(tokens_ptr + other_position, other_index < length, other=-1) == mask_token_id
                earlier = (others[None, :] == confidence[:, None]) & (other_index[None, :] < index[:, None])
                before = other_masked[None, :] & ((others[None, :] > confidence[:, None]) | earlier)
                rank += tl.sum(before.to(tl.int32), 1)
            accepted = masked & (rank < least)
        if wrong > 0:
            tl.store(out_ptr + position, tokens, inside)
        else:
            tl.store(out_ptr + position, tokens, masked & (accepted == 0))
    unmasked = tl.where(enough, confident, tl.minimum(least, masks.to(tl.int64)).to(tl.int32))
    tl.store(counts_ptr + 2 * row, tl.where(wrong > 0, -1, unmasked))
    tl.store(counts_ptr + 2 * row + 1, tl.where(wrong > 0, -1, edits))
