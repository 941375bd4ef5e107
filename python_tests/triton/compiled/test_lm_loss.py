from __future__ import annotations

import pytest
import torch

from llada_kernels.ops.lm_loss import lm_loss

from ..cross_compile import check_resources, cross_compiling, unique

FORWARD = ["loss_parts_kernel", "loss_kernel"]
BACKWARD = ["logit_gradients_kernel", "hidden_gradient_kernel", "head_gradient_kernel"]


def run(tokens, dtype, entropy="correct", vocab=10240, width=2048):
    hidden, lm_head = (torch.zeros(n, width, dtype=dtype, requires_grad=True) for n in (tokens, vocab))
    result = lm_loss(hidden, lm_head, torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens), entropy, backend="triton")
    (result.loss + (0 if entropy is None else result.entropy.sum())).backward()


@pytest.mark.parametrize(
    ("arch", "dtype", "entropy"),
    [(80, torch.bfloat16, "correct"), (89, torch.bfloat16, "all"), (90, torch.bfloat16, "correct"), (90, torch.bfloat16, None),
     (90, torch.float16, "all"), (80, torch.float32, "correct"), (90, torch.float32, "all")],
)  # fmt: skip
def test_compiles(arch, dtype, entropy):
    with cross_compiling(arch) as launches:
        run(64, dtype, entropy)
    assert [launch.name for launch in launches] == FORWARD + 3 * BACKWARD  # 10240 ids are 3 chunks
    check_resources(launches, arch)
    for launch in unique(launches):
        if launch.name != "loss_kernel":
            assert "cp.async" in launch.ptx, "operands are not prefetched"
            if dtype != torch.float32:
                assert launch.wgmma if arch == 90 else launch.tensor_core_instructions


def test_lengths_do_not_recompile():
    """Also not the last chunk of ids, which is shorter."""
    with cross_compiling(90) as launches:
        for tokens in (1, 16, 33, 1000):
            run(tokens, torch.bfloat16, vocab=9001)
    assert len(launches) == 4 * 11 and len(unique(launches)) == 5
