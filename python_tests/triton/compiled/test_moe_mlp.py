from __future__ import annotations

import re

import pytest
import torch

from llada_kernels.ops import QuantizedExperts, Routing, moe_mlp

from ..cross_compile import check_resources, cross_compiling, unique

FORWARD = ["gate_up_kernel", "rows_kernel", "combine_kernel"]
BACKWARD = ["activation_gradient_kernel", "weight_gradient_kernel", "weight_gradient_kernel", "rows_kernel", "combine_kernel"]
#: Tokens of 16 experts, 4 each: 1 to 8 rows of an expert on average, up to 48, more.
FAMILIES = {"few": 9, "some": 100, "many": 500}


def run(tokens, dtype, backward=True, experts=16, top_k=4, hidden=1024, width=512):
    x, gate_up, down = (torch.empty(s, dtype=dtype) for s in ((tokens, hidden), (experts, 2 * width, hidden), (experts, hidden, width)))
    routing = Routing.from_topk(torch.arange(top_k).expand(tokens, top_k), torch.rand(tokens, top_k), experts)
    if not backward:
        moe_mlp(x, routing, gate_up, down, backend="triton")
        return
    for t in (x, routing.topk_weights, gate_up, down):
        t.requires_grad_()
    y = moe_mlp(x, routing, gate_up, down, backend="triton")
    y.backward(torch.empty_like(y))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiles(arch, dtype):
    with cross_compiling(arch) as launches:
        for tokens in FAMILIES.values():
            run(tokens, dtype)
    assert [launch.name for launch in launches] == 3 * (FORWARD + BACKWARD)
    check_resources(launches, arch)
    for launch in launches:
        if launch.name != "combine_kernel":
            assert "cp.async.cg" in launch.ptx, f"{launch.name}: loads do not go to shared memory 16 bytes at a time"
            if dtype != torch.float32:
                assert launch.wgmma if arch == 90 else launch.tensor_core_instructions


@pytest.mark.parametrize("arch", [86, 89])
def test_fits_small_shared_memory(arch):
    with cross_compiling(arch) as launches:
        for tokens in FAMILIES.values():
            run(tokens, torch.bfloat16)
    check_resources(launches, arch)


def test_odd_shapes_compile():
    with cross_compiling(90) as launches:
        for tokens in FAMILIES.values():
            run(tokens, torch.float16, hidden=130, width=77)
    check_resources(launches, 90)


def test_lengths_do_not_recompile():
    """Three families of tiles for all lengths; the backward's weight gradients and sums have one."""
    with cross_compiling(90) as launches:
        for tokens in (1, 2, 16, 32, 33, 64, 191, 192, 193, 500, 1024):
            run(tokens, torch.bfloat16)
    assert {name: len(unique([x for x in launches if x.name == name])) for name in FORWARD + BACKWARD} == {
        "gate_up_kernel": 3,
        "rows_kernel": 6,
        "combine_kernel": 2,
        "activation_gradient_kernel": 3,
        "weight_gradient_kernel": 2,
    }


