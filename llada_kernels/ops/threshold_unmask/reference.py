"""Reference of threshold_unmask.

Equal tokens in all backends need equal probabilities, so the arithmetic is fixed to the bit. At
temperature 0, so that one pass over the logits suffices and 16 logits fit a register:

- the vocabulary is cut into parts of 1024 ids; a part's sum of exp(x - its largest logit) is taken
  in fp32: a polynomial of fused multiply-adds (each rounded once), summed in 64 lanes whose halves
  are then added to each other. Any SIMD width, any number of threads or CTAs can do that, and a
  part needs nothing but its own logits;
- a part counts its sum times exp(its largest - the largest of all), in fp64 on the grid below.

At temperature > 0, where a cumulative sum is needed:

- ``exp`` is a polynomial evaluated in fp64 by separate multiplications and additions;
- each weight exp((x - max) / temperature) is rounded to a multiple of 2**-b, b chosen such that any
  sum of V weights is below 2**53 of these units. Sums of weights are then exact, hence equal in any
  order: sequential, vectorised, by threads or as a parallel scan. b is 34 at V = 157184: each
  weight is off by at most 3e-11 of the largest one;
- what remains are single correctly rounded operations: one division for a confidence, one product
  each for the target mass of top_p and of the draw.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import compute_dtype
from ..dispatch import Backend
from .arguments import Rules

#: Logits handled at once in fp64.
_CHUNK_ELEMENTS = 1 << 22

_LOG2E = 1.4426950408889634
_LN2_HIGH = 6.93147180369123816490e-01  # trailing bits zero: products with small integers are exact
_LN2_LOW = 1.90821492927058770002e-10
_ROUND = 6755399441055744.0  # 1.5 * 2**52: adding and subtracting it rounds to an integer
_TAYLOR = tuple(1.0 / f for f in (39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2, 1, 1))

_PART = 1024  # ids of a part
_LANES = 64  # of the fp32 sum over a part
_LOG2E32 = 1.4426950216293335  # the nearest fp32
#: Of 2**r for |r| <= 0.5, relative error 9e-8, as fp32 holds them.
_MINIMAX = torch.tensor((1.3264727e-3, 9.6715130e-3, 5.5507336e-2, 2.4022242e-1, 6.9314700e-1, 1.0), dtype=torch.float32).tolist()

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW32 = 0xFFFFFFFF


def exponential(z: Tensor) -> Tensor:
    """fp64 exp(z) for z <= 0, within 2e-14 relative; exp(-64) for anything smaller."""
    z = z.clamp(min=-64.0)  # far below the grid, and keeps -inf out of the arithmetic
    k = (z * _LOG2E + _ROUND) - _ROUND
    r = (z - k * _LN2_HIGH) - k * _LN2_LOW
    p = torch.full_like(r, _TAYLOR[0])
    for coefficient in _TAYLOR[1:]:
        p = p * r + coefficient
    power = ((k.to(torch.int64) + 1023) << 52).view(torch.float64)
    return p * power


def fused_multiply_add(a: Tensor, b: Tensor, c: float | Tensor) -> Tensor:
    """a * b + c, rounded once, of fp32 tensors and a number that fp32 holds."""
    product = a.double() * b.double()  # exact
    total = product + c
    error = (product - (total - (total - product))) + (c - (total - product))  # of that sum, exact
    # Rounded to fp32 now, a sum that fp64 rounded onto the middle between two numbers could go the wrong way. Of the two fp64 numbers
    # round the exact sum the one with an odd last bit is on its right side.
    bits = total.view(torch.int64)
    step = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where((error != 0) & error.isfinite() & (bits & 1 == 0), bits + step, bits)
    return odd.view(torch.float64).float()


def exponential32(z: Tensor) -> Tensor:
    """fp32 exp(z) for fp32 z <= 0, within 2e-7 (1 - z / 8) relative; exp(-55) for anything below -55."""
    z = z.clamp(min=-55.0)
    # A kernel's fused multiply-adds: k from one that adds 1.5 * 2**23, r from a second. Neither is rounded but as these are.
    scaled = z.double() * _LOG2E32
    k = scaled.round()
    r = (scaled - k).float()
    p = torch.full_like(r, _MINIMAX[0])
    for coefficient in _MINIMAX[1:]:
        p = fused_multiply_add(p, r, coefficient)
    power = ((k.nan_to_num().to(torch.int32) + 127) << 23).view(torch.float32)
    return p * power


def sum_of_weights(x: Tensor) -> Tensor:
    """fp64 [n]: sum of exp(x - max) over each row of x [n, V], as at temperature 0."""
    n, vocab = x.shape
    parts = -(-vocab // _PART)
    x = torch.nn.functional.pad(x, (0, parts * _PART - vocab), value=-torch.inf).view(n, parts, _PART)
    largest = x.amax(2, keepdim=True)
    weight = exponential32((x - largest.clamp(min=torch.finfo(x.dtype).min)).float())
    weight = weight.view(n, parts, _PART // _LANES, _LANES)
    total = weight[:, :, 0]
    for i in range(1, _PART // _LANES):
        total = total + weight[:, :, i]
    while total.shape[2] > 1:
        low, high = total.chunk(2, dim=2)
        total = low + high
    largest = largest.double()
    scale = exponential((largest - largest.amax(1, keepdim=True)).squeeze(2))
    return to_grid(total.squeeze(2).double() * scale, vocab).sum(1)


def to_grid(weight: Tensor, vocab: int) -> Tensor:
    """Weights in [0, 1] as multiples of a unit of which sums of ``vocab`` terms are exact."""
    # 1.5 * 2**e with 2**e > vocab: adding it leaves multiples of 2**(e - 52).
    snap = 1.5 * 2.0 ** max(2, vocab.bit_length())
    return (weight + snap) - snap


def philox_uniform(seed: Tensor, position: Tensor, forward_index: Tensor) -> Tensor:
    """fp64 in [0, 1), 53 bits: the first two words of Philox4x32-10.

    Key: the two halves of ``seed``; counter: low and high half of ``position``, then of
    ``forward_index``. All int64 of one shape.
    """
    c = [position & _LOW32, (position >> 32) & _LOW32]
    c += [forward_index & _LOW32, (forward_index >> 32) & _LOW32]
    key = [seed & _LOW32, (seed >> 32) & _LOW32]
    for _ in range(10):
        # Products of two 32-bit numbers wrap to the right 64 bits; the mask undoes the sign.
        first, second = c[0] * _PHILOX_MULTIPLIERS[0], c[2] * _PHILOX_MULTIPLIERS[1]
        c = [
            ((second >> 32) & _LOW32) ^ c[1] ^ key[0],
            second & _LOW32,
            ((first >> 32) & _LOW32) ^ c[3] ^ key[1],
            first & _LOW32,
        ]
        key = [(k + step) & _LOW32 for k, step in zip(key, _PHILOX_KEY_STEPS, strict=True)]
    bits = (c[0] << 21) | (c[1] >> 11)
    return bits.to(torch.float64) * 2.0**-53


def _kept(x: Tensor, weight: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """bool like x: what top_k, then top_p leave. Both are prefixes of the same sorted order."""
    n, vocab = x.shape
    order = torch.sort(x, dim=1, descending=True, stable=True).indices
    cumulative = weight.gather(1, order).cumsum(1)
    size = x.new_full((n, 1), vocab, dtype=torch.int64)
    if top_k is not None:
        k = top_k.unsqueeze(1).clamp(max=vocab)
        size = torch.where(k > 0, k, size)
    if top_p is not None:
        p = top_p.unsqueeze(1)
        reach = p * cumulative.gather(1, size - 1)
        shortest = (cumulative < reach).sum(1, keepdim=True) + 1
        size = torch.where(p < 1, shortest, size)
    ranks = torch.arange(vocab, device=x.device).expand(n, vocab)
    return torch.zeros_like(x, dtype=torch.bool).scatter(1, order, ranks < size)


def _choose(
    x: Tensor,
    mask_token_id: int,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    uniform: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of logits [n, V]: chosen id, fp32 confidence, and whether the row is bad."""
    vocab = x.shape[1]
    is_mask = torch.arange(vocab, device=x.device) == mask_token_id
    best_value, best = x.masked_fill(is_mask, -torch.inf).max(1)
    bad = x.isnan().any(1) | (x == torch.inf).any(1) | (best_value == -torch.inf)
    x = x.masked_fill(bad.unsqueeze(1), 0).to(compute_dtype(x))
    top = x.double().amax(1, keepdim=True)
    choice = best.masked_fill(bad, 0)
    # Not rounded to the grid, so that this confidence is never 0.
    chosen = exponential((x.gather(1, choice.unsqueeze(1)).double() - top).squeeze(1))
    confidence = chosen / sum_of_weights(x)
    if temperature is not None:
        assert uniform is not None
        sampled = temperature > 0
        weight = to_grid(exponential((x.double() - top) / torch.where(sampled, temperature, 1.0).unsqueeze(1)), vocab)
        if top_k is not None or top_p is not None:
            weight = weight.masked_fill(~_kept(x, weight, top_k, top_p), 0)
        mass = weight.masked_fill(is_mask, 0).cumsum(1)
        target = uniform.unsqueeze(1) * mass[:, -1:]
        drawn = torch.where(mass[:, -1] > 0, (mass <= target).sum(1), choice)
        drawn_confidence = weight.gather(1, drawn.unsqueeze(1)).squeeze(1) / weight.sum(1)
        choice = torch.where(sampled, drawn, choice)
        confidence = torch.where(sampled, drawn_confidence, confidence)
    return choice, confidence.float().masked_fill(bad, torch.nan), bad


