"""Runs the tests of values/ in Triton's interpreter. It is chosen when a kernel is defined: hence processes of their own, one per file."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from llada_kernels.ops import _triton

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = sorted(p.name for p in (Path(__file__).parent / "values").glob("test_*.py"))


# Its interpreter turns arrays of one element into integers, which numpy 2.4 refuses. There the tests of values/ need a GPU.
BROKEN = _triton.missing is None and version("triton").startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0"


@pytest.mark.skipif(_triton.missing is not None, reason=str(_triton.missing))
@pytest.mark.skipif(BROKEN, reason="the interpreter of triton 3.6 does not work with numpy 2.4")
@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(name):
    file = f"python_tests/triton/values/{name}"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
