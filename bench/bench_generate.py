"""Generation on the bench model with the KV cache against the official loop and against our model without a cache.

The model is random, its logits spread like those of a trained one. In fp32 all ways must give the same tokens. In bf16 near ties fall
differently with every order of summation (the router of a random model flips at the smallest rounding) and the rest of the text follows
from them, so only valid tokens are asked for; the shares of equal tokens, and of equal choices from equal inputs, are in the JSON file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llada_kernels import DiffusionMask, Model
from llada_kernels.generation import generate, plain

from .checks import equal
from .harness import Case, Settings, Variant
from .official import OfficialModel, official_generate
from .runner import main
from .shapes import bench_model

#: standard deviation of the logits; the most probable of 32000 tokens then has about the share 0.2
LOGIT_SPREAD = 4.0
BLOCK, STEPS, THRESHOLD = 32, 32, 0.95


def cases(settings: Settings) -> Iterator[Case]:
    prompt, length = (40, 32) if settings.quick else (256, 256)
    for dtype in (torch.float32, torch.bfloat16):
        if settings.wants(name := f"{length} new tokens, prompt {prompt}", dtype):
            yield generation(name, prompt, length, dtype, settings)


def spread_model(dtype: torch.dtype, small: bool) -> Model:
    """The bench model, with logits far enough apart that a step is sure of some tokens."""
    model = bench_model(torch.float32, small)
    with torch.no_grad():
        model.lm_head_weight.normal_(std=LOGIT_SPREAD / model.config.hidden_size**0.5)
    return model.to(dtype).eval()


class Compared:
    """The model, which beside every cached forward runs the plain one on the same tokens and counts equal choices."""

    def __init__(self, model: Model) -> None:
        self.model, self.config, self.device, self.dtype = model, model.config, model.device, model.dtype
        self.prefix = torch.empty(0, dtype=torch.int64)
        self.equal = self.total = 0

    def forward(self, input_ids: Tensor, *, mask: Any, cache: Any, logits_to_keep: Tensor) -> Any:
        context = cache.context_lens[0]
        self.prefix = torch.cat([self.prefix[:context], input_ids])
        out = self.model.forward(input_ids, mask=mask, cache=cache, logits_to_keep=logits_to_keep)
        whole = DiffusionMask.block_causal([0, len(self.prefix)], cache.block_size)
        plain_out = self.model.forward(self.prefix, mask=whole, logits_to_keep=logits_to_keep + context)
        a, b = (x.logits[:, : self.config.mask_token_id].argmax(-1) for x in (out, plain_out))
        self.equal, self.total = self.equal + int((a == b).sum()), self.total + len(a)
        return out


def generation(name: str, prompt_length: int, length: int, dtype: torch.dtype, settings: Settings) -> Case:
    model = spread_model(dtype, settings.quick)
    official = OfficialModel(model).eval()
    mask_id = model.config.mask_token_id
    assert mask_id is not None
    prompt = torch.randint(0, mask_id - 1, (prompt_length,), generator=torch.Generator().manual_seed(1))
    forwards: dict[str, int] = {}
    tokens: dict[str, Tensor] = {}

    options: dict[str, Any] = {"gen_length": length, "block_length": BLOCK, "steps": STEPS, "threshold": THRESHOLD, "mask_id": mask_id}

    def cached() -> Tensor:
        out = generate(model, prompt, eos_id=-1, **options)
        assert isinstance(out.num_forwards, int)
        tokens["native"], forwards["native"] = out[0], out.num_forwards
        return out[0]

    def uncached() -> Tensor:
        tokens["uncached"] = plain.llada20(model, prompt, eos_id=-1, **options)[0]
        return tokens["uncached"]

    def by_official() -> Tensor:
        out = official_generate(official, prompt, **options)
        if not expected:  # it comes first, and is what the others are compared with: it takes a minute
            expected.append(out)
        return out

    expected: list[Tensor] = []

    def check(out: Tensor) -> str | None:
        bad = (out < 0) | (out >= model.config.vocab_size) | (out == mask_id)
        if len(out) != length or bad.any():
            return f"{int(bad.sum())} positions without a token"
        if not expected:
            return "the official loop gave nothing to compare with"
        return equal(expected)(out) if dtype == torch.float32 else None

    def facts() -> dict[str, float]:
        known = {"forwards": forwards["native"], "tokens_per_forward": round(length / forwards["native"], 2)}
        if dtype == torch.float32:  # the check has compared all tokens
            return known
        compared = Compared(model)
        generate(compared, prompt, eos_id=-1, **options)
        return {
            **known,
            "share_of_equal_tokens": round(float((tokens["native"] == tokens["uncached"]).float().mean()), 4),
            "share_of_equal_choices_from_equal_inputs": round(compared.equal / compared.total, 4),
        }

    variants = [
        Variant("official loop", by_official),
        *([Variant("our model without a cache", uncached)] if dtype == torch.bfloat16 or settings.quick else []),
        Variant("native", cached, "ours", extra=facts),
    ]
    shapes = {"prompt": prompt_length, "new_tokens": length, "block": BLOCK, "steps": STEPS, "threshold": THRESHOLD, "rows": 1}
    return Case("generate", name, dtype, {**shapes, "model": "small" if settings.quick else "bench model"}, variants, check, tokens=length)


if __name__ == "__main__":
    sys.exit(main("generate", cases))
