"""The kernels of the Triton backend. Imported at the first launch only."""

import torch
import triton
import triton.language as tl

from ..grouped_gemm.triton_kernels import find_tile, multiply, multiply_quantized


def dtype_of(dtype):
    """Triton's name of a torch dtype, for a tl.constexpr."""
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


@triton.jit
def halves(tile):
    """The first and the last half of the columns. A thread holds elements of both, so nothing moves."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    return tl.split(tile.reshape(rows, 2, columns // 2).permute(0, 2, 1))


@triton.jit(do_not_specialize_on_alignment=["offsets_ptr", "permutation_ptr"])
def gate_up_kernel(
    x_ptr, w_ptr, scales_ptr, act_ptr, kept_ptr, offsets_ptr, permutation_ptr, EXPERTS: tl.constexpr, HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr, TOP_K: tl.constexpr, KEEP: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SWAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """act [rows, WIDTH] = silu(gate) * up of the sorted rows; with KEEP also kept [rows, 2 * WIDTH] = gate and up.

    A tile's BN weight rows are BN / 2 gate rows and the up rows of the same features. With BITS they are quantised, as in rows_kernel.
    """
    tiles: tl.constexpr = triton.cdiv(WIDTH, BN // 2)
    expert, begin, end = find_tile(offsets_ptr, tl.program_id(0) // tiles, EXPERTS, BM)
    first = tl.program_id(0) % tiles * (BN // 2)
    w_ptr += expert.to(tl.int64) * (2 * WIDTH * (HIDDEN * BITS // 16 if BITS else HIDDEN))
    if BITS:
        scales_ptr += expert.to(tl.int64) * (2 * WIDTH * (HIDDEN // GROUP))
    if expert >= EXPERTS:
        return
    if BM > 64:
        if end - begin <= BM // 2:  # the last rows of an expert: half of the arithmetic will do
            gate_up_tile(
                x_ptr, w_ptr, scales_ptr, act_ptr, kept_ptr, permutation_ptr, begin, end, first, BM // 2,
                HIDDEN, WIDTH, TOP_K, KEEP, BITS, GROUP, SWAP, BN, BK,
            )  # fmt: skip
        else:
            gate_up_tile(
                x_ptr, w_ptr, scales_ptr, act_ptr, kept_ptr, permutation_ptr, begin, end, first, BM,
                HIDDEN, WIDTH, TOP_K, KEEP, BITS, GROUP, SWAP, BN, BK,
            )  # fmt: skip
    else:
        gate_up_tile(
            x_ptr, w_ptr, scales_ptr, act_ptr, kept_ptr, permutation_ptr, begin, end, first, BM,
            HIDDEN, WIDTH, TOP_K, KEEP, BITS, GROUP, SWAP, BN, BK,
        )  # fmt: skip


@triton.jit
def gate_up_tile(
    x_ptr, w_ptr, scales_ptr, act_ptr, kept_ptr, permutation_ptr, begin, end, first, BM: tl.constexpr, HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr, TOP_K: tl.constexpr, KEEP: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SWAP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The rows from begin on and the features from first on of gate_up_kernel's results."""
    rows = begin + tl.arange(0, BM)
    exist = rows < end
    tokens = tl.load(permutation_ptr + rows, exist, other=0) // TOP_K
    features: tl.constexpr = BN // 2
    n = tl.arange(0, BN)
    feature = first + n % features
    k = tl.arange(0, BK)
    w_rows = feature + n // features * WIDTH
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
    if BITS:
        acc = multiply_quantized(
            x_ptr + tokens.to(tl.int64) * HIDDEN, w_ptr + w_rows * (HIDDEN * BITS // 16), scales_ptr + w_rows * (HIDDEN // GROUP),
            feature < WIDTH, acc, HIDDEN, BK, WIDTH % features == 0, BITS, GROUP,
        )  # fmt: skip
    else:
        x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * HIDDEN + k[None, :]
        w_ptrs = w_ptr + w_rows[:, None] * HIDDEN + k[None, :]
        acc = multiply(x_ptrs, w_ptrs, feature < WIDTH, BK, acc, HIDDEN, BK, SWAP, WIDTH % features == 0)
    gate, up = halves(acc.T if SWAP else acc)
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    gate, up = gate.to(dtype), up.to(dtype)
    columns = first + tl.arange(0, features)
    inside = exist[:, None] & (columns < WIDTH)[None, :]
    wide = gate.to(tl.float32)
    silu = (wide * tl.sigmoid(wide)).to(dtype)  # rounded before the product, as the official code
    act = silu.to(tl.float32) * up.to(tl.float32)
    out_rows = rows.to(tl.int64)[:, None]
    tl.store(act_ptr + out_rows * WIDTH + columns[None, :], act.to(dtype), inside)
    if KEEP:
        kept_ptrs = kept_ptr + out_rows * (2 * WIDTH) + columns[None, :]
        tl.store(kept_ptrs, gate, inside)
        tl.store(kept_ptrs + WIDTH, up, inside)


@triton.jit
def combine_kernel(
    rows_ptr, weights_ptr, out_ptr, HIDDEN: tl.constexpr, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, COLUMNS: tl.constexpr
):
    """out [tokens, HIDDEN] = the sum over k of rows [tokens * TOP_K, HIDDEN], in this order and fp32; WEIGHTED by weights."""
    tiles: tl.constexpr = triton.cdiv(HIDDEN, COLUMNS)
    token = (tl.program_id(0) // tiles).to(tl.int64)
    columns = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(rows_ptr + (token * TOP_K + k) * HIDDEN + columns, columns < HIDDEN, other=0.0).to(tl.float32)
        total += row * tl.load(weights_ptr + token * TOP_K + k) if WEIGHTED else row
    tl.store(out_ptr + token * HIDDEN + columns, total.to(out_ptr.dtype.element_ty), columns < HIDDEN)


@triton.jit(do_not_specialize=["slots"], do_not_specialize_on_alignment=["offsets_ptr", "permutation_ptr"])
def activation_gradient_kernel(
    grad_ptr, w_ptr, kept_ptr, weights_ptr, grad_gate_up_ptr, act_ptr, dots_ptr, offsets_ptr, permutation_ptr, slots,
    EXPERTS: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr,
    SWAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """With d = grad [tokens, HIDDEN] @ w_down of a sorted row and its routing weight s: the gradient s * d of its activation gives
    grad_gate_up [rows, 2 * WIDTH]; act [rows, WIDTH] = s * activation; dots [tiles, slots] = d . activation within a tile's features.
    """
    tiles: tl.constexpr = triton.cdiv(WIDTH, BN)
    expert, begin, end = find_tile(offsets_ptr, tl.program_id(0) // tiles, EXPERTS, BM)
    tile = tl.program_id(0) % tiles
    w_ptr += expert.to(tl.int64) * (WIDTH * HIDDEN)
    if expert >= EXPERTS:
        return
    if BM > 64:
        if end - begin <= BM // 2:  # the last rows of an expert: half of the arithmetic will do
            activation_gradient_tile(
                grad_ptr, w_ptr, kept_ptr, weights_ptr, grad_gate_up_ptr, act_ptr, dots_ptr + tile * slots.to(tl.int64), permutation_ptr,
                begin, end, tile * BN, BM // 2, HIDDEN, WIDTH, TOP_K, SWAP, BN, BK,
            )  # fmt: skip
        else:
            activation_gradient_tile(
                grad_ptr, w_ptr, kept_ptr, weights_ptr, grad_gate_up_ptr, act_ptr, dots_ptr + tile * slots.to(tl.int64), permutation_ptr,
                begin, end, tile * BN, BM, HIDDEN, WIDTH, TOP_K, SWAP, BN, BK,
            )  # fmt: skip
    else:
        activation_gradient_tile(
            grad_ptr, w_ptr, kept_ptr, weights_ptr, grad_gate_up_ptr, act_ptr, dots_ptr + tile * slots.to(tl.int64), permutation_ptr,
            begin, end, tile * BN, BM, HIDDEN, WIDTH, TOP_K, SWAP, BN, BK,
        )  # fmt: skip


@triton.jit
def activation_gradient_tile(
    grad_ptr, w_ptr, kept_ptr, weights_ptr, grad_gate_up_ptr, act_ptr, dots_ptr, permutation_ptr, begin, end, first, BM: tl.constexpr,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr, SWAP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The rows from begin on and the features from first on of activation_gradient_kernel's results."""
    rows = begin + tl.arange(0, BM)
    exist = rows < end
    slot = tl.load(permutation_ptr + rows, exist, other=0)
    columns = first + tl.arange(0, BN)
    k = tl.arange(0, BK)
    grad_ptrs = grad_ptr + (slot // TOP_K).to(tl.int64)[:, None] * HIDDEN + k[None, :]
    w_ptrs = w_ptr + columns[:, None] + k[None, :] * WIDTH
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
    acc = multiply(grad_ptrs, w_ptrs, columns < WIDTH, BK * WIDTH, acc, HIDDEN, BK, SWAP, WIDTH % BN == 0)
    if SWAP:
        acc = acc.T
    weights = tl.load(weights_ptr + slot, exist, other=0.0)
    # An eighth of the columns at a time: the intermediate values of more do not fit into registers.
    dots = tl.zeros((BM,), tl.float32)
    half_0, half_1 = halves(acc)
    for i in tl.static_range(2):
        quarter_0, quarter_1 = halves(half_1 if i else half_0)
        for j in tl.static_range(2):
            eighth_0, eighth_1 = halves(quarter_1 if j else quarter_0)
            for e in tl.static_range(2):
                some = first + (4 * i + 2 * j + e) * (BN // 8) + tl.arange(0, BN // 8)
                d = eighth_1 if e else eighth_0
                dots += swiglu_gradient(d, weights, kept_ptr, grad_gate_up_ptr, act_ptr, rows, exist, some, WIDTH)
    tl.store(dots_ptr + slot, dots, exist)


@triton.jit
def swiglu_gradient(d, weights, kept_ptr, grad_gate_up_ptr, act_ptr, rows, exist, columns, WIDTH: tl.constexpr):
    """What activation_gradient_kernel makes of some columns of d; returns their part of d . activation."""
    inside = exist[:, None] & (columns < WIDTH)[None, :]
    at = rows.to(tl.int64)[:, None] * (2 * WIDTH) + columns[None, :]
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    gate = tl.load(kept_ptr + at, inside, other=0.0).to(tl.float32)
    up = tl.load(kept_ptr + at + WIDTH, inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = (gate * sigmoid).to(dtype).to(tl.float32)
    act = (silu * up).to(dtype).to(tl.float32)
    tl.store(act_ptr + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :], (act * weights[:, None]).to(dtype), inside)
    grad = d * weights[:, None]
    grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(grad_gate_up_ptr + at, grad_gate.to(dtype), inside)
    tl.store(grad_gate_up_ptr + at + WIDTH, (grad * silu).to(dtype), inside)
    return tl.sum(d * act, 1)


@triton.jit
def to_e4m3(values, dtype: tl.constexpr, NATIVE: tl.constexpr):
    """fp32 [rows, 128] as e4m3 values of ``dtype`` and the scale of each row. NATIVE: by the GPU's instruction, else by arithmetic."""
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(values), 1), 448.0), 2.0**-100)
    scaled = tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape))
    if NATIVE:
        return scaled.to(dtype), scale
    # Multiples of 2^-3 of their power of two, but of 2^-9 at least: adding and subtracting 1.5 * 2^23 rounds to whole ones, ties to even.
    exponent = tl.maximum((scaled.to(tl.int32, bitcast=True) >> 23) & 255, 121) - 3
    steps = scaled * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    whole = (steps + 12582912.0) - 12582912.0
    return (whole * (exponent << 23).to(tl.float32, bitcast=True)).to(dtype), scale


@triton.jit(do_not_specialize=["groups"])
def quantize_kernel(x_ptr, out_ptr, scales_ptr, groups, NATIVE: tl.constexpr, GROUPS: tl.constexpr):
    """out [groups, 128] and scales [groups] of x [groups, 128]."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    exist = group < groups
    x = tl.load(x_ptr + at, exist[:, None], other=0.0).to(tl.float32)
    values, scale = to_e4m3(x, out_ptr.dtype.element_ty, NATIVE)
    tl.store(out_ptr + at, values, exist[:, None])
    tl.store(scales_ptr + group, scale, exist)


@triton.jit
def multiply_e4m3(
    x_ptrs, x_scale_ptrs, w_ptrs, w_scale_ptrs, BLOCKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NATIVE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """w @ x.T [BN, BM] of e4m3 values along BLOCKS blocks of 128, each of which is summed apart and then scaled.

    Where the tensor cores know no e4m3, weights come as bytes and x as fp16: sign and the other 7 bits of an e4m3, moved into an fp16,
    are its value / 256 (subnormals too), and products of such values are exact in fp32.
    """
    acc = tl.zeros((BN, BM), tl.float32)
    for _ in tl.range(BLOCKS, num_stages=STAGES):
        x = tl.load(x_ptrs)
        w = tl.load(w_ptrs)
        scale = tl.load(w_scale_ptrs)[:, None] * tl.load(x_scale_ptrs)[None, :]
        if not NATIVE:
            bits = w.to(tl.int16)
            w = ((bits & 128) << 8 | (bits & 127) << 7).to(tl.float16, bitcast=True)
            scale *= 256.0
        acc += tl.dot(w, x.T) * scale
        x_ptrs += 128
        w_ptrs += 128
        x_scale_ptrs += 1
        w_scale_ptrs += 1
    return acc


@triton.jit(do_not_specialize_on_alignment=["offsets_ptr", "permutation_ptr"])
def gate_up_e4m3_kernel(
    x_ptr, x_scales_ptr, w_ptr, w_scales_ptr, act_ptr, act_scales_ptr, offsets_ptr, permutation_ptr, EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr, DTYPE: tl.constexpr,
    BM: tl.constexpr, NATIVE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """gate_up_kernel for e4m3 values: 128 gate rows and the up rows of the same features, so that a tile's activations share a scale."""
    blocks: tl.constexpr = WIDTH // 128
    expert, begin, end = find_tile(offsets_ptr, tl.program_id(0) // blocks, EXPERTS, BM)
    if expert >= EXPERTS:
        return
    rows = begin + tl.arange(0, BM)
    exist = rows < end
    tokens = (tl.load(permutation_ptr + rows, exist, other=0) // TOP_K).to(tl.int64)
    block = tl.program_id(0) % blocks
    n = tl.arange(0, 256)
    k = tl.arange(0, 128)
    w_rows = block * 128 + n % 128 + n // 128 * WIDTH
    scale_rows = expert * (2 * blocks) + block + n // 128 * blocks
    acc = multiply_e4m3(
        x_ptr + tokens[:, None] * HIDDEN + k[None, :], x_scales_ptr + tokens * (HIDDEN // 128),
        w_ptr + expert.to(tl.int64) * (2 * WIDTH * HIDDEN) + w_rows[:, None] * HIDDEN + k[None, :],
        w_scales_ptr + scale_rows * (HIDDEN // 128), HIDDEN // 128, BM, 256, NATIVE, STAGES,
    )  # fmt: skip
    gate, up = halves(acc.T)
    gate, up = gate.to(DTYPE).to(tl.float32), up.to(DTYPE).to(tl.float32)
    act = (gate * tl.sigmoid(gate)).to(DTYPE).to(tl.float32) * up
    values, scale = to_e4m3(act.to(DTYPE).to(tl.float32), act_ptr.dtype.element_ty, NATIVE)
    out_rows = rows.to(tl.int64)
    tl.store(act_ptr + out_rows[:, None] * WIDTH + block * 128 + k[None, :], values, exist[:, None])
    tl.store(act_scales_ptr + out_rows * blocks + block, scale, exist)


@triton.jit(do_not_specialize_on_alignment=["offsets_ptr", "permutation_ptr"])
def down_e4m3_kernel(
    act_ptr, act_scales_ptr, w_ptr, w_scales_ptr, out_ptr, offsets_ptr, permutation_ptr, EXPERTS: tl.constexpr, HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr, BM: tl.constexpr, NATIVE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """rows_kernel for e4m3 values: the down products of the sorted rows, stored in the order of slots."""
    blocks: tl.constexpr = WIDTH // 128
    tiles: tl.constexpr = HIDDEN // 128
    expert, begin, end = find_tile(offsets_ptr, tl.program_id(0) // tiles, EXPERTS, BM)
    if expert >= EXPERTS:
        return
    rows = begin + tl.arange(0, BM)
    exist = rows < end
    slots = tl.load(permutation_ptr + rows, exist, other=0).to(tl.int64)
    act_rows = tl.minimum(rows, end - 1).to(tl.int64)
    tile = tl.program_id(0) % tiles
    n = tile * 128 + tl.arange(0, 128)
    k = tl.arange(0, 128)
    acc = multiply_e4m3(
        act_ptr + act_rows[:, None] * WIDTH + k[None, :], act_scales_ptr + act_rows * blocks,
        w_ptr + expert.to(tl.int64) * (WIDTH * HIDDEN) + n[:, None] * WIDTH + k[None, :],
        w_scales_ptr + (expert * tiles + n // 128) * blocks, blocks, BM, 128, NATIVE, STAGES,
    )  # fmt: skip
    tl.store(out_ptr + slots[:, None] * HIDDEN + n[None, :], acc.T.to(out_ptr.dtype.element_ty), exist[:, None])
