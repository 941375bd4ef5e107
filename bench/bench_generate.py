"""Generation with the KV cache against the plain loop that recomputes the prefix, and the share of equal tokens in bf16.

    python bench/bench_generate.py [--dtype float32 --dtype bfloat16] [--gen-length 256] [--json result.json]

The model is random, of the LLaDA2 architecture, its logits spread like those of a trained one. In fp32 both ways must give
the same tokens, or nothing is reported. In bf16 the router of a random model flips at the smallest rounding and one other token
changes all that follow, so beside the share of equal tokens the share of equal choices from equal inputs is stated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from llada_kernels import Config, DiffusionMask, Model
from llada_kernels.generation import generate, plain
from llada_kernels.info import collect

#: standard deviation of the logits; the most probable of 32000 tokens then has about the share 0.2
LOGIT_SPREAD = 4.0


def bench_model(dtype: torch.dtype, seed: int = 0) -> Model:
    """Hidden 512, 8 layers (the first dense), 64 experts of width 256, 4 per token, 8 query and 2 KV heads of 64, 32000 tokens."""
    config = Config(
        vocab_size=32000, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        rotary_dim=32, rope_theta=600000.0, intermediate_size=2048, moe_intermediate_size=256, num_experts=64,
        num_experts_per_tok=4, moe_layers=(False, *[True] * 7), shared_expert_intermediate_size=256, n_group=8, topk_group=4,
        routed_scaling_factor=2.5, mask_token_id=31999, eos_token_id=31998,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Model(config)
    with torch.no_grad():
        model.lm_head_weight.normal_(std=LOGIT_SPREAD / config.hidden_size**0.5)
    return model.to(dtype).eval()


class Compared:
    """The model, which beside every cached forward runs the plain one on the same tokens and counts equal choices."""

    def __init__(self, model: Model):
        self.model, self.config, self.device, self.dtype = model, model.config, model.device, model.dtype
        self.prefix = torch.empty(0, dtype=torch.int64)
        self.equal = self.total = 0

    def forward(self, input_ids: torch.Tensor, *, mask: Any, cache: Any, logits_to_keep: torch.Tensor) -> Any:
        context = cache.context_lens[0]
        self.prefix = torch.cat([self.prefix[:context], input_ids])
        out = self.model.forward(input_ids, mask=mask, cache=cache, logits_to_keep=logits_to_keep)
        whole = DiffusionMask.block_causal([0, len(self.prefix)], cache.block_size)
        plain_out = self.model.forward(self.prefix, mask=whole, logits_to_keep=logits_to_keep + context)
        a, b = (x.logits[:, : self.config.mask_token_id].argmax(-1) for x in (out, plain_out))
        self.equal, self.total = self.equal + int((a == b).sum()), self.total + len(a)
        return out


def measure(dtype: torch.dtype, args: argparse.Namespace) -> dict[str, Any]:
    """Time and tokens of both ways, each after a short warm-up; fastest of ``args.repeats``."""
    model = bench_model(dtype)
    prompt = torch.randint(0, 31998, (args.prompt,), generator=torch.Generator().manual_seed(1))
    common = {"gen_length": args.gen_length, "block_length": args.block, "steps": args.steps, "threshold": args.threshold}

    def cached() -> tuple[torch.Tensor, int]:
        out = generate(model, prompt, eos_id=-1, **common)  # type: ignore[arg-type]
        assert isinstance(out.num_forwards, int)
        return out[0], out.num_forwards

    def uncached() -> tuple[torch.Tensor, int]:
        return plain.llada20(model, prompt, mask_id=31999, eos_id=-1, **common)

    generate(model, prompt[:40], gen_length=2, eos_id=-1)
    result: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "prompt": args.prompt, **common}
    tokens: dict[str, torch.Tensor] = {}
    for name, way in (("cached", cached), ("plain", uncached)):
        seconds = []
        for _ in range(args.repeats):
            begin = time.perf_counter()
            tokens[name], forwards = way()
            seconds.append(time.perf_counter() - begin)
        result[f"{name}_seconds"], result[f"{name}_forwards"] = min(seconds), forwards
    equal = tokens["cached"] == tokens["plain"]
    result["tokens_per_forward"] = args.gen_length / result["cached_forwards"]
    result["tokens_per_second"] = args.gen_length / result["cached_seconds"]
    result["speedup"] = result["plain_seconds"] / result["cached_seconds"]
    result["share_of_equal_tokens"] = float(equal.float().mean())
    if dtype != torch.float32:
        compared = Compared(model)
        generate(compared, prompt, eos_id=-1, **common)  # type: ignore[arg-type]
        result["share_of_equal_choices_from_equal_inputs"] = compared.equal / compared.total
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"], help="may be given twice; default: both")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--gen-length", type=int, default=256)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threshold", type=float, default=0.95)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    results = []
    for name in args.dtype or ["float32", "bfloat16"]:
        r = measure(getattr(torch, name), args)
        if name == "float32" and r["share_of_equal_tokens"] != 1.0:
            print(f"float32: only {r['share_of_equal_tokens']:.1%} of the tokens equal the plain loop's: not reported", file=sys.stderr)
            return 1
        results.append(r)
        print(
            f"{name}: cached {r['cached_seconds']:.2f} s ({r['tokens_per_second']:.1f} tokens/s, {r['cached_forwards']} forwards), "
            f"plain {r['plain_seconds']:.2f} s, ratio {r['speedup']:.2f}; equal tokens {r['share_of_equal_tokens']:.1%}"
            + (f", equal choices from equal inputs {r[same]:.1%}" if (same := "share_of_equal_choices_from_equal_inputs") in r else "")
        )
    if args.json:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        args.json.write_text(json.dumps({"commit": git.stdout.strip(), "machine": collect(), "generate": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
