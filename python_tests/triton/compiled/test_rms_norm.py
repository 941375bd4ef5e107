from __future__ import annotations

import pytest
import torch

from llada_kernels.ops.rms_norm import rms_norm

from ..cross_compile import check_resources, cross_compiling, unique


def run(rows, width, dtype, residual):
    x, more = (torch.zeros(rows, width, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.zeros(width, dtype=dtype, requires_grad=True)
    out = rms_norm(x, weight, 1e-6, more if residual else None, backend="triton")
    torch.autograd.backward(out, [torch.zeros_like(o) for o in out] if residual else torch.zeros_like(out))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("width", [2048, 4096, 8192])
def test_compiles(arch, width):
    with cross_compiling(arch) as launches:
        for dtype in (torch.bfloat16, torch.float32):
            for residual in (False, True):
                run(64, width, dtype, residual)
    assert [launch.name for launch in launches[:3]] == ["rms_norm_kernel", "rms_norm_backward_kernel", "sum_parts_kernel"]
    check_resources(launches, arch)
    for launch in launches:
        assert "ld.global.v4" in launch.ptx, f"{launch.name}: loads are not vectorised"


def test_lengths_do_not_recompile():
    with cross_compiling(90) as launches:
        for rows in (1, 2, 7, 16, 1000, 4096):
            run(rows, 2048, torch.bfloat16, True)
    assert len(launches) == 18 and len(unique(launches)) == 3
