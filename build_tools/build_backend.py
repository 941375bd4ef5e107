"""PEP 517 backend: setuptools, but torch and the CUTLASS headers are asked for only where the user has none.

Under build isolation pip and uv build in an environment of their own. The torch that matters is the one the user already has: this
module finds it, so nothing is downloaded, and setup.py compiles against its headers. torch is never imported.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (everything that is not overridden below)


def _site_packages() -> list[Path]:
    """Where the user's packages may lie, best first."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    found = [os.environ.get("LLADA_KERNELS_SITE_PACKAGES", "")]
    found += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]  # under pip's isolation: still the user's
    for entry in os.environ.get("PATH", "").split(os.pathsep):  # uv leaves the activated environment on PATH
        if entry and (Path(entry).parent / "pyvenv.cfg").exists():
            found.append(str(Path(entry).parent / "lib" / version / "site-packages"))
    return [Path(p) for p in found if p]


def find_package(name: str) -> Path | None:
    """The folder of an installed package, in the user's environment first; it is not imported."""
    for site in _site_packages():
        if (site / name / "__init__.py").exists():
            return site / name
    spec = find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def wants_cuda() -> bool:
    """Whether CUDA kernels are to be built, by LLADA_KERNELS_CUDA = auto (default) | on | off.

    auto: only when nvcc is found and the installed torch is a CUDA build. SystemExit where ``on`` cannot be obeyed.
    """
    mode = os.environ.get("LLADA_KERNELS_CUDA", "auto")
    if mode not in ("auto", "on", "off"):
        raise SystemExit(f"LLADA_KERNELS_CUDA: expected auto, on or off, got {mode!r}")
    cuda_home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc") or (cuda_home and shutil.which("nvcc", path=str(Path(cuda_home) / "bin")))
    if mode == "on":
        if not nvcc:
            raise SystemExit("LLADA_KERNELS_CUDA=on: nvcc was not found on PATH or under CUDA_HOME; install it or set it to off")
        raise SystemExit("LLADA_KERNELS_CUDA=on: this version has no CUDA kernels yet; set it to auto or off")
    return False


def _requires() -> list[str]:
    wants_cuda()
    needed = [] if find_package("torch") else ["torch>=2.11"]
    return needed + [tool for tool in ("cmake", "ninja") if not shutil.which(tool)]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _requires()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _requires()
