"""The rules of the layout: what may include what, one name in five places, no long files."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from llada_kernels import _library, info

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [p for folder in ("csrc", "llada_kernels", "python_tests", "bench", "build_tools") for p in (ROOT / folder).rglob("*")]
SOURCES = [p for p in SOURCES if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")] + [ROOT / "setup.py"]
OPS = sorted(info.all_ops())
NATIVE_OPS = sorted(p.parent.name for p in (ROOT / "csrc").glob("*/params.h"))


def test_no_file_is_over_600_lines():
    assert not {str(p.relative_to(ROOT)): n for p in SOURCES if (n := p.read_text().count("\n")) > 600}


def test_kernels_do_not_include_torch():
    kernels = [p for p in SOURCES if p.is_relative_to(ROOT / "csrc") and p.parent.name != "bindings"]
    assert len(kernels) > 20
    assert not [str(p) for p in kernels if re.search(r'#include\s*[<"](torch|ATen|c10)/', p.read_text())]


def test_bindings_use_only_the_stable_headers():
    includes = {i for p in (ROOT / "csrc" / "bindings").iterdir() for i in re.findall(r"#include\s*<(torch/[^>]+)>", p.read_text())}
    assert includes and all(i.startswith(("torch/csrc/stable/", "torch/headeronly/")) for i in includes)


def test_python_knows_every_operator():
    schemas = (ROOT / "csrc" / "bindings" / "library.cpp").read_text()
    assert sorted(re.findall(r'm\.def\(\s*"(\w+)\(', schemas)) == sorted(_library.OPERATORS)


@pytest.mark.parametrize("op", NATIVE_OPS)
def test_one_name_in_every_place(op):
    assert (ROOT / "csrc" / op / f"cpu_{op}.cpp").exists()
    assert (ROOT / "csrc" / "bindings" / f"{op}.cpp").exists()
    assert op in OPS
    assert (ROOT / "llada_kernels" / "ops" / op).is_dir() or (ROOT / "llada_kernels" / "ops" / f"{op}.py").exists()
    assert (ROOT / "bench" / f"bench_{op}.py").exists()
    assert (ROOT / "python_tests" / "ops" / f"test_{op}.py").exists()


@pytest.mark.parametrize("op", OPS)
def test_backends_of_every_op(op):
    names = [b.name for b in info.all_ops()[op]]
    assert names[0] == "native" and names[-1] == "reference" and names[1:-1] in ([], ["triton"])
    assert op in NATIVE_OPS
    assert ("triton" in names) == (ROOT / "llada_kernels" / "ops" / op / "triton.py").exists()


def test_every_triton_backend_is_run_and_compiled():
    written = {p.parent.name for p in (ROOT / "llada_kernels" / "ops").glob("*/triton.py")}
    tests = ROOT / "python_tests" / "triton"
    assert written
    for folder in ("values", "compiled"):
        assert written == {p.stem.removeprefix("test_") for p in (tests / folder).glob("test_*.py")}, folder


def printed(code: str) -> str:
    """What a fresh interpreter prints."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_imports_no_triton_kernels():
    code = (
        "import sys, llada_kernels.ops, llada_kernels.info as info\n"
        "info.collect()\n"
        "print([m for m in sys.modules if m.endswith('triton_kernels')])"
    )
    assert printed(code) == "[]"


def test_the_package_shows_its_parts_and_version():
    code = (
        "import sys, llada_kernels as l\n"
        "assert 'llada_kernels.training' not in sys.modules\n"
        "print(l.__version__, l.training.Trainer.__name__, l.generation.LLaDA20.__name__, l.ops.swiglu.__name__, hasattr(l, 'nonsense'))"
    )
    assert printed(code).split() == [version("llada-kernels"), "Trainer", "LLaDA20", "swiglu", "False"]


def test_layers_point_one_way():
    result = subprocess.run([str(Path(sys.executable).parent / "lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("leaf", ["masks", "config", "testing"])
def test_leaves_import_nothing_of_the_upper_layers(leaf):
    text = (ROOT / "llada_kernels" / f"{leaf}.py").read_text()
    relative = re.findall(r"^\s*from \.(\w*) import", text, re.MULTILINE)
    assert all(name.startswith("_") for name in relative), relative


def test_weights_are_never_unpickled():
    package = [p for p in SOURCES if p.is_relative_to(ROOT / "llada_kernels")]
    assert not [p.name for p in package if re.search(r"torch\.load\(|^\s*import pickle|from pickle", p.read_text(), re.MULTILINE)]


def test_public_names_exist():
    import llada_kernels
    from llada_kernels import generation, ops, training

    for module in (llada_kernels, ops, generation, training):
        assert len(set(module.__all__)) == len(module.__all__)
        for name in module.__all__:
            assert getattr(module, name) is not None
    for op in OPS:
        assert op in ops.__all__ and inspect.isfunction(getattr(ops, op)), f"{op} is not exported from llada_kernels.ops"
