from __future__ import annotations

import pytest
import torch

from llada_kernels.ops.grouped_gemm import grouped_gemm

from ..cross_compile import check_resources, cross_compiling, unique

NAMES = ["rows_kernel", "rows_kernel", "weight_gradient_kernel"]
#: Rows of 8 experts: 1 to 8 each on average, up to 48, more.
FAMILIES = {"few": 40, "some": 300, "many": 2048}


def run(rows, dtype, experts=8, n=512, k=1024):
    a = torch.empty(rows, k, dtype=dtype, requires_grad=True)
    b = torch.empty(experts, n, k, dtype=dtype, requires_grad=True)
    offsets = torch.tensor([0, *[rows] * experts], dtype=torch.int32)
    y = grouped_gemm(a, b, offsets, backend="triton")
    y.backward(torch.empty_like(y))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiles(arch, dtype):
    with cross_compiling(arch) as launches:
        for rows in FAMILIES.values():
            run(rows, dtype)
    assert [launch.name for launch in launches] == 3 * NAMES
    check_resources(launches, arch)
    for launch in launches:
        assert "cp.async.cg" in launch.ptx, "loads do not go to shared memory 16 bytes at a time"
        if dtype != torch.float32:
            assert launch.wgmma if arch == 90 else launch.tensor_core_instructions


@pytest.mark.parametrize("arch", [86, 89])
def test_fits_small_shared_memory(arch):
    with cross_compiling(arch) as launches:
        for rows in FAMILIES.values():
            run(rows, torch.bfloat16)
    check_resources(launches, arch)


def test_odd_shapes_compile():
    with cross_compiling(90) as launches:
        run(40, torch.float16, n=77, k=130)
        run(2048, torch.float16, n=77, k=130)
    check_resources(launches, 90)


def test_lengths_do_not_recompile():
    """Three families of tiles for all lengths; the weight's gradient has one."""
    with cross_compiling(90) as launches:
        for rows in (1, 2, 16, 33, 64, 65, 80, 383, 384, 385, 4096, 5001):
            run(rows, torch.bfloat16)
    assert {name: len(unique([x for x in launches if x.name == name])) for name in NAMES} == {
        "rows_kernel": 2 * len(FAMILIES),
        "weight_gradient_kernel": 1,
    }


def test_few_rows_keep_enough_bytes_in_flight():
    """Two programs of a multiprocessor, all stages but the one in use: 33 KiB are needed for 4.3 TB/s."""
    with cross_compiling(90) as launches:
        run(40, torch.bfloat16)
    for launch in launches[:2]:
        programs = min(227 * 1024 // launch.shared, 65536 // (launch.registers * 32 * launch.num_warps))
        assert programs >= 2 and programs * launch.shared * 3 // 4 > 33 * 1024


def test_long_sums_have_wide_tiles():
    with cross_compiling(90) as launches:
        run(4096, torch.bfloat16, experts=2, n=1024)
    check_resources(launches, 90)
    # 32 tiles of rows and one more per group; the transposed product keeps to tiles of 128 x 128.
    assert [launch.grid[0] for launch in launches] == [34 * 4, 34 * 8, 2 * 8 * 4]
    assert ["m64n256k16" in launch.ptx for launch in launches[:2]] == [True, False]
