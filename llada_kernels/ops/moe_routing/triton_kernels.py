"""The kernels of the Triton backend. Imported at the first launch only."""

import triton
import triton.language as tl

#: Below the key of every number, -inf included.
_TAKEN: tl.constexpr = tl.constexpr(-(2**31))


@triton.jit
def _key(x):
    """int32 that orders as floats do, with -0 == +0 and NaN above everything (as PyTorch sorts)."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), 0x7FFFFFFF)


@triton.jit
def _value(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _scores(logits, exist, SOFTMAX: tl.constexpr):
    """sigmoid, or softmax over both inner dimensions, of logits [T, groups, size], 0 where no expert exists."""
    if SOFTMAX:
        weight = tl.exp(logits - tl.max(tl.max(tl.where(exist, logits, float("-inf")), 2), 1)[:, None, None])
        weight = tl.where(exist, weight, 0.0)
        scores = tl.math.div_rn(weight, tl.zeros_like(weight) + tl.sum(tl.sum(weight, 2), 1)[:, None, None])
    else:
        scores = tl.math.div_rn(tl.zeros_like(logits) + 1.0, 1.0 + tl.exp(-logits))
    return scores


@triton.jit
def _load_scores(logits_ptr, bias_ptr, token, tokens, E: tl.constexpr, GROUPS: tl.constexpr, SOFTMAX: tl.constexpr):
    """Scores [T, groups, size], keys of the biased scores, experts [1, groups, size] and which of them exist, both padded."""
    size: tl.constexpr = E // GROUPS
    group = tl.arange(0, triton.next_power_of_2(GROUPS))[None, :, None]
    member = tl.arange(0, triton.next_power_of_2(size))[None, None, :]
    expert = group * size + member
    exist = (group < GROUPS) & (member < size)
    offset = token.to(tl.int64)[:, None, None] * E + expert
    logits = tl.load(logits_ptr + offset, exist & (token < tokens)[:, None, None], other=0.0)
    scores = _scores(logits, exist, SOFTMAX)
    biased = scores
    if bias_ptr is not None:
        biased = scores + tl.load(bias_ptr + expert, exist, other=0.0)
    return scores, tl.where(exist, _key(biased), _TAKEN), expert, exist


@triton.jit(do_not_specialize_on_alignment=["bias_ptr"])
def pool_kernel(
    logits_ptr, bias_ptr, maxima_ptr, pool_ptr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr, E: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """pool [blocks, E]: whether an expert is among the CAPACITY largest of the block's maxima [blocks, E], of keys of biased scores."""
    block = tl.program_id(0)
    begin = block * BLOCK
    maxima = tl.full((triton.next_power_of_2(E),), _TAKEN, tl.int32)
    for first in range(0, BLOCK, 4):
        token = begin + first + tl.arange(0, 4)
        _, key, _, _ = _load_scores(logits_ptr, bias_ptr, token, begin + BLOCK, E, 1, SOFTMAX)
        key = tl.where((token < begin + BLOCK)[:, None, None], key, _TAKEN)
        maxima = tl.maximum(maxima, tl.reshape(tl.max(key, 0), maxima.shape))
    expert = tl.arange(0, triton.next_power_of_2(E))
    row = block.to(tl.int64) * E
    tl.store(maxima_ptr + row + expert, maxima, expert < E)
    tl.debug_barrier()
    rank = tl.zeros_like(expert)  # how many experts come first
    for first in range(0, E, 16):
        other = first + tl.arange(0, 16)[None, :]
        theirs = tl.load(maxima_ptr + row + other, other < E, other=_TAKEN)
        before = (theirs > maxima[:, None]) | ((theirs == maxima[:, None]) & (other < expert[:, None]))
        rank += tl.sum(((other < E) & before).to(tl.int32), 1)
    tl.store(pool_ptr + row + expert, (rank < CAPACITY).to(tl.int8), expert < E)


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["bias_ptr"])
def choose_kernel(
    logits_ptr, bias_ptr, pool_ptr, ids_ptr, weights_ptr, tokens, scale, BLOCK: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, TOPK_GROUP: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """The choices of T tokens, one after the other: the largest key, the lowest index among equals, is then taken out."""
    token = tl.program_id(0) * T + tl.arange(0, T)
    scores, key, expert, exist = _load_scores(logits_ptr, bias_ptr, token, tokens, E, GROUPS, SOFTMAX)
    lowest: tl.constexpr = -2139095041  # the key of -inf
    if TOPK_GROUP < GROUPS:
        largest = tl.max(key, 2)
        at = tl.min(tl.where(key == largest[:, :, None], expert, E), 2)
        second = tl.max(tl.where(expert == at[:, :, None], _TAKEN, key), 2)
        group = tl.arange(0, triton.next_power_of_2(GROUPS))[None, :]
        group_key = tl.where(group < GROUPS, _key(_value(largest) + _value(second)), _TAKEN)
        allowed = tl.zeros_like(group_key)
        for _ in range(TOPK_GROUP):
            best = tl.min(tl.where(group_key == tl.max(group_key, 1)[:, None], group, GROUPS), 1)[:, None]
            allowed = tl.where(group == best, 1, allowed)
            group_key = tl.where(group == best, _TAKEN, group_key)
        key = tl.where(exist & (allowed[:, :, None] == 0), lowest, key)
    if pool_ptr is not None:
        offset = (token // BLOCK).to(tl.int64)[:, None, None] * E + expert
        pooled = tl.load(pool_ptr + offset, exist & (token < tokens)[:, None, None], other=0)
        key = tl.where(exist & (pooled == 0), lowest, key)
    k = tl.arange(0, triton.next_power_of_2(K))[None, :]
    ids = tl.zeros((T, triton.next_power_of_2(K)), tl.int32)
    weights = tl.zeros((T, triton.next_power_of_2(K)), tl.float32)
    for i in range(K):
        top = tl.max(tl.max(key, 2), 1)
        chosen = tl.min(tl.min(tl.where(key == top[:, None, None], expert, E), 2), 1)
        here = expert == chosen[:, None, None]
        weight = tl.sum(tl.sum(tl.where(here & exist, scores, 0.0), 2), 1)
        ids = tl.where(k == i, chosen[:, None], ids)
        weights = tl.where(k == i, weight[:, None], weights)
        key = tl.where(here, _TAKEN, key)
    if NORMALIZE and K > 1:
        weights = tl.math.div_rn(weights, tl.zeros_like(weights) + (tl.sum(weights, 1) + 1e-20)[:, None])
    out = token.to(tl.int64)[:, None] * K + k
    stored = (token < tokens)[:, None] & (k < K)
    tl.store(ids_ptr + out, ids, stored)
    tl.store(weights_ptr + out, weights * scale, stored)


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["grad_ptr", "ids_ptr"])
def choose_backward_kernel(
    grad_ptr, logits_ptr, ids_ptr, out_ptr, tokens, scale, E: tl.constexpr, K: tl.constexpr, SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """With s the chosen scores, S = sum + 1e-20 and g = scale * grad: ds = (g - (g . s) / S) / S, or g without normalisation."""
    token = tl.program_id(0) * T + tl.arange(0, T)
    scores, _, expert, exist = _load_scores(logits_ptr, None, token, tokens, E, 1, SOFTMAX)
    row = token.to(tl.int64) * K
    gradient = tl.zeros_like(scores)  # of the scores, per expert
    chosen = tl.zeros_like(scores)
    for i in range(K):
        here = tl.load(ids_ptr + row + i, token < tokens, other=E)[:, None, None] == expert
        gradient = tl.where(here, (tl.load(grad_ptr + row + i, token < tokens, other=0.0) * scale)[:, None, None], gradient)
        chosen = tl.where(here, 1.0, chosen)
    if NORMALIZE and K > 1:
        total = tl.sum(tl.sum(tl.where(chosen > 0, scores, 0.0), 2), 1) + 1e-20
        mean = tl.math.div_rn(tl.sum(tl.sum(tl.where(chosen > 0, gradient * scores, 0.0), 2), 1), total)
        total = tl.zeros_like(scores) + total[:, None, None]
        gradient = tl.where(chosen > 0, tl.math.div_rn(gradient - mean[:, None, None], total), 0.0)
    if SOFTMAX:
        mean = tl.sum(tl.sum(tl.where(chosen > 0, gradient * scores, 0.0), 2), 1)
        gradient = scores * (gradient - mean[:, None, None])
    else:
        gradient = gradient * scores * (1.0 - scores)
    offset = token.to(tl.int64)[:, None, None] * E + expert
    tl.store(out_ptr + offset, gradient, exist & (token < tokens)[:, None, None])


@triton.jit(do_not_specialize=["slots"])
def count_kernel(ids_ptr, counts_ptr, slots, E: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """counts [chunks, BINS]: slots of each expert among CHUNK consecutive slots."""
    slot = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + slot, slot < slots, other=E)
    tl.store(counts_ptr + tl.program_id(0) * BINS + tl.arange(0, BINS), tl.histogram(ids, BINS))


@triton.jit(do_not_specialize=["chunks"])
def scan_kernel(counts_ptr, before_ptr, totals_ptr, chunks, BINS: tl.constexpr, SOME: tl.constexpr):
    """before [chunks, BINS]: slots of an expert in earlier chunks; totals [BINS]: in all. Of SOME experts, 128 chunks at a time."""
    bins = tl.program_id(0) * SOME + tl.arange(0, SOME)
    total = tl.zeros((SOME,), tl.int32)
    for first in range(0, chunks, 128):
        chunk = (first + tl.arange(0, 128))[:, None]
        place = chunk * BINS + bins[None, :]
        counts = tl.load(counts_ptr + place, chunk < chunks, other=0)
        tl.store(before_ptr + place, total[None, :] + tl.cumsum(counts, 0) - counts, chunk < chunks)
        total += tl.sum(counts, 0)
    tl.store(totals_ptr + bins, total)


@triton.jit(do_not_specialize=["slots"])
def sort_kernel(
    ids_ptr, counts_ptr, starts_ptr, offsets_ptr, permutation_ptr, slots, E: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
    SCANNED: tl.constexpr,
):  # fmt: skip
    """The stable permutation of one chunk: behind the slots of lower experts, of earlier chunks, and earlier ones of the chunk.

    ``counts`` are those of all chunks; or where scan_kernel ran (SCANNED) its totals, and ``starts`` what it found before each chunk.
    """
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    bins = tl.arange(0, BINS)
    if SCANNED:
        total = tl.load(counts_ptr + bins)
        before = tl.load(starts_ptr + chunk * BINS + bins)
    else:
        total, before = tl.zeros((BINS,), tl.int32), tl.zeros((BINS,), tl.int32)
        for first in range(0, chunks, 16):
            other = (first + tl.arange(0, 16))[:, None]
            counts = tl.load(counts_ptr + other * BINS + bins[None, :], other < chunks, other=0)
            total += tl.sum(counts, 0)
            before += tl.sum(tl.where(other < chunk, counts, 0), 0)
    lower = tl.cumsum(total, 0) - total
    if chunk == 0:
        tl.store(offsets_ptr + bins, lower, bins <= E)
    tl.store(starts_ptr + chunk * BINS + bins, lower + before)
    tl.debug_barrier()
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + slot, slot < slots, other=E)
    rank = tl.load(starts_ptr + chunk * BINS + ids)
    for first in range(0, CHUNK, 16):
        other = chunk * CHUNK + first + tl.arange(0, 16)[None, :]
        theirs = tl.load(ids_ptr + other, other < slots, other=E)
        rank += tl.sum(((theirs == ids[:, None]) & (other < slot[:, None])).to(tl.int32), 1)
    tl.store(permutation_ptr + rank, slot, slot < slots)
