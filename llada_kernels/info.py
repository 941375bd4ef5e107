"""``python -m llada_kernels.info [--json]``: versions, CPU level, and which backends serve or why not."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import platform
import re
import sys
from importlib import metadata
from typing import Any

import torch

from . import _library, ops
from .ops import _triton
from .ops.dispatch import Backend

__all__ = ["collect"]


def collect() -> dict[str, Any]:
    """Everything that a bug report or a result file should say about this installation, as plain JSON types."""
    return {
        "llada_kernels": _version("llada-kernels"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_level": _cpu_level(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "backends": {
            "native": _library.load_error or "loaded",
            "native on a GPU": _cuda_kernels(),
            "triton": _triton.missing or "installed",
            "reference": "loaded",
        },
        "tile_planner": _tile_planner(),
        "ops": {name: [b.name for b in backends] for name, backends in all_ops().items()},
    }


def all_ops() -> dict[str, tuple[Backend, ...]]:
    """Each op's backends in order of preference: the modules of llada_kernels.ops that have a list of backends."""
    found: dict[str, tuple[Backend, ...]] = {}
    for module in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
        backends = getattr(importlib.import_module(module.name), "BACKENDS", None)
        if backends is not None:
            found[module.name.rpartition(".")[2]] = backends
    return found


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return cpu_name(file.read()) or platform.processor() or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def cpu_name(cpuinfo: str) -> str | None:
    """Name, family and model of the first processor: a virtual machine may call Zen 4 and Zen 5 alike "AMD EPYC". None without a name."""
    first = dict(re.findall(r"^([^:\n]+?)\s*: (.+)$", cpuinfo.partition("\n\n")[0], re.MULTILINE))
    keys = {"model name": "", "cpu family": " family ", "model": " model "}
    return "".join(word + first[key] for key, word in keys.items() if key in first) if "model name" in first else None


def _cpu_level() -> str:
    if _library.load_error is not None:
        return "unknown: the compiled library is not loaded"
    try:
        return str(torch.ops.llada_kernels.cpu_level())
    except ValueError as error:
        return f"error: {error}"


def _cuda_kernels() -> str:
    if _library.load_error is not None:
        return "unknown: the compiled library is not loaded"
    architectures = str(torch.ops.llada_kernels.cuda_architectures())
    if not architectures:
        return "CUDA kernels not built (LLADA_KERNELS_CUDA=on builds them)"
    return f"CUDA kernels for {architectures}: {', '.join(sorted(_library.cuda_operators))}"


def _tile_planner() -> str:
    try:
        importlib.import_module("llada_kernels._host")
    except ImportError as error:
        return f"Python ({error})"
    return "compiled"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llada_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    facts = collect()
    if parser.parse_args(argv).json:
        print(json.dumps(facts, indent=1))
        return 0
    for key, value in facts.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, entry in value.items():
                print(f"  {name:<24} {', '.join(entry) if isinstance(entry, list) else entry}")
        else:
            print(f"{key:<26} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