def test_decoding_launches_three_kernels_and_keeps_enough_bytes_in_flight():
    """All stages but the one in use, of the programs of a multiprocessor: 33 KiB are needed for 4.3 TB/s."""
    with cross_compiling(90) as launches:
        run(32, torch.bfloat16, backward=False, experts=256, top_k=8, hidden=2048)
    assert [launch.name for launch in launches] == FORWARD
    for launch in launches[:2]:
        programs = min(227 * 1024 // launch.shared, 65536 // (launch.registers * 32 * launch.num_warps))
        assert programs >= 2 and programs * launch.shared * 3 // 4 > 33 * 1024
        assert launch.grid[0] >= 4 * 132 and launch.grid[0] % 8 == 0


FP8 = ["quantize_kernel", "gate_up_e4m3_kernel", "down_e4m3_kernel", "combine_kernel"]


def run_fp8(tokens, experts=256, top_k=8, hidden=2048, width=512):
    x = torch.empty(tokens, hidden, dtype=torch.bfloat16)
    routing = Routing.from_topk(torch.arange(top_k).expand(tokens, top_k), torch.rand(tokens, top_k), experts)
    weights = [QuantizedExperts.empty(shape, "fp8") for shape in ((experts, 2 * width, hidden), (experts, hidden, width))]
    moe_mlp(x, routing, *weights, backend="triton")


@pytest.mark.parametrize("arch", [80, 86, 89, 90])
def test_fp8_compiles(arch):
    with cross_compiling(arch) as launches:
        for tokens in (32, 512):
            run_fp8(tokens)
    assert [launch.name for launch in launches] == 2 * FP8
    check_resources(launches, arch)
    for launch in launches:
        if "e4m3" in launch.name:
            assert "cp.async.cg" in launch.ptx
            # fp8 products where there are any, else the same values as fp16
            assert (".f32.e4m3.e4m3" if arch >= 89 else ".f32.f16.f16") in launch.ptx
            assert launch.wgmma if arch == 90 else launch.tensor_core_instructions


def test_fp8_lengths_do_not_recompile_and_keep_enough_bytes_in_flight():
    with cross_compiling(90) as launches:
        for tokens in (1, 2, 16, 33, 256, 257, 1000, 2048):
            run_fp8(tokens)
    assert [len(unique([x for x in launches if x.name == name])) for name in FP8] == [1, 2, 2, 1]
    for launch in launches[1:3]:
        programs = min(227 * 1024 // launch.shared, 65536 // (launch.registers * 32 * launch.num_warps))
        assert programs >= 2 and programs * launch.shared * 2 // 3 > 33 * 1024


def run_integers(tokens, kind, group=32, dtype=torch.bfloat16, experts=256, top_k=8, hidden=2048, width=512):
    x = torch.empty(tokens, hidden, dtype=dtype)
    routing = Routing.from_topk(torch.arange(top_k).expand(tokens, top_k), torch.rand(tokens, top_k), experts)
    weights = [QuantizedExperts.empty(shape, kind, group) for shape in ((experts, 2 * width, hidden), (experts, hidden, width))]
    moe_mlp(x, routing, *weights, backend="triton")


def loop(ptx):
    """Instructions of the loop over the columns."""
    label, rest = re.search(r"(\$L__BB\d+_\d+):[^\n]*Loop Header[^\n]*\n(.*)", ptx, re.DOTALL).groups()
    body = re.split(rf"bra\s+{re.escape(label)};", rest)[0]
    assert "mma" in body
    return body


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("arch,group", [(80, 32), (86, 32), (89, 32), (90, 32), (80, 64), (90, 64)])
def test_integers_compile(arch, group, kind):
    """bf16 products on tensor cores; asynchronous copies of weights and of scales: no load is waited for in the loop."""
    with cross_compiling(arch) as launches:
        for tokens in (32, 512):
            run_integers(tokens, kind, group)
    assert [launch.name for launch in launches] == 2 * FORWARD
    check_resources(launches, arch)
    for launch in launches:
        if launch.name != "combine_kernel":
            assert launch.wgmma if arch == 90 else launch.tensor_core_instructions
            assert ".f32.bf16.bf16" in launch.ptx
            body = loop(launch.ptx)
            assert "cp.async" in body and "ld.global" not in body


def test_integers_of_other_types_and_shapes_compile():
    with cross_compiling(90) as launches:
        for tokens in (32, 512):
            run_integers(tokens, "int4", dtype=torch.float32, hidden=128, width=64)
            run_integers(tokens, "int8", dtype=torch.float16, hidden=192, width=96)
            run_integers(tokens, "int4", 64, dtype=torch.float16, hidden=64, width=320)
            run_integers(tokens, "int8", 128)
    check_resources(launches, 90)


def test_integers_lengths_do_not_recompile():
    """Two families of tiles for all lengths."""
    with cross_compiling(90) as launches:
        for tokens in (1, 2, 16, 33, 256, 257, 1000, 2048):
            run_integers(tokens, "int8")
    assert [len(unique([x for x in launches if x.name == name])) for name in FORWARD] == [2, 2, 1]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_integers_keep_enough_bytes_in_flight(kind):
    """All stages but the one in use, of the programs of a multiprocessor: 33 KiB are needed for 4.3 TB/s."""
    with cross_compiling(90) as launches:
        run_integers(32, kind)
    for launch in launches[:2]:
        programs = min(227 * 1024 // launch.shared, 65536 // (launch.registers * 32 * launch.num_warps))
        assert programs >= 2 and programs * launch.shared * 2 // 3 > 33 * 1024
        assert launch.grid[0] >= 4 * 132 and launch.grid[0] % 4 == 0
