"""Which native kernels serve a GPU, decided and prepared without one: fake tensors stand for those of a device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from llada_kernels import _library, info
from llada_kernels.ops._common import native_reason
from llada_kernels.ops.moe_routing import native as routing
from llada_kernels.ops.moe_routing.rule import Rule
from llada_kernels.ops.rope import native as rope
from llada_kernels.ops.threshold_unmask.arguments import rule_arguments


@pytest.fixture
def gpu(monkeypatch):
    """gpu(major, operators): a GPU of that compute capability, and a library with CUDA kernels for these operators."""

    def describe(major: int = 9, operators: frozenset[str] = frozenset()) -> None:
        monkeypatch.setattr(_library, "cuda_operators", operators)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")

    with FakeTensorMode():
        yield describe


def test_reasons_on_a_gpu(gpu):
    x = torch.empty(2, 8, device="cuda")
    every = frozenset(_library.OPERATORS)

    def rule(n_group):
        return Rule(2, n_group, n_group, 1.0, "sigmoid", True, None)

    gpu()
    assert native_reason(x) == "native has no CUDA kernels for this op"
    assert native_reason(x, cuda="moe_routing") == "CUDA kernels not built"
    gpu(7, every)
    assert native_reason(x, cuda="moe_routing") == "native serves GPUs of compute capability 8.0 and newer, got GPU"
    gpu(8, every)
    assert native_reason(x, x, cuda="moe_routing") is None
    assert native_reason(x.half(), cuda="moe_routing") == "native serves float32, bfloat16, got torch.float16"
    assert routing._supports(x, None, rule(1)) is None
    assert routing._supports(torch.empty(2, 1496, device="cuda"), None, rule(8)) == (
        "native serves at most 1500 experts and groups together on a GPU, got 1504"
    )
    tables = torch.empty(3, 8, device="cuda"), torch.empty(3, 8, device="cuda")
    assert rope._native_supports(torch.empty(3, 2, 480, device="cuda"), *tables, None, None, None, 1e-6) is None
    assert rope._native_supports(torch.empty(3, 2, 488, device="cuda"), *tables, None, None, None, 1e-6) == (
        "native serves head dims up to 480 on a GPU, got 488"
    )


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_numbers_reach_a_gpu_without_a_copy():
    """A copy from the host's memory would make the host wait for the device."""
    with FakeTensorMode():
        logits, tokens = torch.empty(2, 3, 9, device="cuda"), torch.empty(2, 3, dtype=torch.int64, device="cuda")
        with _Calls() as seen:
            rule_arguments("logits", logits, 9, tokens, 4, 0.9, 0.5, 2, 0.7, 5, 0.9, 11, None, None, 3)
        assert seen.names and not [name for name in seen.names if "copy" in name]
        with _Calls() as seen:
            rule_arguments("logits", logits, 9, tokens, 4, [0.9, 0.8], None, 1, 0.0, None, None, None, None, None, 0)
        assert [name for name in seen.names if "copy" in name]


def test_info_says_which_cuda_kernels_there_are(monkeypatch):
    operators = SimpleNamespace(cuda_architectures=lambda: "sm_80")
    monkeypatch.setattr(_library, "cuda_operators", frozenset({"rope", "moe_routing"}))
    monkeypatch.setattr(torch.ops, "llada_kernels", operators)
    assert info._cuda_kernels() == "CUDA kernels for sm_80: moe_routing, rope"
    monkeypatch.setattr(operators, "cuda_architectures", lambda: "")
    assert info._cuda_kernels() == "CUDA kernels not built (LLADA_KERNELS_CUDA=on builds them)"
