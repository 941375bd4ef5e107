"""The kernels of the Triton backend. Imported at the first launch only.

A tile of queries is ``BLOCK_M`` rows: a few tokens times ``HEADS`` query heads of one KV head, so that the rows of a diffusion block see
the same keys. Keys that every row sees are walked without masks; what is left of the context and the own block follow each other in
the last tiles, under a mask. Scores are kept in base 2: softmax_scale times log2(e) is one factor.
"""

import triton
import triton.language as tl


@triton.jit
def _my_tile(
    tiles_ptr, order_ptr,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """This program's tile of the plan, KV head, part of its group of heads, and tokens: a plan's tile has up to ``TOKENS`` of them."""
    SUBGROUPS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    PIECES: tl.constexpr = TOKENS // (BLOCK_M // HEADS)
    pid = tl.program_id(0)
    piece = pid % PIECES
    subgroup = pid // PIECES % SUBGROUPS
    kv_head = pid // (PIECES * SUBGROUPS) % KV_HEADS
    tile = tl.load(order_ptr + pid // (PIECES * SUBGROUPS * KV_HEADS))
    begin = tl.load(tiles_ptr + tile * 7) + piece * (BLOCK_M // HEADS)
    return tile, kv_head, subgroup, begin, tl.minimum(tl.load(tiles_ptr + tile * 7 + 1), begin + BLOCK_M // HEADS)


@triton.jit
def _rows(begin, end, subgroup, GROUP: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Token and head (within its group) of each row of a tile that starts at token ``begin``, and whether it exists."""
    row = tl.arange(0, BLOCK_M)
    token = begin + row // HEADS
    head = subgroup * HEADS + row % HEADS
    return token, head, (token < end) & (head < GROUP)


@triton.jit
def _intervals(context_ptr, own_ptr, token, exists, context_begin, context_end):
    """Intervals of each row, and where the keys that all rows see end. Rows that do not exist see all of the context."""
    context_lo = tl.load(context_ptr + 2 * token, exists, other=0)
    context_hi = tl.load(context_ptr + 2 * token + 1, exists, other=2147483647)
    own_lo = tl.load(own_ptr + 2 * token, exists, other=0)
    own_hi = tl.load(own_ptr + 2 * token + 1, exists, other=0)
    common = tl.minimum(tl.min(context_hi, 0), context_end)
    common = tl.where(tl.max(context_lo, 0) <= context_begin, common, context_begin)
    return context_lo, context_hi, own_lo, own_hi, tl.maximum(common, context_begin)


@triton.jit
def _last_keys(j, split, rest, own_begin, total, BLOCK: tl.constexpr):
    """Keys j, j + 1, ... of the rest of the context followed by the own keys; which of them are context, which exist."""
    index = j + tl.arange(0, BLOCK)
    in_context = index < rest
    return tl.where(in_context, split + index, own_begin + (index - rest)), in_context, index < total


@triton.jit
def _visible(key, in_context, in_range, context_lo, context_hi, own_lo, own_hi):
    lo = tl.where(in_context[None, :], context_lo[:, None], own_lo[:, None])
    hi = tl.where(in_context[None, :], context_hi[:, None], own_hi[:, None])
    return (key[None, :] >= lo) & (key[None, :] < hi) & in_range[None, :]


@triton.jit
def _softmax_step(scores, v, peak, total, acc, scale):
    """One tile of keys: ``scores`` unscaled, -inf where masked. Returns the new peak, total and accumulator."""
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row may have seen no key yet, or products that overflow
    p = tl.exp2(scores * scale - shift[:, None])
    correction = tl.exp2(peak - shift)
    total = total * correction + tl.sum(p, 1)
    acc = acc * correction[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="tf32x3")
    return new_peak, total, acc


@triton.jit(do_not_specialize_on_alignment=["context_ptr", "own_ptr", "tiles_ptr", "order_ptr"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, context_ptr, own_ptr, tiles_ptr, order_ptr, q_stride, k_stride, v_stride, scale,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, TAIL_STAGES: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    tile, kv_head, subgroup, begin, end = _my_tile(tiles_ptr, order_ptr, GROUP, KV_HEADS, HEADS, TOKENS, BLOCK_M)
    if begin >= end:
        return
    tile_ptr = tiles_ptr + tile * 7
    context_begin, context_end = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    own_begin, own_end = tl.load(tile_ptr + 4), tl.load(tile_ptr + 5)

    token, head, exists = _rows(begin, end, subgroup, GROUP, HEADS, BLOCK_M)
    lo, hi, own_lo, own_hi, common = _intervals(context_ptr, own_ptr, token, exists, context_begin, context_end)
    head += kv_head * GROUP
    d = tl.arange(0, D)
    q = tl.load(q_ptr + token.to(tl.int64)[:, None] * q_stride + (head * D)[:, None] + d[None, :], exists[:, None], other=0.0)
    k_ptr += kv_head * D
    v_ptr += kv_head * D

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    n = tl.arange(0, BLOCK_N)
    k_step, v_step = k_stride.to(tl.int64), v_stride.to(tl.int64)  # offsets of whole tiles may exceed 2^31, those within one do not
    split = context_begin + (common - context_begin) // BLOCK_N * BLOCK_N
    for start in range(context_begin, split, BLOCK_N):
        k = tl.load(k_ptr + start * k_step + n[None, :] * k_stride + d[:, None])
        scores = tl.dot(q, k, input_precision="tf32x3")
        v = tl.load(v_ptr + start * v_step + n[:, None] * v_stride + d[None, :])
        peak, total, acc = _softmax_step(scores, v, peak, total, acc, scale)

    rest = context_end - split
    length = rest + own_end - own_begin
    for j in tl.range(0, length, TAIL_N, num_stages=TAIL_STAGES):
        key, in_context, in_range = _last_keys(j, split, rest, own_begin, length, TAIL_N)
        place = key.to(tl.int64)
        k = tl.load(k_ptr + place[None, :] * k_stride + d[:, None], in_range[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="tf32x3")
        visible = _visible(key, in_context, in_range, lo, hi, own_lo, own_hi)
        scores = tl.where(visible, scores, float("-inf"))
        v = tl.load(v_ptr + place[:, None] * v_stride + d[None, :], in_range[:, None], other=0.0)
        peak, total, acc = _softmax_step(scores, v, peak, total, acc, scale)

    # A row without keys gives 0; +inf as its log-sum-exp makes its probabilities 0 in the backward.
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    place = token.to(tl.int64) * Q_HEADS + head
    tl.store(out_ptr + place[:, None] * D + d[None, :], acc.to(q.dtype), exists[:, None])
    tl.store(lse_ptr + place, tl.where(empty, float("inf"), peak + tl.log2(total)), exists)


@triton.jit(do_not_specialize_on_alignment=["context_ptr", "own_ptr", "tiles_ptr", "order_ptr"])
def grad_q_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, context_ptr, own_ptr, tiles_ptr, order_ptr, grad_q_ptr, delta_ptr,
    grad_out_stride, q_stride, k_stride, v_stride, scale, softmax_scale,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, TAIL_STAGES: tl.constexpr,
):  # fmt: skip
    """The forward's walk; also writes delta, the row sums of grad_out * out, for :func:`grad_kv_kernel`."""
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    tile, kv_head, subgroup, begin, end = _my_tile(tiles_ptr, order_ptr, GROUP, KV_HEADS, HEADS, TOKENS, BLOCK_M)
    if begin >= end:
        return
    tile_ptr = tiles_ptr + tile * 7
    context_begin, context_end = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    own_begin, own_end = tl.load(tile_ptr + 4), tl.load(tile_ptr + 5)

    token, head, exists = _rows(begin, end, subgroup, GROUP, HEADS, BLOCK_M)
    lo, hi, own_lo, own_hi, common = _intervals(context_ptr, own_ptr, token, exists, context_begin, context_end)
    head += kv_head * GROUP
    d = tl.arange(0, D)
    place = token.to(tl.int64)
    q = tl.load(q_ptr + place[:, None] * q_stride + (head * D)[:, None] + d[None, :], exists[:, None], other=0.0)
    grad_out = tl.load(grad_out_ptr + place[:, None] * grad_out_stride + (head * D)[:, None] + d[None, :], exists[:, None], other=0.0)
    place = place * Q_HEADS + head
    out = tl.load(out_ptr + place[:, None] * D + d[None, :], exists[:, None], other=0.0)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + place, delta, exists)
    lse = tl.load(lse_ptr + place, exists, other=float("inf"))
    k_ptr += kv_head * D
    v_ptr += kv_head * D

    acc = tl.zeros([BLOCK_M, D], tl.float32)
    n = tl.arange(0, BLOCK_N)
    k_step, v_step = k_stride.to(tl.int64), v_stride.to(tl.int64)  # offsets of whole tiles may exceed 2^31, those within one do not
    split = context_begin + (common - context_begin) // BLOCK_N * BLOCK_N
    for start in range(context_begin, split, BLOCK_N):
        k = tl.load(k_ptr + start * k_step + n[:, None] * k_stride + d[None, :])
        v = tl.load(v_ptr + start * v_step + n[:, None] * v_stride + d[None, :])
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale - lse[:, None])
        grad_p = tl.dot(grad_out, tl.trans(v), tl.zeros(p.shape, tl.float32) - delta[:, None], input_precision="tf32x3")
        grad_scores = (p * grad_p).to(k.dtype)
        acc = tl.dot(grad_scores, k, acc, input_precision="tf32x3")

    rest = context_end - split
    length = rest + own_end - own_begin
    for j in tl.range(0, length, TAIL_N, num_stages=TAIL_STAGES):
        key, in_context, in_range = _last_keys(j, split, rest, own_begin, length, TAIL_N)
        at = key.to(tl.int64)
        k = tl.load(k_ptr + at[:, None] * k_stride + d[None, :], in_range[:, None], other=0.0)
        v = tl.load(v_ptr + at[:, None] * v_stride + d[None, :], in_range[:, None], other=0.0)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale - lse[:, None])
        p = tl.where(_visible(key, in_context, in_range, lo, hi, own_lo, own_hi), p, 0.0)
        grad_p = tl.dot(grad_out, tl.trans(v), tl.zeros(p.shape, tl.float32) - delta[:, None], input_precision="tf32x3")
        grad_scores = (p * grad_p).to(k.dtype)
        acc = tl.dot(grad_scores, k, acc, input_precision="tf32x3")
    tl.store(grad_q_ptr + place[:, None] * D + d[None, :], (acc * softmax_scale).to(q.dtype), exists[:, None])


@triton.jit
def _grad_kv_step(
    begin, end, which, kv_head, k, v, key, grad_k, grad_v,
    grad_out_ptr, q_ptr, lse_ptr, delta_ptr, context_ptr, own_ptr, grad_out_stride, q_stride, scale,
    Q_HEADS: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what ``BLOCK_M`` rows from token ``begin`` on give to the gradients of one tile of keys. Scores are transposed: keys by rows."""
    token, head, exists = _rows(begin, end, 0, GROUP, HEADS, BLOCK_M)
    head += kv_head * GROUP
    d = tl.arange(0, D)
    place = token.to(tl.int64)
    q = tl.load(q_ptr + place[:, None] * q_stride + (head * D)[:, None] + d[None, :], exists[:, None], other=0.0)
    grad_out = tl.load(grad_out_ptr + place[:, None] * grad_out_stride + (head * D)[:, None] + d[None, :], exists[:, None], other=0.0)
    lse = tl.load(lse_ptr + place * Q_HEADS + head, exists, other=float("inf"))
    minus_lse = tl.zeros([BLOCK_N, BLOCK_M], tl.float32) - (lse / scale)[None, :]
    p = tl.exp2(tl.dot(k, tl.trans(q), minus_lse, input_precision="tf32x3") * scale)
    if MASKED:
        interval_ptr = tl.where(which == 0, context_ptr, own_ptr) + 2 * place
        lo = tl.load(interval_ptr, exists, other=0)
        hi = tl.load(interval_ptr + 1, exists, other=0)
        p = tl.where((key[:, None] >= lo[None, :]) & (key[:, None] < hi[None, :]), p, 0.0)
    delta = tl.load(delta_ptr + place * Q_HEADS + head, exists, other=0.0)
    grad_v = tl.dot(p.to(q.dtype), grad_out, grad_v, input_precision="tf32x3")
    minus_delta = tl.zeros(p.shape, tl.float32) - delta[None, :]
    grad_scores = (p * tl.dot(v, tl.trans(grad_out), minus_delta, input_precision="tf32x3")).to(q.dtype)
    grad_k = tl.dot(grad_scores, q, grad_k, input_precision="tf32x3")
    return grad_k, grad_v


@triton.jit(
    do_not_specialize=["num_keys", "splits"],
    do_not_specialize_on_alignment=["context_ptr", "own_ptr", "offsets_ptr", "stretches_ptr", "order_ptr"],
)
def grad_kv_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, context_ptr, own_ptr, offsets_ptr, stretches_ptr, order_ptr,
    grad_k_ptr, grad_v_ptr, grad_out_stride, q_stride, k_stride, v_stride, scale, softmax_scale, num_keys, splits,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PLAN_N: tl.constexpr, MASKED_STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one KV head, over all heads of its group: no atomics. A split is an even share of the queries, summed later."""
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    TOKENS: tl.constexpr = BLOCK_M // HEADS
    PIECES: tl.constexpr = PLAN_N // BLOCK_N
    pid = tl.program_id(0)
    share = pid % splits
    piece = pid // splits % PIECES
    kv_head = pid // splits // PIECES % KV_HEADS
    tile = tl.load(order_ptr + pid // splits // (PIECES * KV_HEADS))
    key = tile * PLAN_N + piece * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = key < num_keys
    d = tl.arange(0, D)
    place = key.to(tl.int64)
    k = tl.load(k_ptr + place[:, None] * k_stride + kv_head * D + d[None, :], exists[:, None], other=0.0)
    v = tl.load(v_ptr + place[:, None] * v_stride + kv_head * D + d[None, :], exists[:, None], other=0.0)
    grad_k = tl.zeros([BLOCK_N, D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, D], tl.float32)
    first, middle, last = tl.load(offsets_ptr + 3 * tile), tl.load(offsets_ptr + 3 * tile + 1), tl.load(offsets_ptr + 3 * tile + 2)
    for i in tl.range(first, middle, num_stages=1):
        begin, end = tl.load(stretches_ptr + 3 * i), tl.load(stretches_ptr + 3 * i + 1)
        step = tl.cdiv(tl.cdiv(end - begin, TOKENS), splits) * TOKENS
        begin += share * step
        end = tl.minimum(end, begin + step)
        for at in range(begin, end, TOKENS):
            grad_k, grad_v = _grad_kv_step(
                at, end, 0, kv_head, k, v, key, grad_k, grad_v,
                grad_out_ptr, q_ptr, lse_ptr, delta_ptr, context_ptr, own_ptr, grad_out_stride, q_stride, scale,
                Q_HEADS, D, GROUP, HEADS, BLOCK_M, BLOCK_N, False,
            )  # fmt: skip
    for i in tl.range(middle, last, num_stages=1):
        begin, end, which = tl.load(stretches_ptr + 3 * i), tl.load(stretches_ptr + 3 * i + 1), tl.load(stretches_ptr + 3 * i + 2)
        step = tl.cdiv(tl.cdiv(end - begin, TOKENS), splits) * TOKENS
        begin += share * step
        end = tl.minimum(end, begin + step)
        for at in tl.range(begin, end, TOKENS, num_stages=MASKED_STAGES):
            grad_k, grad_v = _grad_kv_step(
                at, end, which, kv_head, k, v, key, grad_k, grad_v,
                grad_out_ptr, q_ptr, lse_ptr, delta_ptr, context_ptr, own_ptr, grad_out_stride, q_stride, scale,
                Q_HEADS, D, GROUP, HEADS, BLOCK_M, BLOCK_N, True,
            )  # fmt: skip
    place = (share.to(tl.int64) * num_keys + place) * KV_HEADS + kv_head
    kind = grad_k_ptr.dtype.element_ty
    tl.store(grad_k_ptr + place[:, None] * D + d[None, :], (grad_k * softmax_scale).to(kind), exists[:, None])
    tl.store(grad_v_ptr + place[:, None] * D + d[None, :], grad_v.to(kind), exists[:, None])


@triton.jit(do_not_specialize=["size", "splits"])
def sum_splits_kernel(part_ptr, out_ptr, size, splits, BLOCK: tl.constexpr):
    """out[i] = sum of part[s, i] over s, in the order of s."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros([BLOCK], tl.float32)
    for s in range(0, splits):
        total += tl.load(part_ptr + s * size.to(tl.int64) + at, inside, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), inside)
