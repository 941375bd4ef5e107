"""Which backends a test can run here."""

from __future__ import annotations

from llada_kernels.ops.dispatch import Backend


def cpu_backends(backends: tuple[Backend, ...]) -> list[str]:
    """Names of the backends that serve CPU tensors. Those of Triton are tested in python_tests/triton."""
    return [b.name for b in backends if b.name != "triton"]
