"""Entry points for pytest-benchmark: ``pytest bench --benchmark-only``, with its selection, ``--benchmark-json`` and history.

Small shapes, one per op and backend. Claims come from ``python -m bench``, which knows baselines and ceilings.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from bench.harness import Case, Settings
from llada_kernels.info import all_ops


def first_case(op: str) -> Case:
    """The first case of an op's bench at its quick size."""
    cases = importlib.import_module(f"bench.bench_{op}").cases
    case: Case = next(cases(Settings.of(quick=True, threads=torch.get_num_threads())))
    return case


@pytest.mark.parametrize(("op", "backend"), [(op, b.name) for op, backends in all_ops().items() for b in backends if b.name != "triton"])
def test_op(benchmark: Any, op: str, backend: str) -> None:
    case = first_case(op)
    variant = next(v for v in case.variants if v.name == backend)
    try:
        result = variant.run()
    except ValueError as error:
        if "does not support this call" not in str(error):
            raise
        pytest.skip(str(error))
    assert case.check(result) is None
    benchmark.group = f"{op}: {case.name}, {str(case.dtype).removeprefix('torch.')}"
    benchmark.extra_info.update(shapes=case.shapes, flops=case.flops, bytes=case.bytes, threads=torch.get_num_threads())
    benchmark(variant.run)
