"""The compiled backends have no second derivatives and must say so: PyTorch would take them for 0."""

from __future__ import annotations

import pytest
import torch

from llada_kernels import DiffusionMask, _library, ops
from llada_kernels.ops.rope import rope_tables

OFFSETS = torch.tensor([0, 3, 8], dtype=torch.int32)
ROUTING = ops.moe_routing(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), None, 2, backend="reference")
CALLS = {  # an op as a function of one input
    "block_attention": ((8, 2, 16), lambda x, b: ops.block_attention(x, x, x, DiffusionMask.block_causal([0, 8], 4), backend=b)),
    "grouped_gemm": ((8, 6), lambda x, b: ops.grouped_gemm(x, x.reshape(2, 4, 6), OFFSETS, backend=b)),
    "lm_loss": ((8, 6), lambda x, b: ops.lm_loss(x, x, torch.arange(8), torch.ones(8), backend=b).loss),
    "moe_mlp": ((8, 6), lambda x, b: ops.moe_mlp(x, ROUTING, torch.ones(4, 4, 6), torch.ones(4, 6, 2), backend=b)),
    "moe_routing": ((8, 4), lambda x, b: ops.moe_routing(x, None, 2, backend=b).topk_weights),
    "rms_norm": ((8, 6), lambda x, b: ops.rms_norm(x, x[0], backend=b)),
    "rope": ((8, 2, 16), lambda x, b: ops.rope(x, *rope_tables(torch.arange(8), 16, 1e4, x.dtype), q_weight=x[0, 0], backend=b)),
    "swiglu": ((8, 6), lambda x, b: ops.swiglu(x, backend=b)),
}


def test_every_backward_is_called():
    assert set(CALLS) == {name.removesuffix("_backward") for name in _library.OPERATORS if name.endswith("_backward")}


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives(name):
    shape, call = CALLS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def twice(backend):
        (first,) = torch.autograd.grad(call(x, backend).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    assert twice("reference").abs().sum() > 0
    with pytest.raises(RuntimeError, match=f"{name}: expected to be differentiated once .* backend='reference' can be"):
        twice("native")
