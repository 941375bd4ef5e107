from __future__ import annotations

import pytest
import torch

from llada_kernels.ops.moe_routing import moe_routing

from ..cross_compile import check_resources, cross_compiling, unique


def run(tokens, experts=256, options=(8, 8, 4, 2.5)):
    out = moe_routing(torch.zeros(tokens, experts, requires_grad=True), torch.zeros(experts), *options, backend="triton")
    out.topk_weights.backward(torch.zeros_like(out.topk_weights))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "experts,options",
    [(256, (8, 8, 4, 2.5)), (64, (8, 1, 1, 1.0, "softmax", False)), (256, (8, 1, 1, 2.5, "sigmoid", True, (32, 48)))],
)
def test_compiles(arch, experts, options):
    with cross_compiling(arch) as launches:
        run(64, experts, options)
    names = ["choose_kernel", "count_kernel", "sort_kernel", "choose_backward_kernel"]
    assert [launch.name for launch in launches] == ["pool_kernel"] * (len(options) > 6) + names
    check_resources(launches, arch)
    assert launches[-4].num_warps == 1, "a token's maxima cross warps"
    for launch in launches:
        assert "atom.global" not in launch.ptx and "red.global" not in launch.ptx


def test_lengths_do_not_recompile():
    with cross_compiling(90) as launches:
        for tokens in (1, 2, 7, 16, 33, 1000, 8192):
            run(tokens)
    assert len(launches) == 28 and len(unique(launches)) == 4
