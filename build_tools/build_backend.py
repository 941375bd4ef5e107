"""PEP 517 backend: setuptools, but torch is asked for only where the user has none.

Under build isolation pip and uv build in an environment of their own. The torch that matters is the one the user already has: this
module finds it, so nothing is downloaded, and setup.py compiles against its headers. torch is never imported.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (everything that is not overridden below)

OLDEST_NVCC = (12, 8)


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


def find_nvcc() -> str | None:
    """nvcc on PATH, else under CUDA_HOME."""
    cuda_home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(cuda_home) / "bin")) if cuda_home else None)


def _torch_is_a_cuda_build() -> bool:
    torch = find_package("torch")
    version = torch / "version.py" if torch else None
    return bool(version and version.exists() and re.search(r"^cuda\b[^=]*= *['\"]", version.read_text(), re.MULTILINE))


def wants_cuda() -> bool:
    """Whether CUDA kernels are to be built, by LLADA_KERNELS_CUDA = auto (default) | on | off.

    auto: only when a recent nvcc is found and the installed torch is a CUDA build. on: with any torch; SystemExit where that cannot be.
    """
    mode = os.environ.get("LLADA_KERNELS_CUDA", "auto")
    if mode not in ("auto", "on", "off"):
        raise SystemExit(f"LLADA_KERNELS_CUDA: expected auto, on or off, got {mode!r}")
    if mode == "off" or (mode == "auto" and not _torch_is_a_cuda_build()):
        return False
    nvcc = find_nvcc()
    if nvcc is None:
        reason = "nvcc was not found on PATH or under CUDA_HOME"
    else:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        release = re.search(r"release (\d+)\.(\d+)", text)
        if release and (int(release[1]), int(release[2])) >= OLDEST_NVCC:
            return True
        reason = f"expected nvcc {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or newer, got {release[0] if release else repr(text)} ({nvcc})"
    if mode == "on":
        raise SystemExit(f"LLADA_KERNELS_CUDA=on: {reason}; install it or set LLADA_KERNELS_CUDA=off")
    print(f"llada-kernels: no CUDA kernels: {reason}", flush=True)
    return False


def compile_jobs(cuda: bool) -> int:
    """Jobs of a build: MAX_JOBS, else one per core, with CUDA at most 2 per 4 GiB of memory (nvcc takes 1 to 2 GiB a file)."""
    if "MAX_JOBS" in os.environ:
        return int(os.environ["MAX_JOBS"])
    jobs = os.cpu_count() or 1
    if cuda:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        with contextlib.suppress(OSError, ValueError):  # the limit of a container; "max": none
            memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
        jobs = min(jobs, max(1, memory // (2 << 30)))
    return jobs


def _requires() -> list[str]:
    wants_cuda()
    needed = [] if find_package("torch") else ["torch>=2.11"]
    return needed + [tool for tool in ("cmake", "ninja") if not shutil.which(tool)]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _requires()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _requires()
