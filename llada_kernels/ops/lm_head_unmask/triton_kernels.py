"""The kernel of the Triton backend. Imported at the first launch only.

The arithmetic from the logits on is that of threshold_unmask's reference to the bit: launch with ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

from ..grouped_gemm.triton_kernels import multiply
from ..threshold_unmask.triton_kernels import LANES, PART, load_parts, sum_parts


@triton.jit
def _best_other(x, ids, mask_token_id, VOCAB: tl.constexpr):
    """Of load_parts: the largest logit [P] that is not the mask token's, and its lowest id."""
    best = tl.where(ids == mask_token_id, float("-inf"), x[0].to(tl.float32))
    best_id = ids + tl.zeros_like(best).to(tl.int32)
    for i in tl.static_range(1, PART // LANES):
        other = tl.where(ids + i * LANES == mask_token_id, float("-inf"), x[i].to(tl.float32))
        best_id = tl.where(other > best, ids + i * LANES, best_id)
        best = tl.maximum(best, other)
    largest = tl.max(best, 1)
    return largest, tl.min(tl.where(best == largest[:, None], best_id, VOCAB), 1)


@triton.jit(do_not_specialize=["positions", "mask_token_id"])
def head_parts_kernel(
    hidden_ptr, lm_head_ptr, scratch_ptr, largest_ptr, total_ptr, best_ptr, ids_ptr, positions, mask_token_id,
    VOCAB: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """What threshold_unmask's parts_kernel computes, and the id of the best logit, from hidden [positions, WIDTH] and lm_head.

    A program takes BM positions and a part at a time. Its logits lie in scratch [programs, BM, PART], a few hundred KiB that stay in
    the L2 cache: the sum of a part's exponentials needs its largest logit first.
    """
    parts: tl.constexpr = triton.cdiv(VOCAB, PART)
    position_tiles = tl.cdiv(positions, BM)
    scratch_ptr += tl.program_id(0).to(tl.int64) * (BM * PART)
    k = tl.arange(0, BK)
    row = tl.arange(0, BM)
    # Programs that run side by side take the same part, so that memory sends every weight once.
    for tile in range(tl.program_id(0), parts * position_tiles, tl.num_programs(0)):
        part = tile // position_tiles
        first = tile % position_tiles * BM
        hidden_rows = tl.minimum(first + row, positions - 1).to(tl.int64)
        hidden_ptrs = hidden_ptr + hidden_rows[:, None] * WIDTH + k[None, :]
        for begin in range(0, PART, BN):
            column = begin + tl.arange(0, BN)
            ids = tl.minimum(part * PART + column, VOCAB - 1).to(tl.int64)
            acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
            head_ptrs = lm_head_ptr + ids[:, None] * WIDTH + k[None, :]
            acc = multiply(hidden_ptrs, head_ptrs, column < PART, BK, acc, WIDTH, BK, SWAP, True)
            if SWAP:
                acc = acc.T
            tl.store(scratch_ptr + row[:, None] * PART + column[None, :], acc.to(hidden_ptr.dtype.element_ty))
        tl.debug_barrier()  # the logits are read by other threads than wrote them
        for begin in range(0, BM, P):
            position = begin + tl.arange(0, P)
            lane = tl.arange(0, LANES)[None, :]
            ids = part * PART + lane
            x = load_parts(scratch_ptr + position[:, None] * PART + lane, ids, VOCAB)
            largest, total = sum_parts(x)
            best, best_id = _best_other(x, ids, mask_token_id, VOCAB)
            out = (first + position).to(tl.int64) * parts + part
            exist = first + position < positions
            tl.store(largest_ptr + out, largest, exist)
            tl.store(total_ptr + out, total, exist)
            tl.store(best_ptr + out, best, exist)
            tl.store(ids_ptr + out, best_id, exist)
        tl.debug_barrier()
