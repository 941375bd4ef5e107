"""The kernels of the Triton backend. Imported at the first launch only."""

import triton
import triton.language as tl


@triton.jit
def _rows_of(tile, num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Column numbers, where each row begins (64 bits: offsets may exceed 2^31), row numbers, and which elements exist."""
    row = tl.arange(0, ROWS).to(tl.int64) + tile * ROWS
    column = tl.arange(0, COLUMNS)
    return column, row[:, None] * WIDTH, row, (row < num_rows)[:, None] & (column < WIDTH)[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, rstd_ptr, num_rows, eps,
    WITH_RESIDUAL: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column, begin, row, inside = _rows_of(tl.program_id(0), num_rows, WIDTH, ROWS, COLUMNS)
    at = begin + column[None, :]
    x = tl.load(x_ptr + at, inside, other=0.0)
    weight = tl.load(weight_ptr + column, column < WIDTH, other=0.0)
    dtype = x.dtype
    if WITH_RESIDUAL:
        residual = tl.load(residual_ptr + at, inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(total_ptr + at, x, inside)
    wide = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
    z = (wide * rstd[:, None]).to(dtype)  # rounded before it is scaled, as the official code
    tl.store(y_ptr + at, (weight.to(tl.float32)[None, :] * z.to(tl.float32)).to(dtype), inside)
    tl.store(rstd_ptr + row, rstd, row < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_backward_kernel(
    grad_y_ptr, grad_total_ptr, x_ptr, weight_ptr, rstd_ptr, grad_x_ptr, partial_ptr, num_rows,
    WITH_TOTAL: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program takes every n-th tile of rows and keeps its sum of the weight's gradient: no atomics, the same sum every time."""
    column = tl.arange(0, COLUMNS)
    weight = tl.load(weight_ptr + column, column < WIDTH, other=0.0).to(tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        _, begin, row, inside = _rows_of(tile, num_rows, WIDTH, ROWS, COLUMNS)
        at = begin + column[None, :]
        grad_y = tl.load(grad_y_ptr + at, inside, other=0.0)
        dtype = grad_y.dtype
        rstd = tl.load(rstd_ptr + row, row < num_rows, other=0.0)[:, None]
        z = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32) * rstd
        grad_y = grad_y.to(tl.float32)
        grad_z = (grad_y * weight[None, :]).to(dtype).to(tl.float32)
        mean = tl.sum(grad_z * z, 1)[:, None] / WIDTH
        grad_x = ((grad_z - z * mean) * rstd).to(dtype)
        if WITH_TOTAL:  # rounded, then added: as autograd adds the gradients of two uses
            more = tl.load(grad_total_ptr + at, inside, other=0.0)
            grad_x = (grad_x.to(tl.float32) + more.to(tl.float32)).to(dtype)
        tl.store(grad_x_ptr + at, grad_x, inside)
        total += tl.sum((grad_y * z.to(dtype).to(tl.float32)).to(dtype).to(tl.float32), 0)
    tl.store(partial_ptr + tl.program_id(0) * WIDTH + column, total, column < WIDTH)


@triton.jit(do_not_specialize=["num_parts"])
def sum_parts_kernel(partial_ptr, out_ptr, num_parts, WIDTH: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[c] = sum over the parts of partial[part, c], in an order that the number of parts fixes."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, num_parts, PARTS):
        part = begin + tl.arange(0, PARTS)
        inside = (part < num_parts)[:, None] & (column < WIDTH)[None, :]
        total += tl.sum(tl.load(partial_ptr + part[:, None] * WIDTH + column[None, :], inside, other=0.0), 0)
    tl.store(out_ptr + column, total, column < WIDTH)
