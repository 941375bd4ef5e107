"""These tests run kernels: on a GPU, or in Triton's interpreter, which test_interpreter.py starts with TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest
import torch

from llada_kernels.ops import _triton

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # python_tests/conftest.py asks PyTorch for deterministic algorithms

RUNS_HERE = _triton.missing is None and (_triton.interpreting or torch.cuda.is_available())
collect_ignore_glob = [] if RUNS_HERE else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if _triton.interpreting else "cuda")


# Triton's interpreter computes bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + ([] if _triton.interpreting else [torch.bfloat16])


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
