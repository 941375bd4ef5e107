"""A two-layer attention model that implements the protocol of generation with dense matrices, and draws of random cases."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llada_kernels import generation
from llada_kernels.generation import plain
from llada_kernels.masks import DiffusionMask


class ToyModel:
    """Embedding + layers of multi-query attention, random weights; reads the pages of a cache by hand."""

    def __init__(self, vocab: int = 48, layers: int = 2, seed: int = 0, sharpness: float = 6.0, family: str = "llada2"):
        g = torch.Generator().manual_seed(seed)
        self.heads, self.width, self.hidden = 2, 8, 24
        self.config = SimpleNamespace(
            vocab_size=vocab,
            num_hidden_layers=layers,
            num_key_value_heads=1,
            head_dim=self.width,
            family=family,
            mask_token_id=vocab - 1,
            eos_token_id=vocab - 2,
            causal=False,
        )
        self.device, self.dtype = torch.device("cpu"), torch.float32
        rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        self.embedding, self.position = rand(vocab, self.hidden), rand(512, self.hidden)
        self.qkv = [rand(self.hidden, (self.heads + 2) * self.width) * 0.3 for _ in range(layers)]
        self.out = [rand(self.heads * self.width, self.hidden) * 0.5 for _ in range(layers)]
        self.head = rand(self.hidden, vocab) * sharpness / self.hidden**0.5
        self.packed_tokens: list[int] = []
        self.logit_rows: list[int] = []
        self.edit_logits: Any = lambda logits: logits

    def forward(self, input_ids: Tensor, *, mask: Any = None, cache: Any = None, logits_to_keep: Any = None) -> Any:
        assert isinstance(mask, DiffusionMask) and input_ids.ndim == 1
        self.packed_tokens.append(len(input_ids))
        h = self.embedding[input_ids] + self.position[mask.position_ids]
        for layer, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            x = torch.nn.functional.layer_norm(h, h.shape[-1:])
            heads = (x @ qkv).view(len(x), self.heads + 2, self.width)
            q, k, v = heads[:, : self.heads], heads[:, self.heads], heads[:, self.heads + 1]
            if cache is None:
                o = self._attend(q, k, v, mask.dense())
            else:
                o = self._attend_cached(q, k, v, cache, layer, mask)
                cache.record(layer, k[:, None], v[:, None])
            h = h + o.flatten(1) @ out
        h = torch.nn.functional.layer_norm(h, h.shape[-1:])[logits_to_keep]
        self.logit_rows.append(len(h))
        return SimpleNamespace(logits=self.edit_logits(h @ self.head))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        scores = torch.einsum("qhd,kd->hqk", q, k) / self.width**0.5
        return torch.einsum("hqk,kd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)

    def _attend_cached(self, q: Tensor, k: Tensor, v: Tensor, cache: Any, layer: int, mask: DiffusionMask) -> Tensor:
        begin, size, pieces = 0, cache.block_size, []
        for row, new in enumerate(mask.query_lens.tolist()):
            here, context = slice(begin, begin + new), int(mask.context_lens[row])
            pages = cache.page_table[row, : context // size].long()
            old_k, old_v = (x[layer][pages].flatten(0, 1)[:, 0] for x in (cache.keys, cache.values))
            block = torch.arange(new) // size
            visible = torch.cat([torch.ones(new, context, dtype=torch.bool), block[:, None] >= block], 1)
            pieces.append(self._attend(q[here], torch.cat([old_k, k[here]]), torch.cat([old_v, v[here]]), visible))
            begin += new
        return torch.cat(pieces)


def random_case(draw: random.Random, family: str | None = None) -> dict[str, Any]:
    """Prompts and arguments of one random generation (mask id vocab - 1), for any rule."""
    vocab = draw.choice([16, 48])
    rule = family or draw.choice(["llada2.0", "llada2.1", "low_confidence"])
    block = draw.choice([1, 3, 4, 8, 13])
    prompts = [
        [draw.randrange(vocab - 1) for _ in range(draw.choice([1, 2, block, block + 1, 2 * block, draw.randint(1, 30)]))]
        for _ in range(draw.randint(1, 4))
    ]
    temperature = draw.choice([0.0, 0.0, 0.5, 1.0])
    args: dict[str, Any] = {"decoding": rule, "block_length": block, "temperature": temperature}
    if rule == "low_confidence":
        blocks = draw.randint(1, 3)
        args |= {"gen_length": block * blocks, "steps": blocks * draw.randint(1, block + 1)}
        args |= {"cfg_scale": draw.choice([0.0, 0.0, 1.5]), "remasking": draw.choice(["low_confidence", "random"])}
    else:
        args |= {"gen_length": draw.randint(1, 3 * block + 5), "threshold": draw.choice([0.0, 0.2, 0.5, 0.9, 1.0])}
        args |= {"eos_early_stop": draw.random() < 0.5}
        if temperature:
            args |= {"top_k": draw.choice([None, 3, 10]), "top_p": draw.choice([None, 0.9, 0.5])}
    if rule == "llada2.0":
        args |= {"steps": draw.randint(1, block + 3), "minimal_topk": draw.randint(1, args["gen_length"])}
    if rule == "llada2.1":
        args |= {"editing_threshold": draw.choice([None, 0.0, 0.3, 0.8]), "max_post_steps": draw.randint(0, 4)}
        args |= {"num_to_transfer": draw.randint(1, block)}
    eos_id = vocab - 2 if draw.random() < 0.7 else -1
    return {
        "vocab": vocab,
        "prompts": prompts,
        "args": args,
        "eos_id": eos_id,
        "seed": draw.randrange(2**40),
        "model_seed": draw.randrange(2**20),
        "max_batch": draw.choice([None, 1, 2]),
    }


PLAIN = {"llada2.0": plain.llada20, "llada2.1": plain.llada21, "low_confidence": plain.llada_moe}


def plain_rows(model: Any, case: dict[str, Any]) -> list[tuple[list[int], int]]:
    """What the plain loop gives for each prompt alone: tokens and forwards."""
    args = dict(case["args"])
    loop, ids = PLAIN[args.pop("decoding")], {"mask_id": case["vocab"] - 1, "eos_id": case["eos_id"]}
    sampling = plain.Sampling(args.pop("temperature"), args.pop("top_k", None), args.pop("top_p", None), case["seed"])
    rows = (loop(model, torch.tensor(p), sampling=sampling, **ids, **args) for p in case["prompts"])
    return [(tokens.tolist(), forwards) for tokens, forwards in rows]


def with_likely_eos(model: Any, case: dict[str, Any]) -> dict[str, Any]:
    """The case with an EOS id that the first prompt's output contains, unless the case is to go on for ever."""
    if case["eos_id"] < 0:
        return case
    first = plain_rows(model, {**case, "eos_id": -1, "prompts": case["prompts"][:1]})[0][0]
    return {**case, "eos_id": random.Random(case["seed"]).choice(first)}


