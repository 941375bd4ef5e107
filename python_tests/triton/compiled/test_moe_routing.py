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
    "tokens,experts,options",
    [
        (64, 256, (8, 8, 4, 2.5)),
        (8192, 256, (8, 8, 4, 2.5)),
        (64, 64, (8, 1, 1, 1.0, "softmax", False)),
        (64, 256, (8, 1, 1, 2.5, "sigmoid", True, (32, 48))),
    ],
)
def test_compiles(arch, tokens, experts, options):
    with cross_compiling(arch) as launches:
        run(tokens, experts, options)
    sorting = ["count_kernel", *["scan_kernel"] * (tokens > 1000), "sort_kernel"]
    assert [launch.name for launch in launches] == [
        *["pool_kernel"] * (len(options) > 6), "choose_kernel", *sorting, "choose_backward_kernel",
    ]  # fmt: skip
    check_resources(launches, arch)
    assert next(launch for launch in launches if launch.name == "choose_kernel").num_warps == 1, "a token's maxima cross warps"
    for launch in launches:
        assert "atom.global" not in launch.ptx and "red.global" not in launch.ptx


def test_lengths_do_not_recompile():
    """But once more, where chunks of slots become so many that their counts are summed up by a kernel of its own."""
    with cross_compiling(90) as launches:
        for tokens in (1, 2, 7, 16, 33, 1000, 8192):
            run(tokens)
    assert len(launches) == 30 and len(unique(launches)) == 6
