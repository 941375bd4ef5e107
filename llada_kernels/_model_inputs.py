"""What users may pass to ``Model.forward``, brought to one form: packed tokens, their positions, one mask."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import Config
from .masks import DiffusionMask

__all__ = ["ModelInputs", "check_token_ids", "prepare", "warn_of_padding"]

INTEGERS = (torch.int64, torch.int32)


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """Packed inputs of a forward.

    Attributes:
        tokens: int64 [T] token ids, or their embeddings [T, H].
        rows: (B, S) when the input had rows, None when it came packed.
        mask: a DiffusionMask over the T tokens, or bool [B, S, S] for a visibility that is none (reference backend only).
        position_ids: int64 [T].
    """

    tokens: Tensor
    rows: tuple[int, int] | None
    mask: DiffusionMask | Tensor
    position_ids: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading dimensions of outputs: [B, S] or [T], as the input was."""
        return self.rows or (self.tokens.shape[0],)

    def continues(self) -> Tensor:
        """bool [T - 1]: whether token i + 1 follows token i in the same document (for a shift of labels)."""
        if isinstance(self.mask, DiffusionMask):
            position = self.mask.position_ids
        else:
            position = torch.arange(self.shape[-1], device=self.tokens.device).repeat(self.mask.shape[0])
        return position[1:] == position[:-1] + 1


def prepare(
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None = None,
    mask: DiffusionMask | Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Any = None,
) -> ModelInputs:
    """Check the arguments of a forward and pack them; they are described at :meth:`llada_kernels.Model.forward`.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: arguments that contradict each other, wrong shapes, dtypes or devices, token ids outside the vocabulary.
        RuntimeError: called under torch.autocast.
    """
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        raise RuntimeError(
            f"torch.autocast: expected to be off for {device.type}, got it switched on: it would round in other places than the model "
            "does (and the router too). Use model.to(torch.bfloat16) instead; Trainer keeps fp32 masters of the weights"
        )
    if cache is not None and not hasattr(cache, "page_table"):
        raise TypeError(f"cache: expected a KVCache or None, got {type(cache).__name__}")
    tokens, rows = _tokens(config, device, dtype, input_ids, inputs_embeds)
    total = tokens.shape[0]
    batch, length = rows or (1, total)
    if attention_mask is not None:
        if mask is not None or cache is not None:
            raise ValueError(f"attention_mask: expected None together with {'mask' if mask is not None else 'cache'}, got both")
        visible: DiffusionMask | Tensor = _from_attention_mask(attention_mask, batch, length, config.causal).to(device)
        default = torch.arange(length, device=device).repeat(batch)
    elif mask is None and cache is not None:
        made: DiffusionMask = cache.mask([length] * batch)
        visible, default = made, made.position_ids
    else:
        if mask is None and input_ids is not None and input_ids.is_cpu and not torch.compiler.is_compiling():  # a GPU would be waited for
            warn_of_padding("input_ids", input_ids, config.pad_token_id)
        visible = plain_mask(batch, length, config.causal, device) if mask is None else _checked_mask(mask, total, batch, length, device)
        default = visible.position_ids if isinstance(visible, DiffusionMask) else torch.arange(length, device=device).repeat(batch)
    cached = isinstance(visible, DiffusionMask) and visible.kind == "cached"
    if cached != (cache is not None):
        have = "a cache" if cache is not None else "no cache"
        raise ValueError(f"mask: expected {'one' if cache is not None else 'none'} of kind 'cached' with {have}, got the other")
    positions = default if position_ids is None else _positions(position_ids, rows, total, device)
    return ModelInputs(tokens, rows, visible, positions)


