from __future__ import annotations

import pytest
import torch

from llada_kernels.ops.swiglu import swiglu

from ..cross_compile import check_resources, cross_compiling, unique


def run(rows, width, dtype):
    x = torch.zeros(rows, 2 * width, dtype=dtype, requires_grad=True)
    swiglu(x, backend="triton").backward(torch.zeros(rows, width, dtype=dtype))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiles(arch, dtype):
    with cross_compiling(arch) as launches:
        run(64, 512, dtype)
    assert [launch.name for launch in launches] == ["swiglu_kernel", "swiglu_backward_kernel"]
    check_resources(launches, arch)
    for launch in launches:
        assert "ld.global.v4" in launch.ptx, "loads are not vectorised"


def test_lengths_do_not_recompile():
    with cross_compiling(90) as launches:
        for rows in (1, 2, 7, 16, 1000, 4096):
            run(rows, 512, torch.bfloat16)
    assert len(launches) == 12 and len(unique(launches)) == 2
