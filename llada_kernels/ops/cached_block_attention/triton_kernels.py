"""The kernels of the Triton backend. Imported at the first launch only.

A row's context is cut into chunks by its own length alone, and the results of the chunks and of the new keys are merged from first to last.
Whether one program walks all of them or each has a program of its own depends on the batch; the order of operations does not.
"""

import triton
import triton.language as tl

from ..block_attention.triton_kernels import _my_tile, _rows, _softmax_step


@triton.jit
def _chunk_keys(context, MOST: tl.constexpr, LEAST: tl.constexpr):
    """Keys in a chunk of a context of that length: at most ``MOST`` chunks, of ``LEAST`` keys or more."""
    return tl.maximum(tl.cdiv(tl.cdiv(context, MOST), 64) * 64, LEAST)


@triton.jit
def _merge(peak, total, acc, other_peak, other_total, other_acc):
    """Both parts with a common peak. Written with fma, so that every kernel rounds alike. A part without keys has peak -inf."""
    new_peak = tl.maximum(peak, other_peak)
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    a, b = tl.exp2(peak - shift), tl.exp2(other_peak - shift)
    return new_peak, tl.fma(total, a, other_total * b), tl.fma(acc, tl.broadcast_to(a[:, None], acc.shape), other_acc * b[:, None])