def assert_rows_equal_plain(model: Any, case: dict[str, Any]) -> bool:
    """Tokens and forwards of every row against the plain loop; whether a row ended with an EOS and needed fewer forwards.

    Fewer forwards than the official loop: where that goes on after the first EOS, or looks for it only when it writes one.
    """
    case, fewer = with_likely_eos(model, case), False
    args = case["args"]
    may_be_fewer = args["decoding"] != "llada2.0" or args["eos_early_stop"]
    for (want, official), (got, forwards) in zip(plain_rows(model, case), engine_rows(model, case), strict=True):
        assert got == want, case
        assert forwards == official or (case["eos_id"] in want and may_be_fewer and forwards < official), case
        fewer = fewer or forwards < official
    return fewer


def engine_rows(model: Any, case: dict[str, Any]) -> list[tuple[list[int], int]]:
    """What ``generate`` gives for the batch."""
    out = generation.generate(
        model,
        case["prompts"],
        mask_id=case["vocab"] - 1,
        eos_id=case["eos_id"],
        seed=case["seed"],
        max_batch=case["max_batch"],
        **case["args"],
    )
    forwards = [out.num_forwards] if isinstance(out.num_forwards, int) else out.num_forwards
    return [(tokens.tolist(), n) for tokens, n in zip(out, forwards, strict=True)]
