"""Shared fixtures: memory that an op does not write is NaN, and tests start from the same seed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .cuda_emulation import emulated_cuda

GOLDEN = Path(__file__).parent / "golden"
sys.path.append(str(Path(__file__).parent / "stand_ins"))  # last: for what is not installed


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (or the largest integer): whatever a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())  # some references have none on a GPU
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where new tensors lie: "cpu", "cuda" (skipped without a GPU), or "emulated": on a CPU, native operators run their CUDA kernels."""
    kind: str = request.param
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with emulated_cuda() if kind == "emulated" else torch.device(kind):
        yield kind