def check_token_ids(name: str, ids: Tensor, vocab_size: int, ignored: int | None = None) -> None:
    """Raise ValueError if an id lies outside the vocabulary; ``ignored`` is let through.

    On a GPU the check is a device-side assertion, so that nothing waits for it.
    """
    if torch.compiler.is_compiling() or ids.numel() == 0 or ids.is_meta:
        return
    wrong = (ids < 0) | (ids >= vocab_size)
    if ignored is not None:
        wrong &= ids != ignored
    if ids.device.type != "cpu":
        torch._assert_async(~wrong.any(), f"{name}: a token id outside 0 to {vocab_size - 1}")
    elif bool(wrong.any()):
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise ValueError(f"{name}: expected token ids of 0 to {vocab_size - 1}, got {int(ids[at])} at {list(at)}")


def warn_of_padding(name: str, ids: Tensor, pad_token_id: int | None) -> None:
    """Warn of rows [B, S] that look padded; to be asked where there is no attention mask. Looks at both ends only, as transformers does."""
    if pad_token_id is None or ids.ndim != 2 or not ids.numel() or not bool((ids[:, [0, -1]] == pad_token_id).any()):
        return
    warnings.warn(
        f"{name}: a row begins or ends with pad_token_id {pad_token_id} and there is no attention_mask, so that padding counts as text: "
        "pass attention_mask (1 = token, 0 = padding), or to generate a list of prompts; ignore this if nothing is padded",
        stacklevel=4,
    )


@torch.compiler.disable  # masks are planned on the host, with numpy: a graph with fullgraph=True takes one that exists
@functools.lru_cache(maxsize=16)
def plain_mask(batch: int, length: int, causal: bool, device: torch.device) -> DiffusionMask:
    """The default visibility: within each row, in both directions or causal. Kept, because its tile plan is built on the host."""
    cu_seqlens = torch.arange(batch + 1) * length
    return (DiffusionMask.causal(cu_seqlens) if causal else DiffusionMask.bidirectional(cu_seqlens)).to(device)


def _tokens(
    config: Config, device: torch.device, dtype: torch.dtype, input_ids: Tensor | None, inputs_embeds: Tensor | None
) -> tuple[Tensor, tuple[int, int] | None]:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(f"input_ids: expected either input_ids or inputs_embeds, got {'both' if input_ids is not None else 'neither'}")
    name, x = ("input_ids", input_ids) if input_ids is not None else ("inputs_embeds", inputs_embeds)
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.device != device:
        raise ValueError(f"{name}: expected device {device} (that of the model), got {x.device}")
    if input_ids is not None:
        if x.dtype not in INTEGERS:
            raise ValueError(f"input_ids: expected dtype int64 or int32, got {x.dtype}")
        if x.ndim not in (1, 2):
            raise ValueError(f"input_ids: expected shape [B, S] or [T], got {tuple(x.shape)}")
        check_token_ids("input_ids", x, config.vocab_size)
        flat = x.reshape(-1).long()
    else:
        if x.dtype != dtype:
            raise ValueError(f"inputs_embeds: expected dtype {dtype} (that of the model), got {x.dtype}")
        if x.ndim not in (2, 3) or x.shape[-1] != config.hidden_size:
            h = config.hidden_size
            raise ValueError(f"inputs_embeds: expected shape [B, S, {h}] or [T, {h}], got {tuple(x.shape)}")
        flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] == 0:
        raise ValueError(f"{name}: expected at least one token, got shape {tuple(x.shape)}")
    return flat, (x.shape[0], x.shape[1]) if x.ndim == (2 if input_ids is not None else 3) else None


def _checked_mask(mask: DiffusionMask | Tensor, total: int, batch: int, length: int, device: torch.device) -> DiffusionMask | Tensor:
    if isinstance(mask, DiffusionMask):
        if mask.num_queries != total:
            raise ValueError(f"mask: expected one of {total} tokens (those of the input), got {mask.num_queries}")
        return mask.to(device)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a DiffusionMask, got {type(mask).__name__}")
    if mask.dtype != torch.bool or mask.shape not in ((batch, length, length), (total, total)):
        raise ValueError(f"mask: expected a DiffusionMask or bool [{batch}, {length}, {length}], got {mask.dtype} {tuple(mask.shape)}")
    dense = mask.to(device)
    if dense.ndim == 2:
        dense = dense[None]
    return _intervals_or_dense(dense)


