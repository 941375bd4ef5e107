"""Installing and importing: a wheel made from the sdist outside the source tree, a missing or broken library, the build's switches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from llada_kernels.info import cpu_name

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_tools"))
import build_backend  # noqa: E402

CALL = "import torch; from llada_kernels.ops.rms_norm import rms_norm; print(rms_norm(torch.ones(2, 4), torch.ones(4){}).sum().item())"


def run_python(code: str, package_parent: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code with the package taken from ``package_parent``, away from the source tree."""
    env = {**os.environ, "PYTHONPATH": str(package_parent), **environment}
    return subprocess.run([sys.executable, "-P", "-c", code], cwd=package_parent, env=env, capture_output=True, text=True)


def call_backend(hook: str, source: Path, out: Path, **environment: str) -> Path:
    """Call a hook of the backend shim in a source tree, as a front end does; returns what it built."""
    code = f"import build_backend, sys; print(); print(build_backend.{hook}(sys.argv[1]))"
    env = {**os.environ, "PYTHONPATH": str(source / "build_tools"), **environment}
    result = subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return out / result.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return call_backend("build_sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def installed(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, come the whole way: sdist, unpacked and compiled anew elsewhere, wheel, pip."""
    work = tmp_path_factory.mktemp("from_sdist")
    shutil.unpack_archive(sdist, work / "unpacked")
    (source,) = (work / "unpacked").iterdir()
    wheel = call_backend("build_wheel", source, work, LLADA_KERNELS_BUILD_DIR=str(work / "cmake"))
    assert "-py3-none-" in wheel.name
    shutil.rmtree(work / "unpacked")
    shutil.rmtree(work / "cmake")
    target = work / "target"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


def test_a_wheel_from_the_sdist_runs_outside_the_source_tree(installed):
    result = run_python(CALL.format(", backend='native'") + "; import llada_kernels; print(llada_kernels.__file__)", installed)
    assert result.returncode == 0, result.stderr
    total, where = result.stdout.split()
    assert float(total) == pytest.approx(8, abs=1e-4)
    assert Path(where).is_relative_to(installed)
    facts = run_python("import sys; from llada_kernels.info import main; sys.exit(main(['--json']))", installed)
    ops = json.loads(facts.stdout)["ops"]
    assert len(ops) >= 10 and all(backends == ["native", "triton", "reference"] for backends in ops.values())


def test_the_installed_package_holds_every_module(installed):
    ours = {p.relative_to(ROOT) for p in (ROOT / "llada_kernels").rglob("*.py")}
    assert ours <= {p.relative_to(installed) for p in (installed / "llada_kernels").rglob("*.py")}
    assert (installed / "llada_kernels" / "py.typed").exists() and (installed / "llada_kernels" / "_C.so").exists()
    assert not (installed / "csrc").exists() and not (installed / "python_tests").exists()


def test_sdist_holds_what_the_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"CMakeLists.txt", "setup.py", "pyproject.toml", "build_tools/build_backend.py", "LICENSE"}
    needed |= {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")}
    assert needed <= names
    assert not [name for name in names if name.endswith(".so")]


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "llada_kernels", tmp_path / "llada_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


@pytest.mark.parametrize("content", [None, b"not a shared object"])
def test_without_a_usable_library_the_reference_serves(copied_package, content):
    if content is not None:
        (copied_package / "llada_kernels" / "_C.so").write_bytes(content)
    expected = "_C.so is missing" if content is None else "Could not load this library"
    result = run_python(CALL.format(""), copied_package)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(8, abs=1e-4)
    native = run_python(CALL.format(", backend='native'"), copied_package)
    assert native.returncode != 0
    assert "ValueError: rms_norm: backend 'native' does not support this call" in native.stderr
    assert expected in native.stderr
    facts = run_python("import sys; from llada_kernels.info import main; sys.exit(main(['--json']))", copied_package)
    assert expected in json.loads(facts.stdout)["backends"]["native"]


def test_a_library_built_before_an_operator_existed_is_not_used(copied_package):
    shutil.copy(ROOT / "llada_kernels" / "_C.so", copied_package / "llada_kernels")
    source = copied_package / "llada_kernels" / "_library.py"
    source.write_text(source.read_text().replace("OPERATORS = (", 'OPERATORS = (\n    "operator_of_tomorrow",'))
    native = run_python(CALL.format(", backend='native'"), copied_package)
    assert "_C.so was built from other sources: it lacks operator_of_tomorrow" in native.stderr
    assert run_python(CALL.format(""), copied_package).returncode == 0


def test_info_of_this_installation():
    result = subprocess.run([sys.executable, "-m", "llada_kernels.info", "--json"], capture_output=True, text=True, check=True)
    facts = json.loads(result.stdout)
    assert facts["backends"]["native"] == "loaded"
    assert facts["cpu_level"] in ("portable", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated")
    assert facts["ops"]["block_attention"] == ["native", "triton", "reference"]


def test_the_name_of_a_cpu_tells_families_apart():
    zen = "processor\t: {}\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nflags\t\t: fpu vme\n\n"
    assert cpu_name(zen.format(0) + zen.format(1).replace("25", "26")) == "AMD EPYC family 25 model 17"
    assert cpu_name("processor\t: 0\nmodel name\t: Cortex\n") == "Cortex"
    assert cpu_name("processor\t: 0\nBogoMIPS\t: 50.00\n\n") is None and cpu_name("") is None


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(nvcc="13.0", cuda_torch=True): an nvcc of that release (None: none) and a torch of that kind, as the build sees them."""

    def describe(nvcc: str | None, cuda_torch: bool) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CUDA_HOME", raising=False)
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").touch()
        version = "__all__ = ['cuda']\ncuda: Optional[str] = " + ("'13.0'" if cuda_torch else "None") + "\n"
        (tmp_path / "torch" / "version.py").write_text(version)
        monkeypatch.setattr(build_backend, "_site_packages", lambda: [tmp_path])
        if nvcc is not None:
            (tmp_path / "nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {nvcc}, V{nvcc}.1'\n")
            (tmp_path / "nvcc").chmod(0o755)

    return describe


@pytest.mark.parametrize(
    ("mode", "nvcc", "cuda_torch", "expected"),
    [
        ("auto", "13.0", True, True),
        ("auto", "12.8", True, True),
        ("auto", "12.6", True, False),
        ("auto", "13.0", False, False),
        ("auto", None, True, False),
        ("off", "13.0", True, False),
        ("on", "13.0", False, True),
        ("on", "12.8", True, True),
        ("on", "12.6", True, "expected nvcc 12.8 or newer, got release 12.6 .*set LLADA_KERNELS_CUDA=off"),
        ("on", "9.2", True, "expected nvcc 12.8 or newer, got release 9.2"),
        ("on", None, True, "nvcc was not found on PATH or under CUDA_HOME"),
        ("perhaps", "13.0", True, "expected auto, on or off, got 'perhaps'"),
    ],
)
def test_cuda_switch(monkeypatch, machine, mode, nvcc, cuda_torch, expected):
    monkeypatch.setenv("LLADA_KERNELS_CUDA", mode)
    machine(nvcc, cuda_torch)
    if isinstance(expected, str):
        with pytest.raises(SystemExit, match=expected):
            build_backend.wants_cuda()
    else:
        assert build_backend.wants_cuda() is expected


def test_compile_jobs_fit_the_memory(monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for gib, jobs in ((1, 1), (4, 2), (24, 12)):
        monkeypatch.setattr(os, "sysconf", lambda name, gib=gib: gib << 18 if name == "SC_PHYS_PAGES" else 4096)
        assert build_backend.compile_jobs(cuda=True) == jobs and build_backend.compile_jobs(cuda=False) == 64
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build_backend.compile_jobs(cuda=True) == build_backend.compile_jobs(cuda=False) == 3


def test_the_build_asks_for_torch_only_where_there_is_none(monkeypatch, tmp_path):
    assert not [r for r in build_backend.get_requires_for_build_wheel() if r.startswith("torch")]
    monkeypatch.setattr(build_backend, "_site_packages", lambda: [tmp_path])
    monkeypatch.setattr(build_backend, "find_spec", lambda name: None)
    assert "torch>=2.11" in build_backend.get_requires_for_build_wheel()
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    assert build_backend.find_package("torch") == tmp_path / "torch"
