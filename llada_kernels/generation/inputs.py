"""Checking what a user hands to ``generate``: prompts, token ids, seeds."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._families import EOS_TOKEN_ID, MASK_TOKEN_ID
from .._model_inputs import warn_of_padding
from .rules import EosIds

__all__ = ["Prompts", "plain_number", "positive", "prompt_list", "seed_list", "special_ids"]

Prompts = Tensor | Sequence[Tensor] | Sequence[Sequence[int]] | Sequence[int]


def prompt_list(
    inputs: Prompts, attention_mask: Tensor | None, vocab_size: int, mask_id: int, pad_token_id: int | None = None
) -> list[Tensor]:
    """One int64 [n] tensor per prompt, on the CPU, checked. Warns of rows that look padded without a mask that says so.

    Raises:
        TypeError: inputs are neither tensors nor lists of integers.
        ValueError: an empty batch or prompt, an id outside the vocabulary, a mask token in a prompt, a padding mask that
            does not fit or has holes.
    """
    inputs, attention_mask = _as_tensor("inputs", inputs), _as_tensor("attention_mask", attention_mask)
    prompts = _split(inputs, vocab_size)
    if attention_mask is not None:
        prompts = _unpad(inputs, prompts, attention_mask)
    elif isinstance(inputs, Tensor):
        warn_of_padding("inputs", inputs, pad_token_id)
    if not prompts:
        raise ValueError("inputs: expected at least one prompt, got an empty batch")
    checked = []
    for i, prompt in enumerate(prompts):
        where = f"inputs[{i}]" if len(prompts) > 1 else "inputs"
        if prompt.ndim != 1:
            raise ValueError(f"{where}: expected a 1-D prompt, got shape {tuple(prompt.shape)}")
        if not len(prompt):
            raise ValueError(f"{where}: expected at least one token, got an empty prompt")
        if prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
            raise TypeError(f"{where}: expected integer token ids, got {prompt.dtype}")
        prompt = prompt.to("cpu", torch.int64)
        outside = ((prompt < 0) | (prompt >= vocab_size)).nonzero()
        if len(outside):
            at = int(outside[0])
            raise ValueError(f"{where}: expected token ids in [0, {vocab_size}), got {int(prompt[at])} at position {at}")
        masks = (prompt == mask_id).nonzero()
        if len(masks):
            raise ValueError(f"{where}: expected a prompt without the mask token {mask_id}, got one at position {int(masks[0])}")
        checked.append(prompt)
    return checked


def _split(inputs: Any, vocab_size: int) -> list[Tensor]:
    if isinstance(inputs, Tensor):
        if inputs.ndim not in (1, 2):
            raise ValueError(f"inputs: expected shape [S] or [B, S], got {tuple(inputs.shape)}")
        return [inputs] if inputs.ndim == 1 else list(inputs)
    if not isinstance(inputs, Sequence) or isinstance(inputs, str | bytes):
        raise TypeError(f"inputs: expected a tensor or a list of prompts, got {type(inputs).__name__}")
    if inputs and not any(isinstance(x, Sequence) or getattr(x, "ndim", 0) for x in inputs) and not isinstance(inputs[0], Tensor):
        return [_ids("inputs", inputs, vocab_size)]
    prompts = []
    for i, given in enumerate(inputs):
        prompt = _as_tensor(f"inputs[{i}]", given)
        if isinstance(prompt, Tensor):
            prompts.append(prompt)
        elif isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes):
            prompts.append(_ids(f"inputs[{i}]" if len(inputs) > 1 else "inputs", prompt, vocab_size))
        else:
            raise TypeError(f"inputs[{i}]: expected a tensor or a list of integers, got {type(prompt).__name__}")
    return prompts


def _as_tensor(name: str, value: Any) -> Any:
    """A tensor of an array of NumPy (copied); anything else as it is."""
    if isinstance(value, Tensor) or not hasattr(value, "__array__") or not getattr(value, "ndim", 0):
        return value
    try:
        return torch.tensor(value)
    except TypeError:
        raise TypeError(f"{name}: expected integers, got an array of {value.dtype}") from None


def _ids(where: str, ids: Sequence[int], vocab_size: int) -> Tensor:
    """int64 [n]; what no tensor of integers can hold is refused here, other ids with those of tensors."""
    for at, value in enumerate(ids):
        if type(value) is not int:
            _integer(f"{where}[{at}]", value, "an integer token id")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{where}: expected token ids in [0, {vocab_size}), got {value} at position {at}")
    return torch.tensor(ids, dtype=torch.int64)


def _unpad(inputs: Any, prompts: list[Tensor], attention_mask: Tensor) -> list[Tensor]:
    if not isinstance(inputs, Tensor):
        raise ValueError("attention_mask: expected None for a list of prompts, which needs no padding, got a mask")
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask: expected a tensor, got {type(attention_mask).__name__}")
    if attention_mask.shape != inputs.shape:
        raise ValueError(f"attention_mask: expected shape {tuple(inputs.shape)} (that of inputs), got {tuple(attention_mask.shape)}")
    real = attention_mask.reshape(len(prompts), inputs.shape[-1]).to("cpu") != 0
    kept = []
    for i, (prompt, row) in enumerate(zip(prompts, real, strict=True)):
        at = row.nonzero().flatten()
        if not len(row):  # an empty prompt, which is refused as such
            kept.append(prompt)
            continue
        if not len(at):
            raise ValueError(f"attention_mask[{i}]: expected at least one real token, got none")
        if int(at[-1]) - int(at[0]) + 1 != len(at):
            raise ValueError(f"attention_mask[{i}]: expected the real tokens in one run (padding on the left or right), got holes")
        kept.append(prompt[int(at[0]) : int(at[-1]) + 1])
    return kept


def special_ids(model: Any, mask_id: int | None, eos_id: int | Sequence[int] | None) -> tuple[int, EosIds]:
    """Ids of mask and EOS: the argument, else generation_config, else config, else those of the released models.

    Of several EOS ids in the argument all count; where a configuration lists several the first one does, as in the official code.

    Raises:
        TypeError: an id that is not an integer.
        ValueError: the mask id is outside the vocabulary or an EOS id, or there is no EOS id in a list.
    """
    vocab = model.config.vocab_size

    def find(name: str, default: int) -> int:
        for source in (getattr(model, "generation_config", None), model.config):
            value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
            if isinstance(value, list | tuple):
                value = value[0] if value else None
            if value is not None:
                return _integer(f"{name} of the model's configuration", value, "an int")
        return default

    mask = find("mask_token_id", MASK_TOKEN_ID) if mask_id is None else _integer("mask_id", mask_id, "an int or None")
    ends = [find("eos_token_id", EOS_TOKEN_ID)] if eos_id is None else _integers("eos_id", eos_id, "an int, several or None")
    if not 0 <= mask < vocab:
        raise ValueError(f"mask_id: expected an id in [0, {vocab}), got {mask}")
    if not ends:
        raise ValueError("eos_id: expected at least one id (-1 for none), got none")
    if mask in ends:
        raise ValueError(f"eos_id: expected other ids than mask_id, got {mask} for both")
    return mask, ends[0] if len(ends) == 1 else tuple(ends)


def seed_list(seed: int | Sequence[int] | None, rows: int, needed: bool) -> list[int]:
    """One seed per row; without one, one is drawn from torch's generator if the rule needs it.

    Raises:
        TypeError: a seed that is not an integer.
        ValueError: a seed outside [0, 2**63), or not one per row.
    """
    expected = "an int, one per prompt or None"
    if seed is None:
        seed = int(torch.randint(0, 2**63 - 1, (1,))) if needed else 0
    seeds = _integers("seed", seed, expected)
    if not _is_list(seed):
        seeds *= rows
    if len(seeds) != rows:
        raise ValueError(f"seed: expected one number or one per prompt ({rows}), got {len(seeds)}")
    for s in seeds:
        if not 0 <= s < 2**63:
            raise ValueError(f"seed: expected numbers in [0, 2**63), got {s}")
    return seeds


def plain_number(value: Any) -> Any:
    """The Python number of one of NumPy, or of a tensor that has no dimensions; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def positive(name: str, value: Any, default: int) -> int:
    """An int of at least 1, or what stands for one; the default for None."""
    if value is None:
        return default
    number = _integer(name, value, "an int")
    if number < 1:
        raise ValueError(f"{name}: expected at least 1, got {number}")
    return number


def _is_list(value: Any) -> bool:
    return bool(value.ndim == 1) if hasattr(value, "ndim") else isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _integers(name: str, value: Any, expected: str) -> list[int]:
    """The ints of one or of a list, a tuple, a 1-D tensor or array."""
    return [_integer(name, v, expected) for v in value] if _is_list(value) else [_integer(name, value, expected)]


def _integer(name: str, value: Any, expected: str) -> int:
    """An int from an int or what stands for one, such as a 0-d integer tensor or an integer of NumPy."""
    try:
        if isinstance(value, bool) or getattr(value, "ndim", 0) != 0:
            raise TypeError
        return operator.index(value)
    except TypeError:
        got = type(value).__name__ if isinstance(value, Tensor) else f"{type(value).__name__} {value!r:.80}"
        raise TypeError(f"{name}: expected {expected}, got {got}") from None
