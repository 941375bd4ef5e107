"""Which backends a test can run here."""

from __future__ import annotations

import pytest

from llada_kernels.ops.dispatch import Backend


def cpu_backends(backends: tuple[Backend, ...]) -> list[str]:
    """Names of the backends that serve CPU tensors. Those of Triton are tested in python_tests/triton."""
    return [b.name for b in backends if b.name != "triton"]


def everywhere(backends: tuple[Backend, ...], cuda_kernels: bool = True) -> pytest.MarkDecorator:
    """Parametrises ``backend`` and ``device``: a CPU, the native CUDA kernels emulated on one, and a GPU (marker gpu)."""
    cases = [pytest.param(name, "cpu", id=name) for name in cpu_backends(backends)]
    if cuda_kernels:
        cases.append(pytest.param("native", "emulated", id="native-emulated"))
    cases += [pytest.param(name, "cuda", id=f"{name}-cuda", marks=pytest.mark.gpu) for name in cpu_backends(backends)]
    return pytest.mark.parametrize(("backend", "device"), cases, indirect=["device"])
