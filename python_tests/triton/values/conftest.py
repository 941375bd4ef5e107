"""These tests run kernels: on a GPU, or in Triton's interpreter, which test_interpreter.py starts with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from importlib.metadata import version

import numpy as np
import pytest
import torch

from llada_kernels.ops import _triton

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # python_tests/conftest.py asks PyTorch for deterministic algorithms

RUNS_HERE = _triton.missing is None and (_triton.interpreting or torch.cuda.is_available())
collect_ignore_glob = [] if RUNS_HERE else ["test_*.py"]


if _triton.interpreting and tuple(int(part) for part in version("triton").split(".")[:2]) < (3, 9):
    # Until then the interpreter rounds a product and a sum, where the hardware rounds once.
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from llada_kernels.ops.threshold_unmask import reference

    def create_fma(_: object, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        assert z.dtype.scalar.is_fp32()
        a, b, c = (torch.from_numpy(t) for t in np.broadcast_arrays(x.data, y.data, z.data))
        return TensorHandle(reference.fused_multiply_add(a, b, c).numpy(), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if _triton.interpreting else "cuda")


# Triton's interpreter computes bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + ([] if _triton.interpreting else [torch.bfloat16])


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
