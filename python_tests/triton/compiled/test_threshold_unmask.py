from __future__ import annotations

import pytest
import torch

from llada_kernels.ops.threshold_unmask import threshold_unmask

from ..cross_compile import check_resources, cross_compiling, unique

VOCAB = 157184


def run(rows, length, dtype, editing=0.5, vocab=VOCAB):
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    threshold_unmask(torch.empty(rows, length, vocab, dtype=dtype), tokens, 3, 0.9, editing, backend="triton")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiles(arch, dtype):
    with cross_compiling(arch) as launches:
        run(2, 3, dtype)
    assert [launch.name for launch in launches] == ["parts_kernel", "rules_kernel"]
    check_resources(launches, arch)
    parts = launches[0]
    assert parts.grid == (2 * 3 * -(-154 // (8 // dtype.itemsize)),)
    assert parts.ptx.count("ld.global.v4") == 16 == parts.ptx.count("ld.global"), "every thread loads 16 times 16 bytes"
    assert "bar.sync" not in parts.ptx, "a warp needs no other"


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_arithmetic_is_that_of_the_reference(arch, dtype):
    """Multiplications are fused with additions in exponential32 only, and divisions are rounded correctly."""
    with cross_compiling(arch) as launches:
        run(1, 2, dtype)
    for launch in launches:
        assert "approx" not in launch.ptx and ".ftz" not in launch.ptx
    parts, rules = (launch.ptx for launch in launches)
    logits = 16 * 16 // dtype.itemsize  # of a thread
    assert parts.count("fma.rn.f32") == parts.count("fma.") == 7 * logits and "mul.f32" not in parts
    assert "fma." not in rules and "div.rn.f64" in rules


def test_lengths_do_not_recompile():
    with cross_compiling(90) as launches:
        for rows, length in ((1, 1), (1, 32), (3, 7), (16, 32), (5, 48)):
            run(rows, length, torch.bfloat16, vocab=4096)
    assert len(launches) == 10 and len(unique(launches)) == 2


def test_an_odd_vocabulary_compiles():
    with cross_compiling(90) as launches:
        run(1, 2, torch.bfloat16, editing=None, vocab=50001)
    check_resources(launches, 90)
