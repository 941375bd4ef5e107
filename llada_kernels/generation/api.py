"""``generate``: the official arguments of every family, resolved to a decoding rule and run by the engine."""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import fields
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .engine import Finished, GenerationModel, engine_for
from .inputs import Prompts, plain_number, positive, prompt_list, seed_list, special_ids
from .output import GenerationOutput, OnStep
from .rules import DecodingRule, LLaDA20, LLaDA21, LowConfidence

__all__ = ["DECODING", "UNSET", "Unset", "generate", "resolve_rule"]


class Unset(Enum):
    """The type of "this argument was not given", where None already means something."""

    UNSET = "unset"

    def __repr__(self) -> str:
        return "unset"


UNSET = Unset.UNSET

#: name -> rule class and values that differ from the class's defaults
DECODING: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "llada2.0": (LLaDA20, {}),
    "llada2.1": (LLaDA21, {}),
    "quality": (LLaDA21, {"threshold": 0.7, "editing_threshold": 0.5}),
    "speed": (LLaDA21, {"threshold": 0.5, "editing_threshold": 0.0}),
    "low_confidence": (LowConfidence, {}),
}

#: arguments that a family's official ``generate`` takes without using them, and values that ask for nothing
_WITHOUT_EFFECT: dict[type[Any], dict[str, Any]] = {
    LLaDA20: {"max_post_steps": ..., "num_to_transfer": 1, "editing_threshold": None, "cfg_scale": 0.0},
    LLaDA21: {"steps": ..., "minimal_topk": ..., "eos_early_stop": ..., "cfg_scale": 0.0},
    LowConfidence: {"minimal_topk": 1, "eos_early_stop": ..., "editing_threshold": None},
}


#: what other libraries call an argument -> what it is called here
_ELSEWHERE = {
    "input_ids": "inputs", "prompt": "inputs", "prompts": "inputs", "max_new_tokens": "gen_length",
    "max_length": "gen_length, which counts new tokens only", "max_tokens": "gen_length", "block_size": "block_length",
    "num_inference_steps": "steps", "eos_token_id": "eos_id", "mask_token_id": "mask_id", "do_sample": "temperature, above 0 to draw",
    "batch_size": "max_batch", "streamer": "on_step", "callback": "on_step",
}  # fmt: skip


