"""Loading a sharded checkpoint of 4 GB in the mini geometry from the page cache; memory peaks below model + largest shard + 200 MB.

The limit holds for the whole process, Python and PyTorch included; of a quick run's tiny model, for what loading adds to them.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llada_kernels import Config, Model

from .environment import ROOT
from .harness import Case, Settings, Variant
from .runner import main
from .shapes import bench_config, mini_config, pool_model

ALLOWANCE = 200 * 10**6
LAYOUTS = ("per_expert", "merged")


def cases(settings: Settings) -> Iterator[Case]:
    shard = "2MB" if settings.quick else "500MB"
    for layout in LAYOUTS:
        if settings.wants(name := f"layout {layout}", torch.bfloat16):
            with tempfile.TemporaryDirectory() as folder:
                yield loading(name, folder, layout, shard, settings.quick)


def config_of(size: float) -> Config:
    """The geometry of LLaDA2.0-mini with 32 experts and as many layers as make ``size`` bytes in bf16."""
    one, two = (sum(p.numel() for p in Model(mini_config(n, 32), device="meta").parameters()) for n in (1, 2))
    return mini_config(1 + max(0, math.ceil((size / 2 - one) / (two - one))), 32)


def loading(name: str, folder: str, layout: str, shard: str, quick: bool) -> Case:
    config = bench_config(small=True) if quick else config_of(4e9)
    model = pool_model(config)
    model.save_pretrained(folder, layout=layout, max_shard_size=shard)
    stored = {k: v.clone() for k, v in list(model.state_dict().items())[:: max(1, len(model.state_dict()) // 8)]}
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    del model
    shards = sorted(Path(folder).glob("*.safetensors"))
    largest = max(f.stat().st_size for f in shards)
    peaks: list[int] = []

    def read_shards() -> int:
        """The least that a loader can do: a copy of every tensor (load_file alone maps the file and reads nothing)."""
        return sum(len([tensor.clone() for tensor in load_file(path).values()]) for path in shards)

    def check(result: Any) -> str | None:
        if isinstance(result, int):
            return None if result else "no tensors"
        loaded = result.state_dict()
        if wrong := [k for k, v in stored.items() if not torch.equal(loaded[k], v)]:
            return f"{wrong[0]} differs from what was stored"
        before, after = peak(folder)
        peaks.append(after - before if quick else after)
        limit = weights + largest + ALLOWANCE
        return f"peak memory {peaks[-1]} bytes, allowed {limit}" if peaks[-1] > limit else None

    limits: Callable[[], dict[str, int]] = lambda: {"peak_bytes": peaks[-1], "limit_bytes": weights + largest + ALLOWANCE}  # noqa: E731
    shapes = {"model_bytes": weights, "shards": len(shards), "largest_shard_bytes": largest, "layers": config.num_hidden_layers}
    variants = [
        Variant("from_pretrained", lambda: Model.from_pretrained(folder), "ours", extra=limits),
        Variant("copy of every tensor", read_shards),
    ]
    return Case("load", name, torch.bfloat16, shapes, variants, check, None, float(weights))


def peak(folder: str) -> tuple[int, int]:
    """Most memory of a process before and after it loads the model (VmHWM, Linux)."""
    code = (
        "import json, re, sys\n"
        "from llada_kernels import Model\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "before = peak()\n"
        "model = Model.from_pretrained(sys.argv[1])\n"
        "print(json.dumps([before, peak()]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = json.loads(result.stdout)
    return before, after


if __name__ == "__main__":
    sys.exit(main("load", cases))
