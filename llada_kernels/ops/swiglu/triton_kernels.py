"""The kernels of the Triton backend. Imported at the first launch only."""

import triton
import triton.language as tl


@triton.jit
def _tile(num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row numbers (64 bits: offsets may exceed 2^31), column numbers, and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < num_rows) & (column < WIDTH)


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_kernel(gate_up_ptr, y_ptr, num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, inside = _tile(num_rows, WIDTH, ROWS, COLUMNS)
    gate_ptr = gate_up_ptr + row * (2 * WIDTH) + column
    gate = tl.load(gate_ptr, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + WIDTH, inside, other=0.0)
    silu = (gate * tl.sigmoid(gate)).to(up.dtype)  # rounded before the product, as the official code
    y = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(y_ptr + row * WIDTH + column, y.to(up.dtype), inside)


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_backward_kernel(grad_y_ptr, gate_up_ptr, grad_ptr, num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, inside = _tile(num_rows, WIDTH, ROWS, COLUMNS)
    offset = row * (2 * WIDTH) + column
    gate = tl.load(gate_up_ptr + offset, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + offset + WIDTH, inside, other=0.0)
    grad_y = tl.load(grad_y_ptr + row * WIDTH + column, inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = (gate * sigmoid).to(up.dtype)
    grad_silu = (grad_y * up.to(tl.float32)).to(up.dtype).to(tl.float32)
    grad_gate = grad_silu * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(grad_ptr + offset, grad_gate.to(up.dtype), inside)
    tl.store(grad_ptr + offset + WIDTH, (grad_y * silu.to(tl.float32)).to(up.dtype), inside)
