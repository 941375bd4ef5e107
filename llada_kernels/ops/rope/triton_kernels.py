"""The kernels of the Triton backend. Imported at the first launch only.

A head is held as three parts: the dims that turn as their first and second halves, and those that pass through. Launched without fused
multiply-adds: each product of the rotation is rounded.
"""

import triton
import triton.language as tl


@triton.jit
def _turned(first, second, cos1, cos2, sin1, sin2, TRANSPOSED: tl.constexpr):
    """The halves after the rotation, or after its transpose, in fp32 with every product rounded to the dtype of ``cos1``."""
    dtype = cos1.dtype
    cos1, cos2, sin1, sin2 = cos1.to(tl.float32), cos2.to(tl.float32), sin1.to(tl.float32), sin2.to(tl.float32)
    a = (first * cos1).to(dtype).to(tl.float32)
    d = (second * cos2).to(dtype).to(tl.float32)
    if TRANSPOSED:
        b = (second * sin2).to(dtype).to(tl.float32)
        c = (first * sin1).to(dtype).to(tl.float32)
        return a + b, d - c
    else:
        b = (second * sin1).to(dtype).to(tl.float32)
        c = (first * sin2).to(dtype).to(tl.float32)
        return a - b, d + c


@triton.jit
def _tile(tile, num_rows, HEADS: tl.constexpr, ROTARY: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Rows (token, head) of a tile, their tokens, and which elements of a half exist. 64 bits: offsets may exceed 2^31."""
    row = tl.arange(0, ROWS).to(tl.int64) + tile * ROWS
    turning = (row < num_rows)[:, None] & (tl.arange(0, HALF) < ROTARY // 2)[None, :]
    return row, row // HEADS, turning


@triton.jit
def _tables(cos_ptr, sin_ptr, token, turning, ROTARY: tl.constexpr, HALF: tl.constexpr):
    at = token[:, None] * ROTARY + tl.arange(0, HALF)[None, :]
    cos1, sin1 = tl.load(cos_ptr + at, turning, other=0.0), tl.load(sin_ptr + at, turning, other=0.0)
    at += ROTARY // 2
    return cos1, tl.load(cos_ptr + at, turning, other=0.0), sin1, tl.load(sin_ptr + at, turning, other=0.0)


@triton.jit
def _passing(row, num_rows, DIM: tl.constexpr, ROTARY: tl.constexpr, REST: tl.constexpr):
    """Columns of the dims that pass through, and which exist."""
    column = ROTARY + tl.arange(0, REST)
    return column, (row < num_rows)[:, None] & (column < DIM)[None, :]


@triton.jit
def _turn_heads(
    tile, x_ptr, stride, weight_ptr, y_ptr, rstd_ptr, cos_ptr, sin_ptr, num_rows, eps,
    NORM: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    ROWS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row, token, turning = _tile(tile, num_rows, HEADS, ROTARY, ROWS, HALF)
    column = tl.arange(0, HALF)
    begin = token * stride + (row % HEADS) * DIM
    out = row * DIM
    first = tl.load(x_ptr + begin[:, None] + column[None, :], turning, other=0.0)
    second = tl.load(x_ptr + begin[:, None] + (ROTARY // 2 + column)[None, :], turning, other=0.0)
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    rest_column, passing = _passing(row, num_rows, DIM, ROTARY, REST)
    rest = tl.load(x_ptr + begin[:, None] + rest_column[None, :], passing, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(rest * rest, 1)
        rstd = 1.0 / tl.sqrt(squares / DIM + eps)
        tl.store(rstd_ptr + row, rstd, row < num_rows)
        half = column < ROTARY // 2
        weight1 = tl.load(weight_ptr + column, half, other=0.0).to(tl.float32)[None, :]
        weight2 = tl.load(weight_ptr + ROTARY // 2 + column, half, other=0.0).to(tl.float32)[None, :]
        weight3 = tl.load(weight_ptr + rest_column, rest_column < DIM, other=0.0).to(tl.float32)[None, :]
        first = (weight1 * (first * rstd[:, None]).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        second = (weight2 * (second * rstd[:, None]).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        rest = (weight3 * (rest * rstd[:, None]).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    cos1, cos2, sin1, sin2 = _tables(cos_ptr, sin_ptr, token, turning, ROTARY, HALF)
    first, second = _turned(first, second, cos1, cos2, sin1, sin2, False)
    tl.store(y_ptr + out[:, None] + column[None, :], first.to(dtype), turning)
    tl.store(y_ptr + out[:, None] + (ROTARY // 2 + column)[None, :], second.to(dtype), turning)
    tl.store(y_ptr + out[:, None] + rest_column[None, :], rest.to(dtype), passing)


@triton.jit(do_not_specialize=["q_rows", "k_rows", "q_tiles"])
def rope_kernel(
    q_ptr, k_ptr, q_stride, k_stride, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr, rstd_ptr, cos_ptr, sin_ptr,
    q_rows, k_rows, q_tiles, eps,
    NORM: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    ROWS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if tile < q_tiles:
        _turn_heads(
            tile, q_ptr, q_stride, q_weight_ptr, q_out_ptr, rstd_ptr, cos_ptr, sin_ptr, q_rows, eps,
            NORM, Q_HEADS, DIM, ROTARY, ROWS, HALF, REST,
        )  # fmt: skip
    else:
        _turn_heads(
            tile - q_tiles, k_ptr, k_stride, k_weight_ptr, k_out_ptr, rstd_ptr + q_rows, cos_ptr, sin_ptr, k_rows, eps,
            NORM, K_HEADS, DIM, ROTARY, ROWS, HALF, REST,
        )  # fmt: skip


@triton.jit
def _normed_part(grad, x, weight, rstd):
    """Gradient of z = x * rstd after the scaling by ``weight``, z, and the weight's gradient of each row; all in fp32."""
    dtype = x.dtype
    z = x.to(tl.float32) * rstd
    grad_z = (grad * weight).to(dtype).to(tl.float32)
    return grad_z, z, (grad * z.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def _turn_back(
    program, programs, grad_ptr, grad_stride, x_ptr, x_stride, weight_ptr, rstd_ptr, out_ptr, partial_ptr, cos_ptr, sin_ptr, num_rows,
    NORM: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    ROWS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, HALF)
    rest_column = ROTARY + tl.arange(0, REST)
    half = column < ROTARY // 2
    total1, total2, total3 = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32), tl.zeros((REST,), tl.float32)
    for tile in range(program, tl.cdiv(num_rows, ROWS), programs):
        row, token, turning = _tile(tile, num_rows, HEADS, ROTARY, ROWS, HALF)
        _, passing = _passing(row, num_rows, DIM, ROTARY, REST)
        begin = token * grad_stride + (row % HEADS) * DIM
        first = tl.load(grad_ptr + begin[:, None] + column[None, :], turning, other=0.0)
        second = tl.load(grad_ptr + begin[:, None] + (ROTARY // 2 + column)[None, :], turning, other=0.0)
        dtype = first.dtype
        rest = tl.load(grad_ptr + begin[:, None] + rest_column[None, :], passing, other=0.0).to(tl.float32)
        cos1, cos2, sin1, sin2 = _tables(cos_ptr, sin_ptr, token, turning, ROTARY, HALF)
        first, second = _turned(first.to(tl.float32), second.to(tl.float32), cos1, cos2, sin1, sin2, True)
        if NORM:
            first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
            rstd = tl.load(rstd_ptr + row, row < num_rows, other=0.0)[:, None]
            begin = token * x_stride + (row % HEADS) * DIM
            x1 = tl.load(x_ptr + begin[:, None] + column[None, :], turning, other=0.0)
            x2 = tl.load(x_ptr + begin[:, None] + (ROTARY // 2 + column)[None, :], turning, other=0.0)
            x3 = tl.load(x_ptr + begin[:, None] + rest_column[None, :], passing, other=0.0)
            weight1 = tl.load(weight_ptr + column, half, other=0.0).to(tl.float32)[None, :]
            weight2 = tl.load(weight_ptr + ROTARY // 2 + column, half, other=0.0).to(tl.float32)[None, :]
            weight3 = tl.load(weight_ptr + rest_column, rest_column < DIM, other=0.0).to(tl.float32)[None, :]
            first, z1, of_weight1 = _normed_part(first, x1, weight1, rstd)
            second, z2, of_weight2 = _normed_part(second, x2, weight2, rstd)
            rest, z3, of_weight3 = _normed_part(rest, x3, weight3, rstd)
            mean = (tl.sum(first * z1, 1) + tl.sum(second * z2, 1) + tl.sum(rest * z3, 1))[:, None] / DIM
            first, second, rest = (first - z1 * mean) * rstd, (second - z2 * mean) * rstd, (rest - z3 * mean) * rstd
            total1 += tl.sum(of_weight1, 0)
            total2 += tl.sum(of_weight2, 0)
            total3 += tl.sum(of_weight3, 0)
        out = row * DIM
        tl.store(out_ptr + out[:, None] + column[None, :], first.to(dtype), turning)
        tl.store(out_ptr + out[:, None] + (ROTARY // 2 + column)[None, :], second.to(dtype), turning)
        tl.store(out_ptr + out[:, None] + rest_column[None, :], rest.to(dtype), passing)
    if NORM:
        tl.store(partial_ptr + program * DIM + column, total1, half)
        tl.store(partial_ptr + program * DIM + ROTARY // 2 + column, total2, half)
        tl.store(partial_ptr + program * DIM + rest_column, total3, rest_column < DIM)


@triton.jit(do_not_specialize=["q_rows", "k_rows", "q_programs", "k_programs"])
def rope_backward_kernel(
    grad_q_ptr, grad_k_ptr, grad_q_stride, grad_k_stride, q_ptr, k_ptr, q_stride, k_stride, q_weight_ptr, k_weight_ptr, rstd_ptr,
    q_out_ptr, k_out_ptr, partial_ptr, cos_ptr, sin_ptr, q_rows, k_rows, q_programs, k_programs,
    NORM: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    ROWS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """A program takes every n-th tile and keeps its sum of the weight's gradient: no atomics, the same sum every time."""
    program = tl.program_id(0)
    if program < q_programs:
        _turn_back(
            program, q_programs, grad_q_ptr, grad_q_stride, q_ptr, q_stride, q_weight_ptr, rstd_ptr, q_out_ptr, partial_ptr,
            cos_ptr, sin_ptr, q_rows, NORM, Q_HEADS, DIM, ROTARY, ROWS, HALF, REST,
        )  # fmt: skip
    else:
        _turn_back(
            program - q_programs, k_programs, grad_k_ptr, grad_k_stride, k_ptr, k_stride, k_weight_ptr, rstd_ptr + q_rows, k_out_ptr,
            partial_ptr + q_programs * DIM, cos_ptr, sin_ptr, k_rows, NORM, K_HEADS, DIM, ROTARY, ROWS, HALF, REST,
        )  # fmt: skip