def generate(
    model: GenerationModel,
    inputs: Prompts,
    *,
    attention_mask: Tensor | None = None,
    gen_length: int | None = None,
    block_length: int | None = None,
    steps: int | None = None,
    threshold: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_early_stop: bool | None = None,
    minimal_topk: int | None = None,
    mask_id: int | None = None,
    eos_id: int | Sequence[int] | None = None,
    editing_threshold: float | None | Unset = UNSET,
    max_post_steps: int | None = None,
    num_to_transfer: int | None = None,
    cfg_scale: float | None = None,
    remasking: str | None = None,
    decoding: str | DecodingRule | None = None,
    seed: int | Sequence[int] | None = None,
    max_batch: int | None = None,
    on_step: OnStep | None = None,
) -> GenerationOutput:
    """Generate from one prompt or a batch of prompts of any lengths; every row comes out as if it were alone.

    ``decoding`` chooses the rule. By default the model's family and the arguments do: LLaDA2 with an ``editing_threshold``
    decodes as LLaDA2.1, without one as LLaDA2.0; LLaDA-MoE by low confidence. An argument that is not given has the official
    default of that rule. Names: "llada2.0", "llada2.1", "quality" and "speed" (LLaDA2.1 with the thresholds 0.7 / 0.5 and
    0.5 / 0.0 that its authors recommend), "low_confidence"; or a rule object, which then holds all of its parameters itself.

    Args:
        model: see :class:`GenerationModel`.
        inputs: integer [B, S] or [S] tensor, or a list of prompts (1-D tensors or lists of ids) of any lengths. Arrays and numbers of
            NumPy serve wherever tensors and numbers do.
        attention_mask: [B, S] or [S], non-zero at real tokens, if ``inputs`` is padded (left or right). Without one a warning tells of
            rows that begin or end with the model's pad_token_id.
        gen_length: new tokens at most, at least 1. Default 2048; LLaDA-MoE 128.
        block_length: tokens per block. Default 32; LLaDA-MoE 128.
        steps: denoising steps per block (LLaDA2.0, default 32) or in all (LLaDA-MoE, default 128); LLaDA2.1 ignores it.
        threshold: confidence above which a token is unmasked (LLaDA2), in [0, 1]. Default 0.95.
        temperature: 0, the default, is greedy; above, tokens are drawn after temperature, top_k and top_p.
        top_k, top_p: filters of the draw; None: none.
        eos_early_stop: LLaDA2.0: leave a block as soon as the text through the first EOS is complete. (A row always ends
            with the block that contains its first EOS: what would follow is cut off.) Default False.
        minimal_topk: LLaDA2.0: limits steps to gen_length // minimal_topk. Default 1.
        mask_id, eos_id: token ids; default: generation_config, else config, else those of the released models. Any of several
            ``eos_id`` ends a row; of several in a configuration the first one alone does, as in the official code. With an
            ``eos_id`` outside the vocabulary (such as -1) rows never end early.
        editing_threshold: LLaDA2.1: confidence above which a token is replaced. None: no editing; 0.0: every changed token.
        max_post_steps: LLaDA2.1: forwards on a block after its last mask is gone. Default 16.
        num_to_transfer: LLaDA2.1: tokens unmasked per step at least. Default 1.
        cfg_scale, remasking: LLaDA-MoE: strength of guidance (0.0) and "low_confidence" or "random".
        decoding: a rule's name or a rule object.
        seed: of the random numbers, which are keyed by (seed, position, forward of the row): one for all rows or one per
            row. None: drawn from torch's generator if sampling.
        max_batch: rows in a forward at most; more prompts wait for a free place. Default: all. Changes no result.
        on_step: called after every step of every row with (row, block_start, tokens int64 [block_length] on the CPU).

    Returns:
        The new tokens of every prompt, through the first EOS, and the number of forwards of every row.

    Precision: the model's; decisions compare fp32 confidences.
    Determinism: a row's tokens depend on its prompt, its seed and the parameters, not on the batch, up to the rounding of
        the model's matrix products.

    Raises:
        ValueError: an argument is out of range, does not belong to the rule, or a prompt is not valid.
        TypeError: an argument of a wrong type.
    """
    if getattr(model.config, "causal", False):
        raise ValueError("model: expected a diffusion model, got a causal one (config.causal is True)")
    given: dict[str, Any] = {
        "threshold": threshold, "steps": steps, "minimal_topk": minimal_topk, "eos_early_stop": eos_early_stop,
        "max_post_steps": max_post_steps, "num_to_transfer": num_to_transfer, "cfg_scale": cfg_scale, "remasking": remasking,
        "temperature": temperature, "top_k": top_k, "top_p": top_p,
    }  # fmt: skip
    arguments = {name: plain_number(value) for name, value in given.items() if value is not None}
    if editing_threshold is not UNSET:
        arguments["editing_threshold"] = plain_number(editing_threshold)
    if not (on_step is None or callable(on_step)):
        raise TypeError(f"on_step: expected a callable or None, got {type(on_step).__name__} {on_step!r:.80}")
    rule = resolve_rule(getattr(model.config, "family", "llada2"), decoding, arguments)
    gen_length = positive("gen_length", gen_length, 128 if rule.whole_window else 2048)
    block_length = positive("block_length", block_length, 128 if rule.whole_window else 32)
    mask, eos = special_ids(model, rule.mask_id if mask_id is None else mask_id, rule.eos_id if eos_id is None else eos_id)
    rule = rule.bind(mask_id=mask, eos_id=eos, gen_length=gen_length, block_length=block_length)

    prompts = prompt_list(inputs, attention_mask, model.config.vocab_size, mask, getattr(model.config, "pad_token_id", None))
    seeds = seed_list(seed, len(prompts), rule.needs_seed)
    slots = min(positive("max_batch", max_batch, len(prompts)), len(prompts))
    longest = max(len(prompt) for prompt in prompts) + gen_length
    engine = engine_for(rule)(model, rule, block_length, slots, longest, on_step)
    waiting = deque(zip(prompts, seeds, strict=True))
    finished: dict[int, Finished] = {}
    while len(finished) < len(prompts):
        while waiting and engine.num_free_slots:
            prompt, row_seed = waiting.popleft()
            engine.add(prompt.to(model.device), gen_length, row_seed)
        finished.update((done.row, done) for done in engine.step())
    rows = [finished[i] for i in range(len(prompts))]
    forwards = [row.num_forwards for row in rows]
    return GenerationOutput(tuple(row.tokens for row in rows), forwards[0] if len(rows) == 1 else forwards)


def _with_hints(function: Callable[..., GenerationOutput]) -> Callable[..., GenerationOutput]:
    """The function, which tells what an argument is called that it does not have but other libraries do."""
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> GenerationOutput:
        for name in kwargs:
            if name not in known and name in _ELSEWHERE:
                raise TypeError(f"{name}: expected an argument of generate, got one that is here called {_ELSEWHERE[name]}")
        return function(*args, **kwargs)

    return call


if not TYPE_CHECKING:  # type checkers take the signature as it is written
    generate = _with_hints(torch.no_grad()(generate))


def resolve_rule(family: str, decoding: str | DecodingRule | None, arguments: dict[str, Any]) -> DecodingRule:
    """The rule that ``decoding``, the model's family and the given arguments ask for.

    Raises:
        ValueError: an unknown name, an argument that the rule does not have, or one that is not that of the rule object.
        TypeError: ``decoding`` is neither a name nor a rule.
    """
    if decoding is None:
        editing = arguments.get("editing_threshold") is not None
        decoding = "low_confidence" if family == "lladamoe" else "llada2.1" if editing else "llada2.0"
    if not isinstance(decoding, str):
        if not hasattr(decoding, "begin_block") or isinstance(decoding, type):
            raise TypeError(f"decoding: expected the name of a rule or a rule object, got {decoding!r}")
        others = [name for name, value in arguments.items() if getattr(decoding, name, UNSET) != value]
        if others:
            raise ValueError(f"decoding: expected the rule object to hold the rule's parameters, got also {', '.join(others)}")
        return decoding
    if decoding not in DECODING:
        raise ValueError(f"decoding: expected one of {', '.join(DECODING)}, or a rule object, got {decoding!r}")
    kind, values = DECODING[decoding]
    names = {field.name for field in fields(kind)}
    for name, value in arguments.items():
        if name not in names:
            harmless = _WITHOUT_EFFECT[kind].get(name, UNSET)
            if harmless is not ... and value != harmless:
                raise ValueError(f"{name}: expected no value, decoding {decoding!r} does not use it, got {value!r}")
    return kind(**{**values, **{name: value for name, value in arguments.items() if name in names}})
