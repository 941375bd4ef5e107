"""What a result file says about where its numbers come from."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from llada_kernels.info import collect

from .ceilings import last_level_cache

__all__ = ["ROOT", "environment", "machine_name"]

ROOT = Path(__file__).resolve().parent.parent


def environment(threads: int, quick: bool) -> dict[str, Any]:
    """Commit, time, machine and versions, as plain JSON types."""
    facts = collect()
    return {
        **_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "quick": quick,
        "threads": threads,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "last_level_cache_mib": last_level_cache() >> 20,
        # Above the number of cores other programs had a part of the machine: times of such a run say little.
        "load_at_start": round(os.getloadavg()[0], 2),
        **{k: facts[k] for k in ("cpu", "cpu_level", "gpu", "cuda", "llada_kernels", "torch", "triton", "python", "platform", "backends")},
    }


def machine_name(facts: dict[str, Any]) -> str:
    """A file name for the results of a machine: CPU (or GPU), level and threads."""
    words = f"{facts.get('gpu') or facts['cpu']} {facts['cpu_level']} {facts['threads']} threads"
    return re.sub(r"[^a-z0-9_]+", "-", words.lower()).strip("-")


def _commit() -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    sources = ("llada_kernels", "csrc", "bench/*.py", "CMakeLists.txt", "setup.py")  # not the results themselves
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *sources)
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}
