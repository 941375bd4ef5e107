from __future__ import annotations

import pytest
import torch

from llada_kernels.ops.rope import rope

from ..cross_compile import check_resources, cross_compiling, unique


def run(tokens, queries, heads, dim, rotary, dtype, norm):
    q = torch.zeros(queries, heads[0], dim, dtype=dtype, requires_grad=True)
    k = torch.zeros(tokens, heads[1], dim, dtype=dtype, requires_grad=True)
    cos = torch.zeros(tokens, rotary, dtype=dtype)
    weights = [torch.zeros(dim, dtype=dtype, requires_grad=True) for _ in range(2)] if norm else []
    outs = rope(q, cos, cos, k, *weights, backend="triton")
    torch.autograd.backward(list(outs), [torch.zeros_like(o) for o in outs])


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("shape", [((16, 4), 128, 64), ((8, 2), 64, 64)])
@pytest.mark.parametrize("norm", [False, True])
def test_compiles(arch, shape, norm):
    with cross_compiling(arch) as launches:
        for dtype in (torch.bfloat16, torch.float32):
            run(64, 32, *shape, dtype, norm)
    names = ["rope_kernel", "rope_backward_kernel"] + ["sum_parts_kernel"] * 2 * norm
    assert [launch.name for launch in launches] == names * 2
    check_resources(launches, arch)


def test_lengths_do_not_recompile():
    with cross_compiling(90) as launches:
        for tokens, queries in ((1, 1), (2, 1), (16, 16), (1000, 37), (4096, 4096)):
            run(tokens, queries, (16, 4), 128, 64, torch.bfloat16, True)
    assert len(launches) == 20 and len(unique(launches)) == 3
