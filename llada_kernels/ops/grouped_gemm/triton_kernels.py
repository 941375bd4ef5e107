"""The kernels of the Triton backend. Imported at the first launch only."""

import triton
import triton.language as tl


@triton.jit
def find_tile(offsets_ptr, tile, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Expert, first row and end of the expert's rows of the tile of that number, when every expert's rows are cut into tiles of ROWS.

    Tiles are numbered expert by expert, so their number depends on the offsets: every program counts them itself, which costs it a
    fraction of a microsecond, and nothing has to be known on the host. A number beyond the last tile gives the expert EXPERTS or more.
    """
    e = tl.arange(0, triton.next_power_of_2(EXPERTS))
    begin = tl.load(offsets_ptr + e, e < EXPERTS, other=0)
    end = tl.load(offsets_ptr + e + 1, e < EXPERTS, other=0)
    tiles = (end - begin + (ROWS - 1)) // ROWS
    before = tl.cumsum(tiles, 0) <= tile
    expert = tl.sum(before.to(tl.int32), 0)
    first = tile - tl.sum(tl.where(before, tiles, 0), 0)
    known = tl.minimum(expert, EXPERTS - 1)
    return expert, tl.load(offsets_ptr + known) + first * ROWS, tl.load(offsets_ptr + known + 1)


@triton.jit
def multiply(a_ptrs, b_ptrs, b_mask, B_STEP, acc, INNER: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr, ALL: tl.constexpr):
    """a @ b.T, or b @ a.T with SWAP, of the rows that the pointers [rows, BK] start, along INNER columns.

    Rows of a need no mask: those that do not exist point anywhere. ALL says that there is no mask for b either.
    """
    k = tl.arange(0, BK)
    for k0 in range(0, INNER, BK):
        if INNER % BK == 0:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs) if ALL else tl.load(b_ptrs, b_mask[:, None], other=0.0)
        else:
            inside = (k0 + k < INNER)[None, :]
            a = tl.load(a_ptrs, inside, other=0.0)
            b = tl.load(b_ptrs, inside & b_mask[:, None], other=0.0)
        left, right = (b, a) if SWAP else (a, b)
        acc = tl.dot(left, right.T, acc, input_precision="ieee")
        a_ptrs += BK
        b_ptrs += B_STEP
    return acc


@triton.jit
def levels(words, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """1.5 + w / 2^BITS in fp32 of the integers w whose BITS bits begin at bit SHIFT of the words.

    They become the first fraction bits of an fp32: conversions of integers have a fraction of the throughput.
    """
    mask: tl.constexpr = ((1 << BITS) - 1) << (23 - BITS)
    # The bits of 1.0. An int4 is stored plus 8, which is the 0.5; an int8 as it is: turning its sign bit over adds 128, the same 0.5.
    one: tl.constexpr = 0x3F800000 if BITS == 4 else 0x3FC00000
    return ((words << (23 - BITS - SHIFT) & mask) ^ one).to(tl.float32, bitcast=True)


@triton.jit
def multiply_quantized(
    a_ptrs, w_ptrs, scale_ptrs, w_mask, acc, INNER: tl.constexpr, BK: tl.constexpr, ALL: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """multiply with SWAP, w @ a.T, for integers of BITS bits times a scale per GROUP of columns; pointers to where each row starts.

    Weights come as words of 16 bits. Word j of int8 holds columns 2 j and 2 j + 1 in its low and its high byte. Word j of 8 of int4 holds
    these in the low halves of its bytes and columns 16 + 2 j and 17 + 2 j in the high halves. Tensor cores want two neighbouring columns
    in a register, so a thread finds both in the word it reads and nothing moves between threads. The low and the high halves of int4 are
    two products, each with those columns of a that belong to them.

    (1.5 + w / 2^BITS) * (2^BITS * scale) - 1.5 * (2^BITS * scale) is w * scale, exact with or without a fused multiply-add: the first
    product has 9 + 8 bits. It is then rounded to the dtype of a. (Intermediate values overflow for weights beyond 8e37.)
    """
    dtype: tl.constexpr = a_ptrs.dtype.element_ty
    halves: tl.constexpr = 8 // BITS
    columns: tl.constexpr = BK // halves
    groups: tl.constexpr = BK // GROUP if GROUP < BK else 1
    rows: tl.constexpr = w_ptrs.shape[0]
    word = tl.arange(0, columns // 2)
    group = tl.arange(0, groups)
    column = tl.arange(0, columns)
    column = column // 16 * (16 * halves) + column % 16
    for k0 in range(0, INNER, BK):
        word_ptrs = w_ptrs[:, None] + (k0 * BITS // 16 + word)[None, :]
        group_ptrs = scale_ptrs[:, None] + (k0 // GROUP + group)[None, :]
        words = (tl.load(word_ptrs) if ALL else tl.load(word_ptrs, w_mask[:, None], other=0)).to(tl.int32)
        scales = tl.load(group_ptrs) if ALL else tl.load(group_ptrs, w_mask[:, None], other=0.0)
        scales = scales.to(tl.float32)[:, :, None] * (1 << BITS)
        for half in tl.static_range(halves):
            a = tl.load(a_ptrs[:, None] + (k0 + 16 * half + column)[None, :])
            w = tl.join(levels(words, 4 * half, BITS), levels(words, 4 * half + 8, BITS)).reshape(rows, groups, columns // groups)
            w = (w * scales - 1.5 * scales).reshape(rows, columns).to(dtype)
            acc = tl.dot(w, a.T, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize_on_alignment=["offsets_ptr", "permutation_ptr"])
def rows_kernel(
    a_ptr, b_ptr, scales_ptr, out_ptr, offsets_ptr, permutation_ptr, EXPERTS: tl.constexpr, N: tl.constexpr, INNER: tl.constexpr,
    TRANSPOSED: tl.constexpr, SCATTER: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SWAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [rows, N] = a [rows, INNER] @ b[expert of the row].T; b is [EXPERTS, N, INNER], or TRANSPOSED [EXPERTS, INNER, N].

    With BITS of 4 or 8 b is quantised: words [EXPERTS, N, INNER * BITS / 16], scales [EXPERTS, N, INNER / GROUP]; else scales are not read.
    With SCATTER row r of the product is stored as row permutation[r].
    """
    n_tiles: tl.constexpr = triton.cdiv(N, BN)
    expert, begin, end = find_tile(offsets_ptr, tl.program_id(0) // n_tiles, EXPERTS, BM)
    n0 = tl.program_id(0) % n_tiles * BN
    b_ptr += expert.to(tl.int64) * (N * (INNER * BITS // 16 if BITS else INNER))
    if BITS:
        scales_ptr += expert.to(tl.int64) * (N * (INNER // GROUP))
    if expert >= EXPERTS:
        return
    if BM > 64:
        if end - begin <= BM // 2:  # the last rows of an expert: half of the arithmetic will do
            rows_tile(
                a_ptr, b_ptr, scales_ptr, out_ptr, permutation_ptr, begin, end, n0, BM // 2,
                N, INNER, TRANSPOSED, SCATTER, BITS, GROUP, SWAP, BN, BK,
            )  # fmt: skip
        else:
            rows_tile(
                a_ptr, b_ptr, scales_ptr, out_ptr, permutation_ptr, begin, end, n0, BM,
                N, INNER, TRANSPOSED, SCATTER, BITS, GROUP, SWAP, BN, BK,
            )  # fmt: skip
    else:
        rows_tile(
            a_ptr, b_ptr, scales_ptr, out_ptr, permutation_ptr, begin, end, n0, BM,
            N, INNER, TRANSPOSED, SCATTER, BITS, GROUP, SWAP, BN, BK,
        )  # fmt: skip


@triton.jit
def rows_tile(
    a_ptr, b_ptr, scales_ptr, out_ptr, permutation_ptr, begin, end, n0, BM: tl.constexpr, N: tl.constexpr, INNER: tl.constexpr,
    TRANSPOSED: tl.constexpr, SCATTER: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SWAP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The rows from begin on and the columns from n0 on of rows_kernel's product; b of their expert."""
    rows = begin + tl.arange(0, BM)
    exist = rows < end
    out_rows = tl.load(permutation_ptr + rows, exist, other=0) if SCATTER else rows
    a_rows = tl.minimum(rows, end - 1).to(tl.int64)
    n = n0 + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
    if BITS:
        acc = multiply_quantized(
            a_ptr + a_rows * INNER, b_ptr + n * (INNER * BITS // 16), scales_ptr + n * (INNER // GROUP), n < N, acc,
            INNER, BK, N % BN == 0, BITS, GROUP,
        )  # fmt: skip
    else:
        a_ptrs = a_ptr + a_rows[:, None] * INNER + k[None, :]
        b_ptrs = b_ptr + (n[:, None] + k[None, :] * N if TRANSPOSED else n[:, None] * INNER + k[None, :])
        acc = multiply(a_ptrs, b_ptrs, n < N, BK * N if TRANSPOSED else BK, acc, INNER, BK, SWAP, N % BN == 0)
    if SWAP:
        acc = acc.T
    out_ptrs = out_ptr + out_rows.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), exist[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize_on_alignment=["offsets_ptr", "permutation_ptr"])
def weight_gradient_kernel(
    left_ptr, right_ptr, out_ptr, offsets_ptr, permutation_ptr, EXPERTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    LEFT_TOP_K: tl.constexpr, RIGHT_TOP_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [EXPERTS, M, N] = left [rows of the expert, M].T @ right [rows of the expert, N]; zero for an expert without rows.

    With a TOP_K of at least 1, row r of that operand is its row permutation[r] // TOP_K.
    """
    n_tiles: tl.constexpr = triton.cdiv(N, BN)
    m_tiles: tl.constexpr = triton.cdiv(M, BM)
    expert = tl.program_id(0) // (m_tiles * n_tiles)
    m = tl.program_id(0) // n_tiles % m_tiles * BM + tl.arange(0, BM)
    n = tl.program_id(0) % n_tiles * BN + tl.arange(0, BN)
    end = tl.load(offsets_ptr + expert + 1)
    acc = tl.zeros((BM, BN), tl.float32)
    for row in range(tl.load(offsets_ptr + expert), end, BK):
        rows = row + tl.arange(0, BK)
        exist = rows < end  # what does not exist is zero on both sides: the other operand's values there may be infinite
        left_rows, right_rows = rows.to(tl.int64), rows.to(tl.int64)
        if LEFT_TOP_K or RIGHT_TOP_K:
            slots = tl.load(permutation_ptr + rows, exist, other=0).to(tl.int64)
            if LEFT_TOP_K:
                left_rows = slots // LEFT_TOP_K
            if RIGHT_TOP_K:
                right_rows = slots // RIGHT_TOP_K
        left = tl.load(left_ptr + left_rows[:, None] * M + m[None, :], exist[:, None] & (m < M)[None, :], other=0.0)
        right = tl.load(right_ptr + right_rows[:, None] * N + n[None, :], exist[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(left.T, right, acc, input_precision="ieee")
    out_ptrs = out_ptr + expert.to(tl.int64) * (M * N) + m[:, None] * N + n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])
