from __future__ import annotations

import pytest
import torch

from llada_kernels.masks import DiffusionMask
from llada_kernels.ops.cached_block_attention import cached_block_attention

from ..cross_compile import check_resources, cross_compiling, unique


def run(rows, context, heads, kv_heads, dim, dtype, query_len=32):
    mask = DiffusionMask.cached([context] * rows, [query_len] * rows, 32)
    q, k = (torch.zeros(mask.num_queries, h, dim, dtype=dtype) for h in (heads, kv_heads))
    cache, page_table = torch.zeros(4, 32, kv_heads, dim, dtype=dtype), torch.zeros(rows, context // 32, dtype=torch.int32)
    with torch.no_grad():
        cached_block_attention(q, k, k, cache, cache, page_table, mask, backend="triton")


CASES = [
    (90, torch.bfloat16, 16, 4, 128),
    (90, torch.float16, 16, 16, 64),
    (90, torch.float32, 16, 4, 128),
    (80, torch.bfloat16, 32, 4, 128),
    (80, torch.float32, 16, 4, 128),
    (86, torch.bfloat16, 16, 4, 128),
]


@pytest.mark.parametrize(("arch", "dtype", "heads", "kv_heads", "dim"), CASES)
def test_compiles(arch, dtype, heads, kv_heads, dim):
    with cross_compiling(arch) as launches:
        run(1, 8192, heads, kv_heads, dim, dtype)
        run(64, 8192, heads, kv_heads, dim, dtype)
    assert [launch.name for launch in launches] == ["cached_kernel", "merge_chunks_kernel", "cached_kernel"]
    check_resources(launches, arch)
    for launch in launches:
        assert "cp.async" in launch.ptx or dtype == torch.float32, "loads do not run ahead"
        if launch.name == "cached_kernel":
            assert launch.tensor_core_instructions > 0
            assert launch.wgmma > 0 or arch < 90 or dtype == torch.float32


def test_one_block_fills_the_gpu():
    with cross_compiling(90) as launches:
        run(1, 8192, 16, 4, 128, torch.bfloat16)
    assert launches[0].grid == (4, 33) and launches[1].grid == (4, 32)  # 132 multiprocessors


def test_lengths_do_not_recompile():
    """Two kernels, one of them in two variants: chunks by one program or by many."""
    with cross_compiling(90) as launches:
        for rows, context, new in (
            (1, 0, 32),
            (1, 32, 32),
            (1, 8192, 32),
            (3, 2048, 64),
            (1, 32768, 1),
            (40, 512, 32),
            (1, 512, 2000),
            (7, 64, 16),
        ):
            run(rows, context, 4, 4, 64, torch.bfloat16, new)
    assert len(unique(launches)) == 3, sorted(launch.name for launch in unique(launches))