@triton.jit(
    do_not_specialize=["page_table_stride", "most_chunks"],
    do_not_specialize_on_alignment=["page_table_ptr", "own_ptr", "tiles_ptr", "order_ptr", "rows_ptr"],
)
def cached_kernel(
    q_ptr, k_ptr, v_ptr, cache_k_ptr, cache_v_ptr, page_table_ptr, own_ptr, tiles_ptr, order_ptr, rows_ptr,
    out_ptr, part_acc_ptr, part_peak_ptr, part_total_ptr,
    q_stride, k_stride, v_stride, cache_k_stride, cache_v_stride, page_table_stride, most_chunks, scale,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MOST: tl.constexpr, LEAST: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid: (programs of the plan, chunks + 1 if ``SPLIT`` else 1); the last chunk is the new keys."""
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    tile, kv_head, subgroup, begin, end = _my_tile(tiles_ptr, order_ptr, GROUP, KV_HEADS, HEADS, TOKENS, BLOCK_M)
    if begin >= end:
        return
    tile_ptr = tiles_ptr + tile * 7
    context, own_begin, own_end = tl.load(tile_ptr + 3), tl.load(tile_ptr + 4), tl.load(tile_ptr + 5)
    chunk_keys = _chunk_keys(context, MOST, LEAST)
    chunks = tl.cdiv(context, chunk_keys)
    first_chunk, last_chunk = 0, chunks
    if SPLIT:
        chunk = tl.program_id(1)
        if (chunk >= chunks) & (chunk < most_chunks):
            return
        first_chunk = tl.minimum(chunk, chunks)
        last_chunk = tl.minimum(chunk + 1, chunks)

    token, head, exists = _rows(begin, end, subgroup, GROUP, HEADS, BLOCK_M)
    head += kv_head * GROUP
    d = tl.arange(0, D)
    n = tl.arange(0, BLOCK_N)
    q = tl.load(q_ptr + token.to(tl.int64)[:, None] * q_stride + (head * D)[:, None] + d[None, :], exists[:, None], other=0.0)
    page_table_ptr += tl.load(rows_ptr + tile) * page_table_stride.to(tl.int64)
    cache_k_ptr += kv_head * D
    cache_v_ptr += kv_head * D
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)

    for index in tl.range(first_chunk, last_chunk, num_stages=1):
        chunk_peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        chunk_total = tl.zeros([BLOCK_M], tl.float32)
        chunk_acc = tl.zeros([BLOCK_M, D], tl.float32)
        chunk_end = tl.minimum(context, (index + 1) * chunk_keys)
        for start in range(index * chunk_keys, chunk_end, BLOCK_N):
            key = start + n
            inside = key < chunk_end
            page = tl.load(page_table_ptr + key // PAGE_SIZE, inside, other=0)
            place = page.to(tl.int64) * PAGE_SIZE + key % PAGE_SIZE
            k = tl.load(cache_k_ptr + place[None, :] * cache_k_stride + d[:, None], inside[None, :], other=0.0)
            scores = tl.where(inside[None, :], tl.dot(q, k, input_precision="tf32x3"), float("-inf"))
            v = tl.load(cache_v_ptr + place[:, None] * cache_v_stride + d[None, :], inside[:, None], other=0.0)
            chunk_peak, chunk_total, chunk_acc = _softmax_step(scores, v, chunk_peak, chunk_total, chunk_acc, scale)
        peak, total, acc = _merge(peak, total, acc, chunk_peak, chunk_total, chunk_acc)

    new = True
    if SPLIT:
        new = tl.program_id(1) == most_chunks
    if new:
        own_lo = tl.load(own_ptr + 2 * token, exists, other=0)
        own_hi = tl.load(own_ptr + 2 * token + 1, exists, other=2147483647)
        k_ptr += kv_head * D
        v_ptr += kv_head * D
        new_peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        new_total = tl.zeros([BLOCK_M], tl.float32)
        new_acc = tl.zeros([BLOCK_M, D], tl.float32)
        common = tl.where(tl.max(own_lo, 0) <= own_begin, tl.minimum(tl.min(own_hi, 0), own_end), own_begin)
        split = own_begin + tl.maximum(common - own_begin, 0) // BLOCK_N * BLOCK_N
        k_step, v_step = k_stride.to(tl.int64), v_stride.to(tl.int64)
        for start in range(own_begin, split, BLOCK_N):
            k = tl.load(k_ptr + start * k_step + n[None, :] * k_stride + d[:, None])
            scores = tl.dot(q, k, input_precision="tf32x3")
            v = tl.load(v_ptr + start * v_step + n[:, None] * v_stride + d[None, :])
            new_peak, new_total, new_acc = _softmax_step(scores, v, new_peak, new_total, new_acc, scale)
        for start in tl.range(split, own_end, BLOCK_N, num_stages=1):
            key = start + n
            inside = key < own_end
            k = tl.load(k_ptr + start * k_step + n[None, :] * k_stride + d[:, None], inside[None, :], other=0.0)
            visible = (key[None, :] >= own_lo[:, None]) & (key[None, :] < own_hi[:, None]) & inside[None, :]
            scores = tl.where(visible, tl.dot(q, k, input_precision="tf32x3"), float("-inf"))
            v = tl.load(v_ptr + start * v_step + n[:, None] * v_stride + d[None, :], inside[:, None], other=0.0)
            new_peak, new_total, new_acc = _softmax_step(scores, v, new_peak, new_total, new_acc, scale)
        peak, total, acc = _merge(peak, total, acc, new_peak, new_total, new_acc)

    if SPLIT:
        row = (tl.program_id(0).to(tl.int64) * (most_chunks + 1) + tl.program_id(1)) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(part_acc_ptr + row[:, None] * D + d[None, :], acc)
        tl.store(part_peak_ptr + row, peak)
        tl.store(part_total_ptr + row, total)
    else:
        place = token.to(tl.int64) * Q_HEADS + head
        tl.store(out_ptr + place[:, None] * D + d[None, :], (acc / total[:, None]).to(q.dtype), exists[:, None])


@triton.jit(do_not_specialize=["most_chunks"], do_not_specialize_on_alignment=["tiles_ptr", "order_ptr"])
def merge_chunks_kernel(
    part_acc_ptr, part_peak_ptr, part_total_ptr, out_ptr, tiles_ptr, order_ptr, most_chunks,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr, MOST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Grid: (programs of the plan, BLOCK_M / ROWS)."""
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    tile, kv_head, subgroup, begin, end = _my_tile(tiles_ptr, order_ptr, GROUP, KV_HEADS, HEADS, TOKENS, BLOCK_M)
    if begin >= end:
        return
    tile_ptr = tiles_ptr + tile * 7
    context = tl.load(tile_ptr + 3)
    chunks = tl.cdiv(context, _chunk_keys(context, MOST, LEAST))
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    first = tl.program_id(0).to(tl.int64) * (most_chunks + 1)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    at = first * BLOCK_M + row
    # Eight loads under way: one by one, each would cost the latency of the L2. The new keys lie behind the chunks that there might be.
    for i in tl.range(0, chunks + 1, num_stages=8):
        place = at + tl.where(i < chunks, i, most_chunks) * BLOCK_M
        part_peak = tl.load(part_peak_ptr + place)
        part_total = tl.load(part_total_ptr + place)
        part_acc = tl.load(part_acc_ptr + place[:, None] * D + d[None, :])
        peak, total, acc = _merge(peak, total, acc, part_peak, part_total, part_acc)
    token = begin + row // HEADS
    head = subgroup * HEADS + row % HEADS
    exists = (token < end) & (head < GROUP)
    place = token.to(tl.int64) * Q_HEADS + kv_head * GROUP + head
    tl.store(out_ptr + place[:, None] * D + d[None, :], (acc / total[:, None]).to(out_ptr.dtype.element_ty), exists[:, None])