def _intervals_or_dense(dense: Tensor) -> DiffusionMask | Tensor:
    """The interval form of a dense visibility where it has one; else it stays dense, which only the reference backend serves."""
    found = DiffusionMask.from_dense(dense)
    return dense if found is None else found


def _from_attention_mask(mask: Tensor, batch: int, length: int, causal: bool) -> DiffusionMask | Tensor:
    """The masks of transformers: 2-D padding, or 4-D visibility as bool or additive 0 / -inf."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask: expected a torch.Tensor, got {type(mask).__name__}")
    if mask.ndim == 2:
        if mask.shape != (batch, length):
            raise ValueError(f"attention_mask: expected shape {(batch, length)} (that of the input), got {tuple(mask.shape)}")
        real = mask.cpu() != 0
        if mask.dtype != torch.bool and bool((mask.cpu() != real).any()):
            raise ValueError("attention_mask: expected 2-D values 1 (token) or 0 (padding), got others")
        return _from_padding(real, causal)
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[0] not in (1, batch) or mask.shape[2:] != (length, length):
        expected = f"[{batch}, {length}] or [{batch} or 1, 1, {length}, {length}]"
        raise ValueError(f"attention_mask: expected shape {expected}, got {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        visible = mask[:, 0]
    elif mask.is_floating_point():
        visible = mask[:, 0] == 0
        # transformers writes the most negative number of the dtype where -inf is meant.
        if not bool((visible | (mask[:, 0] <= torch.finfo(mask.dtype).min)).all()):
            raise ValueError(
                "attention_mask: expected 4-D values 0 (visible) or -inf (hidden), which are added to the scores, got others "
                "(a mask of 1 and 0 would be added too and hide nothing: pass it as bool)"
            )
    else:
        raise ValueError(f"attention_mask: expected a 4-D mask of bool or a floating dtype (additive 0 / -inf), got {mask.dtype}")
    if batch == 1 or visible.shape[0] == batch:
        return _intervals_or_dense(visible)
    one = _intervals_or_dense(visible)
    return visible.expand(batch, -1, -1) if isinstance(one, Tensor) else _intervals_or_dense(visible.expand(batch, -1, -1))


def _from_padding(real: Tensor, causal: bool) -> DiffusionMask | Tensor:
    """Real tokens see the real tokens of their row, and padding sees padding, so that no row is empty."""
    batch, length = real.shape
    changes = real[:, 1:] != real[:, :-1]
    runs = changes.sum(1) + 1
    # One run of real tokens with padding on either side, or none: then every run is a document of its own.
    if bool(((runs <= 2) | ((runs == 3) & ~real[:, 0])).all()):
        starts = torch.cat([torch.ones(batch, 1, dtype=torch.bool), changes], 1).flatten().nonzero().flatten()
        cu_seqlens = torch.cat([starts, torch.tensor([batch * length])])
        return DiffusionMask.causal(cu_seqlens) if causal else DiffusionMask.bidirectional(cu_seqlens)
    dense = real[:, :, None] == real[:, None, :]
    return _intervals_or_dense(dense.tril() if causal else dense)


def _positions(position_ids: Tensor, rows: tuple[int, int] | None, total: int, device: torch.device) -> Tensor:
    if not isinstance(position_ids, Tensor):
        raise TypeError(f"position_ids: expected a torch.Tensor, got {type(position_ids).__name__}")
    if position_ids.dtype not in INTEGERS:
        raise ValueError(f"position_ids: expected dtype int64 or int32, got {position_ids.dtype}")
    if position_ids.device != device:
        raise ValueError(f"position_ids: expected device {device} (that of the model), got {position_ids.device}")
    batch, length = rows or (1, total)
    if position_ids.shape in ((batch, length), (total,)):
        return position_ids.reshape(-1).long()
    if position_ids.shape in ((1, length), (length,)):
        return position_ids.reshape(-1).long().repeat(batch)
    raise ValueError(f"position_ids: expected shape [{batch}, {length}] or [1, {length}], got {tuple(position_ids.shape)}")