def _raise_bad(bad: Tensor, logits: Tensor) -> None:
    row, position = (int(i) for i in bad.nonzero()[0])
    x = logits[row, position]
    if x.isnan().any():
        got = "NaN"
    elif (x == torch.inf).any():
        got = "+inf"
    else:
        got = "no finite logit besides the mask token's"
    raise ValueError(f"logits: expected finite numbers, got {got} in row {row}, position {position}")


def threshold_unmask_reference(logits: Tensor, rules: Rules) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of Unmasked."""
    rows, length, vocab = logits.shape
    logits = logits.detach()
    flat = logits.reshape(rows * length, vocab)
    uniform = None
    if rules.temperature is not None:
        assert rules.seed is not None and rules.forward_index is not None
        positions = rules.positions
        if positions is None:
            positions = torch.arange(length, device=logits.device).expand(rows, length)
        key = (t.unsqueeze(1).expand(rows, length) for t in (rules.seed, rules.forward_index))
        seeds, forwards = key
        uniform = philox_uniform(seeds, positions, forwards).flatten()

    def each(per_row: Tensor | None) -> Tensor | None:
        return None if per_row is None else per_row.repeat_interleave(length)

    per_position = [each(rules.temperature), each(rules.top_k), each(rules.top_p), uniform]
    choice = rules.tokens.new_empty(rows * length)
    confidence = torch.empty_like(choice, dtype=torch.float32)
    bad = torch.empty_like(choice, dtype=torch.bool)
    step = max(1, _CHUNK_ELEMENTS // vocab)
    for begin in range(0, rows * length, step):
        part = slice(begin, begin + step)
        own = [None if t is None else t[part] for t in per_position]
        choice[part], confidence[part], bad[part] = _choose(flat[part], rules.mask_token_id, *own)
    choice, confidence, bad = (t.view(rows, length) for t in (choice, confidence, bad))
    if logits.device.type == "cpu" and not torch.compiler.is_compiling() and bad.any():
        _raise_bad(bad, logits)
    return _apply(choice, confidence, bad, rules)


def _apply(choice: Tensor, confidence: Tensor, bad: Tensor, rules: Rules) -> tuple[Tensor, Tensor, Tensor]:
    """The M2T and T2T rules."""
    tokens, mask_token_id, threshold, editing_threshold, min_unmask, editable = rules.greedy()
    masked = tokens == mask_token_id
    confident = masked & (confidence > threshold.unsqueeze(1))
    order = torch.where(masked, confidence, -1.0).sort(dim=1, descending=True, stable=True).indices
    rank = order.argsort(1)
    fallback = masked & (rank < min_unmask.unsqueeze(1))
    enough = confident.sum(1) >= min_unmask
    unmasked = torch.where(enough.unsqueeze(1), confident, fallback)
    edited = torch.zeros_like(masked)
    if editing_threshold is not None:
        limit = editing_threshold.unsqueeze(1)
        edited = ~masked & (choice != tokens) & (limit >= 0) & (confidence > limit)
        if editable is not None:
            edited = edited & editable
    wrong = bad.any(1)
    written = (unmasked | edited) & ~wrong.unsqueeze(1)
    counts = torch.stack((unmasked.sum(1), edited.sum(1)), dim=1).masked_fill(wrong.unsqueeze(1), -1)
    return torch.where(written, choice, tokens), confidence, counts.to(torch.int32)


BACKEND = Backend("reference", lambda *_: None, threshold_unmask_reference)
