"""Peak memory and speed of loading a sharded checkpoint, on a synthetic one.

    python bench/bench_load.py [--gigabytes 4] [--shard-size 1GB] [--layout merged] [--folder DIR] [--json result.json]

Writing and loading happen in processes of their own. The peak is the kernel's VmHWM of the loading process: everything,
Python, PyTorch and mapped files included. It must stay within model + largest shard + 200 MB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from llada_kernels import Config, Model
from llada_kernels.info import collect

ALLOWANCE = 200 * 10**6


def bench_config(size: float) -> Config:
    """The geometry of LLaDA2.0-mini with as many layers as make about ``size`` bytes in bf16."""
    config = Config(
        vocab_size=157184, hidden_size=2048, num_hidden_layers=1, num_attention_heads=16, num_key_value_heads=4, head_dim=128,
        rotary_dim=64, rope_theta=600000.0, intermediate_size=5120, moe_intermediate_size=512, num_experts=32, n_group=8,
        topk_group=4, num_experts_per_tok=8, moe_layers=(False,), shared_expert_intermediate_size=512, routed_scaling_factor=2.5,
    )  # fmt: skip
    per_layer = 2 * (3 * 512 * 2048 * 33 + config.qkv_size * 2048 + 2048 * 2048)
    layers = max(1, round((size - 2 * 2 * 157184 * 2048) / per_layer))
    values = config.as_fields() | {"num_hidden_layers": layers, "moe_layers": (False,) + (True,) * (layers - 1)}
    return Config(**values)


def peak_bytes() -> int:
    """The most memory that this process ever had resident."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def write(folder: str, size: float, shard_size: str, layout: str) -> None:
    torch.manual_seed(0)
    Model(bench_config(size), dtype=torch.bfloat16).save_pretrained(folder, layout=layout, max_shard_size=shard_size)


def load(folder: str) -> dict[str, Any]:
    before = peak_bytes()
    begin = time.perf_counter()
    model = Model.from_pretrained(folder)
    seconds = time.perf_counter() - begin
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    shards = [f.stat().st_size for f in Path(folder).glob("*.safetensors")]
    peak = peak_bytes()
    return {
        "model_bytes": weights, "shards": len(shards), "largest_shard_bytes": max(shards), "before_bytes": before, "peak_bytes": peak,
        "limit_bytes": weights + max(shards) + ALLOWANCE, "seconds": seconds, "gigabytes_per_second": weights / seconds / 1e9,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--shard-size", default="1GB")
    parser.add_argument("--layout", default="per_expert", choices=["per_expert", "merged"])
    parser.add_argument("--folder", help="where to write the checkpoint; default: a temporary folder")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", choices=["write", "load"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step == "write":
        write(args.folder, args.gigabytes * 1e9, args.shard_size, args.layout)
        return 0
    if args.step == "load":
        print(json.dumps(load(args.folder)))
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        again = [sys.executable, __file__, "--folder", folder, "--gigabytes", str(args.gigabytes)]
        again += ["--shard-size", args.shard_size, "--layout", args.layout]
        subprocess.run([*again, "--step", "write"], check=True)
        output = subprocess.run([*again, "--step", "load"], check=True, capture_output=True, text=True).stdout
    result = json.loads(output.splitlines()[-1])
    for key, value in result.items():
        print(f"{key:<22} {value / 1e6:12.1f} MB" if key.endswith("bytes") else f"{key:<22} {value:12.2f}")
    if args.json:
        args.json.write_text(json.dumps({"bench": "load", "layout": args.layout, "results": [result], "environment": collect()}, indent=2))
    if result["peak_bytes"] > result["limit_bytes"]:
        print("FAILED: the peak is above model + largest shard + 200 MB")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
