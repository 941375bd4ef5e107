"""The kernels of the Triton backend. Imported at the first launch only.

Rows are the tokens of non-zero weight: row i is token index[i], and there are count[0] of them, which only the device knows. Launches
are as large as if all tokens were kept; what lies beyond the count ends at once.
"""

import triton
import triton.language as tl

from ..grouped_gemm.triton_kernels import multiply


@triton.jit
def _logits(
    hidden_ptr, lm_head_ptr, index_ptr, row, column, kept, columns, WIDTH: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """fp32 hidden[index[row]] @ lm_head[column].T; -inf from number ``columns`` on."""
    token = tl.load(index_ptr + tl.minimum(row, kept - 1)).to(tl.int64)
    k = tl.arange(0, BK)
    a_ptrs = hidden_ptr + token[:, None] * WIDTH + k[None, :]
    b_ptrs = lm_head_ptr + tl.minimum(column, columns - 1).to(tl.int64)[:, None] * WIDTH + k[None, :]
    acc = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    acc = multiply(a_ptrs, b_ptrs, column >= 0, BK, acc, WIDTH, BK, False, True)
    return tl.where((column < columns)[None, :], acc, float("-inf"))


@triton.jit(do_not_specialize=["tokens"])
def loss_parts_kernel(
    hidden_ptr, lm_head_ptr, targets_ptr, index_ptr, count_ptr, parts_ptr, tokens, inverse_temperature,
    VOCAB: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, ENTROPY: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """parts [6, splits, tokens]: of SPLIT ids and BM rows, with m the largest logit z and a = (z - m) / temperature: m, its lowest id,
    sum e^(z - m), the target's logit or 0, sum e^a, sum e^a * a."""
    tiles = tl.cdiv(tokens, BM)
    split = tl.program_id(0) // tiles  # programs side by side share the ids' weights
    row = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    kept = tl.load(count_ptr)
    if tl.program_id(0) % tiles * BM >= kept:
        return
    target = tl.load(targets_ptr + tl.load(index_ptr + row, row < kept, other=0), row < kept, other=-1)
    largest = tl.full((BM,), float("-inf"), tl.float32)
    best = tl.zeros((BM,), tl.int32)
    total, picked = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    tempered, weighted = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    for first in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, VOCAB), BN):
        column = first + tl.arange(0, BN)
        z = _logits(hidden_ptr, lm_head_ptr, index_ptr, row, column, kept, VOCAB, WIDTH, BK)
        here = tl.max(z, 1)
        at = tl.min(tl.where(z == here[:, None], column[None, :], VOCAB), 1)
        best = tl.where(here > largest, at, best)
        bigger = tl.maximum(tl.maximum(largest, here), -3.4e38)  # finite: -inf - -inf is no number
        before = tl.maximum(largest - bigger, -1e30)
        largest = bigger
        total = total * tl.exp(before) + tl.sum(tl.exp(z - largest[:, None]), 1)
        picked += tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), 1)
        if ENTROPY:
            before = tl.maximum(before * inverse_temperature, -1e4)
            a = tl.maximum((z - largest[:, None]) * inverse_temperature, -1e4)
            weight = tl.exp(a)
            weighted = (weighted + before * tempered) * tl.exp(before) + tl.sum(weight * a, 1)
            tempered = tempered * tl.exp(before) + tl.sum(weight, 1)
    splits: tl.constexpr = triton.cdiv(VOCAB, SPLIT)
    size = tokens.to(tl.int64) * splits
    out = parts_ptr + tokens.to(tl.int64) * split + row
    tl.store(out, largest, row < kept)
    tl.store(out + size, best.to(tl.float32, bitcast=True), row < kept)
    tl.store(out + 2 * size, total, row < kept)
    tl.store(out + 3 * size, picked, row < kept)
    if ENTROPY:
        tl.store(out + 4 * size, tempered, row < kept)
        tl.store(out + 5 * size, weighted, row < kept)


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["targets_ptr"])
def loss_kernel(
    parts_ptr, targets_ptr, index_ptr, count_ptr, losses_ptr, entropy_ptr, correct_ptr, statistics_ptr, tokens, inverse_temperature,
    SPLITS: tl.constexpr, ENTROPY: tl.constexpr, ONLY_CORRECT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Combines the parts of every row in order. statistics [tokens, 4]: largest logit, log of the sums of both kinds, entropy."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    exist = row < tl.load(count_ptr)
    token = tl.load(index_ptr + row, exist, other=0)
    size = tokens.to(tl.int64) * SPLITS
    largest = tl.full((BM,), float("-inf"), tl.float32)
    best = tl.zeros((BM,), tl.int32)
    total, picked = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    tempered, weighted = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    for split in range(SPLITS):
        at = parts_ptr + tokens.to(tl.int64) * split + row
        here = tl.load(at, exist, other=0.0)
        best = tl.where(here > largest, tl.load(at + size, exist, other=0.0).to(tl.int32, bitcast=True), best)
        bigger = tl.maximum(largest, here)
        before, after = tl.maximum(largest - bigger, -1e30), here - bigger
        largest = bigger
        total = total * tl.exp(before) + tl.load(at + 2 * size, exist, other=0.0) * tl.exp(after)
        picked += tl.load(at + 3 * size, exist, other=0.0)
        if ENTROPY:
            before = tl.maximum(before * inverse_temperature, -1e4)
            after = tl.maximum(after * inverse_temperature, -1e4)
            part = tl.load(at + 4 * size, exist, other=0.0)
            weighted = (weighted + before * tempered) * tl.exp(before)
            weighted += (tl.load(at + 5 * size, exist, other=0.0) + after * part) * tl.exp(after)
            tempered = tempered * tl.exp(before) + part * tl.exp(after)
    correct = best == tl.load(targets_ptr + token, exist, other=-1)
    log_sum = tl.log(total)
    tl.store(losses_ptr + token, log_sum + (largest - picked), exist)
    tl.store(correct_ptr + token, correct, exist)
    tl.store(statistics_ptr + token * 4, largest, exist)
    tl.store(statistics_ptr + token * 4 + 1, log_sum, exist)
    if ENTROPY:
        entropy = tl.log(tempered) - weighted / tempered
        tl.store(statistics_ptr + token * 4 + 2, tl.log(tempered), exist)
        tl.store(statistics_ptr + token * 4 + 3, entropy, exist)
        if ONLY_CORRECT:
            entropy = tl.where(correct, entropy, 0.0)
        tl.store(entropy_ptr + token, entropy, exist)


@triton.jit(do_not_specialize=["first_id", "columns"], do_not_specialize_on_alignment=["targets_ptr"])
def logit_gradients_kernel(
    hidden_ptr, lm_head_ptr, targets_ptr, index_ptr, count_ptr, statistics_ptr, grad_ptr, grad_entropy_ptr, out_ptr,
    first_id, columns, inverse_temperature, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ENTROPY: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [rows, CHUNK]: gradients of the logits of ``columns`` ids from first_id on, whose weights lm_head_ptr points to."""
    tiles: tl.constexpr = triton.cdiv(CHUNK, BN)
    row = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    column = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    kept = tl.load(count_ptr)
    if tl.program_id(0) // tiles * BM >= kept:
        return
    z = _logits(hidden_ptr, lm_head_ptr, index_ptr, row, column, kept, columns, WIDTH, BK)
    token = tl.load(index_ptr + row, row < kept, other=0)
    target = tl.load(targets_ptr + token, row < kept, other=-1)
    z -= tl.load(statistics_ptr + token * 4)[:, None]
    probability = tl.exp(z - tl.load(statistics_ptr + token * 4 + 1)[:, None])
    hit = (first_id + column)[None, :] == target[:, None]
    gradient = tl.load(grad_ptr + token)[:, None] * (probability - tl.where(hit, 1.0, 0.0))
    if ENTROPY:  # the derivative is -p (log p + entropy) / temperature
        log_p = tl.maximum(z * inverse_temperature, -1e4) - tl.load(statistics_ptr + token * 4 + 2)[:, None]
        slope = tl.exp(log_p) * (log_p + tl.load(statistics_ptr + token * 4 + 3)[:, None])
        gradient -= tl.load(grad_entropy_ptr + token)[:, None] * inverse_temperature * slope
    out = out_ptr + row.to(tl.int64)[:, None] * CHUNK + column[None, :]
    tl.store(out, gradient.to(out_ptr.dtype.element_ty), (row < kept)[:, None] & (column < CHUNK)[None, :])


@triton.jit(do_not_specialize=["columns"])
def hidden_gradient_kernel(
    gradients_ptr, lm_head_ptr, index_ptr, count_ptr, out_ptr, columns, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[index[row]] += gradients [rows, CHUNK] @ lm_head [columns, WIDTH], in fp32."""
    tiles: tl.constexpr = triton.cdiv(WIDTH, BN)
    row = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    n = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    kept = tl.load(count_ptr)
    if tl.program_id(0) // tiles * BM >= kept:
        return
    k = tl.arange(0, BK)
    left_ptrs = gradients_ptr + tl.minimum(row, kept - 1).to(tl.int64)[:, None] * CHUNK + k[None, :]
    right_ptrs = lm_head_ptr + k.to(tl.int64)[:, None] * WIDTH + n[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, columns, BK):
        left = tl.load(left_ptrs, (k0 + k < columns)[None, :], other=0.0)
        right = tl.load(right_ptrs, (k0 + k < columns)[:, None] & (n < WIDTH)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        left_ptrs += BK
        right_ptrs += BK * WIDTH
    token = tl.load(index_ptr + row, row < kept, other=0).to(tl.int64)
    out = out_ptr + token[:, None] * WIDTH + n[None, :]
    exist = (row < kept)[:, None] & (n < WIDTH)[None, :]
    tl.store(out, tl.load(out, exist, other=0.0) + acc, exist)


@triton.jit(do_not_specialize=["columns"])
def head_gradient_kernel(
    gradients_ptr, hidden_ptr, index_ptr, count_ptr, out_ptr, columns, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [columns, WIDTH] = gradients [rows, CHUNK].T @ hidden[index[rows]]; zero without rows."""
    tiles: tl.constexpr = triton.cdiv(WIDTH, BN)
    m = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    n = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    kept = tl.load(count_ptr)
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, kept, BK):
        row = first + tl.arange(0, BK)
        exist = row < kept
        token = tl.load(index_ptr + row, exist, other=0).to(tl.int64)
        left = tl.load(gradients_ptr + row.to(tl.int64)[:, None] * CHUNK + m[None, :], exist[:, None] & (m < CHUNK)[None, :], other=0.0)
        right = tl.load(hidden_ptr + token[:, None] * WIDTH + n[None, :], exist[:, None] & (n < WIDTH)[None, :], other=0.0)
        acc = tl.dot(left.T, right, acc, input_precision="ieee")
    out = out_ptr + m.to(tl.int64)[:, None] * WIDTH + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), (m < columns)[:, None] & (n < WIDTH)[None, :])
