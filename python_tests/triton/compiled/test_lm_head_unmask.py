from __future__ import annotations

import re

import pytest
import torch

from llada_kernels.ops.lm_head_unmask import lm_head_unmask

from ..cross_compile import check_resources, cross_compiling, unique

VOCAB, WIDTH = 157184, 2048


def run(rows, length, lm_head):
    hidden = torch.empty(rows, length, WIDTH, dtype=lm_head.dtype)
    lm_head_unmask(hidden, lm_head, torch.zeros(rows, length, dtype=torch.int64), 3, 0.9, 0.5, backend="triton")


@pytest.fixture(scope="module")
def heads():
    return {dtype: torch.empty(VOCAB, WIDTH, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)}


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("positions", [1, 32, 64, 300])
def test_compiles(arch, positions, heads):
    with cross_compiling(arch) as launches:
        run(1, positions, heads[torch.bfloat16])
    assert [launch.name for launch in launches] == ["head_parts_kernel", "rules_kernel"]
    check_resources(launches, arch)
    product = launches[0]
    assert product.wgmma if arch == 90 else product.tensor_core_instructions
    assert "cp.async" in product.ptx, "operands are not prefetched"
    exponentials = len(re.findall(r"shl\.b32.*, 23;", product.ptx))
    fused = product.ptx.count("fma.rn.f32") == product.ptx.count("fma.") == 7 * exponentials > 0
    assert fused and ".ftz" not in product.ptx, "not the arithmetic of the reference"
    if positions <= 64:  # all parts of the vocabulary at once: two blocks fit a multiprocessor
        assert product.grid == (154,)
        assert arch == 89 or 2 * product.shared <= 227 * 1024


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_compile(arch, dtype, heads):
    with cross_compiling(arch) as launches:
        run(1, 32, heads[dtype])
        run(4, 32, heads[dtype])
    check_resources(launches, arch)


def test_lengths_do_not_recompile():
    """Four tiles, by the number of positions, and one kernel for the rules."""
    lm_head = torch.empty(3000, WIDTH, dtype=torch.bfloat16)
    with cross_compiling(90) as launches:
        for rows, length in ((1, 1), (1, 7), (1, 16), (1, 17), (2, 16), (1, 64), (3, 13), (3, 32), (7, 31), (64, 32)):
            run(rows, length, lm_head)
    assert len(launches) == 20 and len(unique(launches)) == 5
