from __future__ import annotations

import pytest
import torch

from llada_kernels.masks import DiffusionMask
from llada_kernels.ops.block_attention import block_attention

from ..cross_compile import check_resources, cross_compiling, unique


def run(mask, heads, kv_heads, dim, dtype):
    q, k, v = (torch.zeros(mask.num_queries, h, dim, dtype=dtype, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    block_attention(q, k, v, mask, backend="triton").backward(torch.zeros_like(q))


# The head geometries of LLaDA2.0-mini and -flash and of LLaDA-MoE, a head dim of 64, and fp32.
CASES = [
    (90, torch.bfloat16, 16, 4, 128),
    (90, torch.float16, 32, 4, 128),
    (90, torch.bfloat16, 16, 16, 128),
    (90, torch.bfloat16, 8, 2, 64),
    (90, torch.float32, 16, 4, 128),
    (80, torch.bfloat16, 16, 4, 128),
    (80, torch.float16, 16, 16, 64),
    (80, torch.float32, 16, 4, 128),
    (86, torch.bfloat16, 16, 4, 128),
]


@pytest.mark.parametrize(("arch", "dtype", "heads", "kv_heads", "dim"), CASES)
def test_compiles(arch, dtype, heads, kv_heads, dim):
    with cross_compiling(arch) as launches:
        run(DiffusionMask.block_diffusion([0, 40, 100], 32), heads, kv_heads, dim, dtype)
    kernels = ["forward_kernel", "grad_q_kernel", "grad_kv_kernel", "sum_splits_kernel", "sum_splits_kernel"]
    assert [launch.name for launch in launches] == kernels
    check_resources(launches, arch)
    for launch in launches[:3]:
        assert launch.tensor_core_instructions > 0
        assert launch.wgmma > 0 or arch < 90 or dtype == torch.float32
        assert "cp.async" in launch.ptx or dtype == torch.float32, "loads do not run ahead"


def test_lengths_do_not_recompile():
    """Four kernels, and one variant more: grad_kv writes fp32 shares, or the gradients where one share is enough."""
    with cross_compiling(90) as launches:
        for lengths in ([1], [16], [5, 0, 28], [1000], [8192], [4096, 100, 16000], [30000]):
            cu = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
            run(DiffusionMask.block_diffusion(cu, 32), 4, 4, 64, torch.bfloat16)
    assert len(launches) >= 24 and len(unique(launches)) == 5, sorted(launch.name for launch in unique(launches))
