"""Builds the compiled parts with CMake. Metadata is in pyproject.toml; torch is located, never imported."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_tools"))
from build_backend import compile_jobs, find_nvcc, find_package, wants_cuda  # noqa: E402


class CMakeBuild(build_ext):
    """One CMake call builds every extension; its folder persists, so that a rebuild compiles only what changed."""

    def run(self):
        torch, pybind11 = find_package("torch"), find_package("pybind11")
        if torch is None:
            raise SystemExit("torch was not found: install torch 2.11 or newer first (pip install torch)")
        cuda = wants_cuda()
        print(f"llada-kernels: torch headers from {torch}, CUDA kernels: {'on' if cuda else 'off'}", flush=True)
        # cmake and ninja from PyPI lie beside the interpreter, which need not be on PATH.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        environment = {**os.environ, "PATH": path}
        cmake = shutil.which("cmake", path=path)
        if cmake is None:
            raise SystemExit("cmake was not found: install it first (pip install cmake ninja)")
        build = Path(os.environ.get("LLADA_KERNELS_BUILD_DIR", ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"))
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", f"-DTORCH_ROOT={torch}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DLLADA_KERNELS_CUDA={'ON' if cuda else 'OFF'}"]
        if cuda:
            configure += [f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        if pybind11 is not None:
            configure += [f"-Dpybind11_DIR={pybind11 / 'share' / 'cmake' / 'pybind11'}"]
        if not (build / "CMakeCache.txt").exists() and shutil.which("ninja", path=path):
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True, env=environment)
        subprocess.run([cmake, "--build", str(build), "-j", str(compile_jobs(cuda))], check=True, env=environment)
        for extension in self.extensions:
            built = build / self.get_ext_filename(extension.name.split(".")[-1])
            if built.exists():
                self.copy_file(str(built), str(self._target(extension.name)))
            elif not extension.optional:
                raise SystemExit(f"CMake did not build {built}")

    def _target(self, fullname):
        target = Path(self.get_ext_fullpath(fullname))
        if self.editable_mode:  # beside the sources
            target = ROOT / fullname.rpartition(".")[0].replace(".", "/") / target.name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def get_ext_filename(self, fullname):
        # The operator library has no Python symbols: it is loaded by torch.ops.load_library and serves every Python.
        if fullname.split(".")[-1] == "_C":
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def get_outputs(self):
        return [str(self._target(e.name)) for e in self.extensions if self._target(e.name).exists()]


class AnyPythonWheel(bdist_wheel):
    """Tag py3-none-<platform>: only the optional _host module belongs to one Python, and its Python twin serves elsewhere."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("llada_kernels._C", []), Extension("llada_kernels._host", [], optional=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
