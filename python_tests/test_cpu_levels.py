"""CPU levels: how one is chosen, its matrix products to the last element, and the ops that multiply matrices at each level.

Level amx_emulated runs what is written for AMX on a scalar stand-in for tiles, so packing, strides and remainders are tested anywhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEVELS = ["portable", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated"]


def run_at(level: str, command: list[str]) -> str:
    """Output of a command at a level; skips the test if this machine lacks it."""
    environment = {**os.environ, "LLADA_KERNELS_CPU": level, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if "this machine has no" in done.stderr:
        pytest.skip(f"this machine has no {level}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


PRINT_LEVEL = "import torch, llada_kernels; print(torch.ops.llada_kernels.cpu_level())"


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_can_be_forced(level):
    assert run_at(level, [sys.executable, "-c", PRINT_LEVEL]).strip() == level


def test_an_unknown_level_is_an_error():
    environment = {**os.environ, "LLADA_KERNELS_CPU": "magic"}
    done = subprocess.run([sys.executable, "-c", PRINT_LEVEL], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"ValueError: LLADA_KERNELS_CPU: expected one of {', '.join(LEVELS)}, got magic" in done.stderr


def test_the_emulated_level_is_never_chosen():
    environment = {k: v for k, v in os.environ.items() if k != "LLADA_KERNELS_CPU"}
    done = subprocess.run([sys.executable, "-c", PRINT_LEVEL], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in LEVELS and done.stdout.strip() != "amx_emulated"


@pytest.mark.parametrize("level", LEVELS)
def test_packed_products_are_exact(level, tmp_path):
    """Every remainder of rows, columns and depth, strides, and memory around the operands; the semantics of tiles."""
    run_at(level, [sys.executable, "-c", PRINT_LEVEL])
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    assert compiler is not None, "the package is built with a C++ compiler"
    program = tmp_path / "packed_gemm_test"
    sources = [str(ROOT / "python_tests" / "cpp" / "packed_gemm_test.cpp"), str(ROOT / "csrc" / "common" / "cpu_level.cpp")]
    flags = ["-std=c++20", "-Os", "-fno-math-errno", "-Wno-psabi", f"-DLLADA_CPU_LEVEL={level}", f"-DLLADA_CPU_LEVEL_{level}"]
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", *sources, "-o", str(program)], check=True)
    assert run_at(level, [str(program)]).strip() == "ok"


OPS = """
import torch
from llada_kernels.ops import grouped_gemm, lm_head_unmask, lm_loss
torch.manual_seed(0)

def compare(call, leaves, tolerance):
    results = []
    for backend in ("native", "reference"):
        own = [t.clone().requires_grad_() for t in leaves]
        out = call(backend, *own)
        results.append([out, *torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), own)])
    for ours, theirs in zip(*results):
        scale = float(theirs.detach().abs().max()) + 1e-30
        torch.testing.assert_close(ours.float() / scale, theirs.float() / scale, atol=tolerance, rtol=0)

for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    # groups of every kind of size: none, one row, as many as are packed, more than a step; odd depths and columns, more than a tile of them
    for n, k, offsets in (
        (70, 75, [0, 1, 1, 7, 30, 97, 230]), (64, 96, [0, 1, 1, 7, 30, 97, 230]), (33, 31, [0, 1, 1, 7, 30, 97, 230]),
        (270, 300, [0, 301, 301, 560]),
    ):
        a, b = torch.randn(offsets[-1], k).to(dtype), torch.randn(len(offsets) - 1, n, k).to(dtype)
        offsets = torch.tensor(offsets, dtype=torch.int32)
        compare(lambda backend, a, b: grouped_gemm(a, b, offsets, backend=backend), (a, b), tolerance)
    hidden, head = torch.randn(75, 72).to(dtype), (torch.randn(331, 72) / 8).to(dtype)
    targets, weights = torch.randint(331, (75,)), torch.rand(75) * (torch.rand(75) < 0.9)
    compare(lambda backend, h, w: lm_loss(h, w, targets, weights, backend=backend)[0], (hidden, head), tolerance)
    for positions in (3, 20, 50, 140):
        tokens = torch.full((2, positions), 330)
        several = hidden.repeat(4, 1)[: 2 * positions].view(2, positions, -1)
        tokens, confidence, counts = zip(*(
            lm_head_unmask(several * 2, head, tokens, 330, 0.5, backend=backend)
            for backend in ("native", "reference")
        ))
        torch.testing.assert_close(confidence[0], confidence[1], atol=tolerance, rtol=0)
        assert tokens[0].shape == tokens[1].shape and bool((tokens[0] == tokens[1]).float().mean() > 0.9)
