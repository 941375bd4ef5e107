"""Generation on the bench model with the KV cache against the official loop and against our model without a cache.

The model is random, its logits spread so far that a forward is sure of some two tokens. In fp32 all ways must give the same tokens. In
bf16 near ties fall differently with every order of summation (the router of a random model flips at the smallest rounding) and the rest of
the text follows from them. There each token is compared with what the official model chooses from the very inputs of which it was made,
and most must be equal; the shares are in the JSON file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llada_kernels import Model
from llada_kernels.generation import generate, plain

from .checks import equal
from .harness import Case, Settings, Variant
from .official import OfficialModel, official_generate
from .runner import main
from .shapes import bench_model

#: Standard deviation of the logits. At 20 a forward accepts 2 to 3 tokens by the threshold; at 4 it accepts none
#: and every forward fills one position.
LOGIT_SPREAD = 20.0
#: Least share of bf16 tokens that are the official choice from equal inputs.
LEAST_EQUAL = 0.8
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


class Witness:
    """The model, which beside every forward runs the official one on the same tokens, and keeps what that would choose.

    A position is filled by the last forward that sees a mask there, so at the end ``choices`` has, for every new token, the official
    choice from the very inputs of which it was made.
    """

    def __init__(self, model: Model, official: OfficialModel) -> None:
        self.model, self.official = model, official
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        self.prefix = torch.empty(0, dtype=torch.int64)
        self.choices: dict[int, int] = {}

    @torch.no_grad()
    def forward(self, input_ids: Tensor, *, mask: Any, cache: Any, logits_to_keep: Tensor) -> Any:
        out = self.model.forward(input_ids, mask=mask, cache=cache, logits_to_keep=logits_to_keep)
        context = 0 if cache is None else cache.context_lens[0]
        self.prefix = torch.cat([self.prefix[:context], input_ids])
        mask_id, end = self.config.mask_token_id, len(self.prefix)
        masked = [p for p in range(end - BLOCK, end) if self.prefix[p] == mask_id]
        if masked:
            number = torch.arange(end) // BLOCK
            causal = torch.zeros(end, end, dtype=self.dtype).masked_fill_(number[:, None] < number, float("-inf"))[None, None]
            logits = self.official(self.prefix[None], causal, torch.arange(end))[0, masked]
            logits[:, mask_id] = float("-inf")
            self.choices.update(zip(masked, logits.argmax(-1).tolist(), strict=True))
        return out

    def share(self, out: Tensor, start: int) -> float:
        """Share of the new tokens that are the official choice."""
        return sum(self.choices.get(start + i) == token for i, token in enumerate(out.tolist())) / len(out)


def generation(name: str, prompt_length: int, length: int, dtype: torch.dtype, settings: Settings) -> Case:
    model = spread_model(dtype, settings.quick)
    official = OfficialModel(model).eval()
    mask_id = model.config.mask_token_id
    assert mask_id is not None
    prompt = torch.randint(0, mask_id - 1, (prompt_length,), generator=torch.Generator().manual_seed(1))
    forwards: dict[str, int] = {}
    tokens: dict[str, Tensor] = {}
    shares: dict[str, float] = {}

    options: dict[str, Any] = {"gen_length": length, "block_length": BLOCK, "steps": STEPS, "threshold": THRESHOLD, "mask_id": mask_id}

    def cached(used: Any = model) -> tuple[str, Tensor]:
        out = generate(used, prompt, eos_id=-1, **options)
        assert isinstance(out.num_forwards, int)
        tokens["native"], forwards["native"] = out[0], out.num_forwards
        return "native", out[0]

    def uncached(used: Any = model) -> tuple[str, Tensor]:
        tokens["uncached"], forwards["uncached"] = plain.llada20(used, prompt, eos_id=-1, **options)
        return "uncached", tokens["uncached"]

    def by_official() -> tuple[str, Tensor]:
        before = official.calls
        tokens["official"] = official_generate(official, prompt, **options)
        forwards["official"] = official.calls - before
        return "official", tokens["official"]

    def check(result: tuple[str, Tensor]) -> str | None:
        way, out = result
        bad = (out < 0) | (out >= model.config.vocab_size) | (out == mask_id)
        if len(out) != length or bad.any():
            return f"{int(bad.sum())} positions without a token"
        if "official" not in tokens:
            return "the official loop gave nothing to compare with"
        if dtype == torch.float32 or way == "official":
            return equal([tokens["official"]])(out)
        witness = Witness(model, official)
        if not torch.equal({"native": cached, "uncached": uncached}[way](witness)[1], out):
            return "a second run gives other tokens"
        shares[way] = witness.share(out, prompt_length)
        return None if shares[way] >= LEAST_EQUAL else f"{shares[way]:.3f} of the tokens are the official choice, expected {LEAST_EQUAL}"

    def facts(way: str) -> dict[str, float]:
        known = {"forwards": forwards[way], "tokens_per_forward": round(length / forwards[way], 2)}
        if dtype == torch.float32 or way == "official":  # the check has compared all tokens
            return known
        equal_tokens = float((tokens[way] == tokens["official"]).float().mean())
        return {**known, "share_of_equal_tokens": round(equal_tokens, 4), "share_of_equal_choices_from_equal_inputs": round(shares[way], 4)}

    variants = [  # the official loop comes first: it is what the others are compared with
        Variant("official loop", by_official, extra=partial(facts, "official")),
        Variant("our model without a cache", uncached, extra=partial(facts, "uncached")),
        Variant("native", cached, "ours", extra=partial(facts, "native")),
    ]
    if dtype == torch.float32 and not settings.quick:
        del variants[1]
    shapes = {"prompt": prompt_length, "new_tokens": length, "block": BLOCK, "steps": STEPS, "threshold": THRESHOLD, "rows": 1}
    return Case("generate", name, dtype, {**shapes, "model": "small" if settings.quick else "bench model"}, variants, check, tokens=length)


if __name__ == "__main__":
    sys.exit(main("generate", cases))