"""


@pytest.mark.parametrize("level", LEVELS)
def test_matrix_ops(level):
    """Those that have no test of this kind of their own (attention, moe_mlp and quantised experts do)."""
    run_at(level, [sys.executable, "-c", OPS])


OTHER_OPS = """
import torch
from llada_kernels.ops import moe_routing, rms_norm, rope, swiglu, threshold_unmask
from llada_kernels.ops.rope import rope_tables
torch.manual_seed(0)

def both(call, leaves):
    results = []
    for backend in ("native", "reference"):
        own = [t.clone().requires_grad_() for t in leaves]
        out = call(backend, *own)
        out = [out] if isinstance(out, torch.Tensor) else list(out)
        grads = torch.autograd.grad(out, own, [torch.linspace(-1, 1, o.numel()).view(o.shape).to(o.dtype) for o in out])
        results.append([*(o.detach() for o in out), *grads])
    return list(zip(*results))

def close(pairs, tolerance):
    for ours, theirs in pairs:
        scale = float(theirs.abs().max()) + 1e-30
        torch.testing.assert_close(ours.float() / scale, theirs.float() / scale, atol=tolerance, rtol=0)

for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    for n in (7, 31, 75, 128):  # less than a vector, a remainder, whole vectors
        x, r, w = torch.randn(9, n).to(dtype), torch.randn(9, n).to(dtype), torch.randn(n).to(dtype)
        close(both(lambda b, x, w: rms_norm(x, w, backend=b), (x, w)), tolerance)
        close(both(lambda b, x, w, r: rms_norm(x, w, 1e-6, r, backend=b), (x, w, r)), tolerance)
        close(both(lambda b, x: swiglu(x, backend=b), (torch.randn(5, 2 * n).to(dtype),)), tolerance)
    for dim, turned in ((10, 6), (64, 32), (72, 72)):
        q, k = torch.randn(7, 3, dim).to(dtype), torch.randn(7, 2, dim).to(dtype)
        cos, sin = rope_tables(torch.arange(7), turned, 1e4, dtype)
        assert all(torch.equal(*p) for p in both(lambda b, q: rope(q, cos, sin, backend=b), (q,)))  # single roundings: to the bit
        weights = torch.rand(dim).to(dtype), torch.rand(dim).to(dtype)
        close(both(lambda b, q, k, *w: rope(q, cos, sin, k, *w, backend=b), (q, k, *weights)), tolerance)
    for vocab in (7, 1025, 3001):
        logits, tokens = (torch.randn(2, 9, vocab) * 4).to(dtype), torch.randint(0, vocab, (2, 9))
        tokens[:, 3:] = 5
        for options in ({}, {"editing_threshold": 0.1}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 3}):
            a, b = (threshold_unmask(logits, tokens, 5, 0.4, **options, backend=backend) for backend in ("native", "reference"))
            assert all(torch.equal(x, y) for x, y in zip(a, b)), (vocab, options)  # confidences too are fixed to the bit
logits = torch.randn(1, 1, 1500)
logits.view(torch.int32)[0, 0, 700] = -1  # a NaN of ones only
try:
    raise AssertionError(threshold_unmask(logits, torch.zeros(1, 1, dtype=torch.int64), 5, 0.4, backend="native"))
except ValueError as error:
    assert "got NaN in row 0, position 0" in str(error)
for experts, groups in ((8, 2), (60, 4), (256, 8)):
    for score in ("sigmoid", "softmax"):
        a, b = (moe_routing(torch.linspace(-2, 2, 33 * experts).sin().view(33, experts) * 3, None, 2, groups, 2, 2.5, score, backend=n)
                for n in ("native", "reference"))
        assert torch.equal(a.topk_ids, b.topk_ids) and torch.equal(a.offsets, b.offsets) and torch.equal(a.permutation, b.permutation)
        torch.testing.assert_close(a.topk_weights, b.topk_weights, rtol=1e-5, atol=1e-7)
"""


@pytest.mark.parametrize("level", LEVELS)
def test_other_ops(level):
    """Those without products of matrices: the same roundings and decisions at each level."""
    run_at(level, [sys.executable, "-c", OTHER_OPS])
