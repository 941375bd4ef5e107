"""What generation returns, and a recorder of the order in which tokens were unmasked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

__all__ = ["GenerationOutput", "OnStep", "StepRecorder"]

OnStep = Callable[[int, int, Tensor], None]
"""Called after every step of every row: (row, block_start, tokens of the block int64 [L] on the CPU)."""


@dataclass(frozen=True, eq=False)
class GenerationOutput(Sequence[Tensor]):
    """The new tokens of every prompt: a sequence of tensors, so ``tokenizer.decode(out[0])`` works.

    Attributes:
        sequences: int64 [new tokens] per prompt, on the model's device: without the prompt, through the first EOS.
        num_forwards: forwards that each row needed, counted as if it were alone: an int for one prompt, a list for several.
    """

    sequences: tuple[Tensor, ...]
    num_forwards: int | list[int]

    def __len__(self) -> int:
        return len(self.sequences)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Tensor, ...]: ...
    def __getitem__(self, index: int | slice) -> Tensor | tuple[Tensor, ...]:
        return self.sequences[index]

    @property
    def tokens_per_forward(self) -> float:
        """New tokens of all rows over forwards of all rows."""
        forwards = [self.num_forwards] if isinstance(self.num_forwards, int) else self.num_forwards
        return sum(len(tokens) for tokens in self.sequences) / max(sum(forwards), 1)


class StepRecorder:
    """An ``on_step`` callback that remembers when each position was unmasked and how often it was edited afterwards.

    Args:
        mask_id: id of the mask token.
        then: another callback to call with the same arguments.
    """

    def __init__(self, mask_id: int, then: OnStep | None = None) -> None:
        self.mask_id = mask_id
        self.then = then
        self._forwards: dict[int, int] = {}
        self._last: dict[tuple[int, int], Tensor] = {}
        self._unmasked_at: dict[int, dict[int, int]] = {}
        self._edits: dict[int, dict[int, int]] = {}

    def __call__(self, row: int, block_start: int, tokens: Tensor) -> None:
        forward = self._forwards.get(row, 0)
        self._forwards[row] = forward + 1
        unmasked, edits = self._unmasked_at.setdefault(row, {}), self._edits.setdefault(row, {})
        before = self._last.get((row, block_start), torch.full_like(tokens, self.mask_id))
        for i in (before != tokens).nonzero().flatten().tolist():
            position = block_start + i
            if int(before[i]) == self.mask_id:
                unmasked[position] = forward
            else:
                edits[position] = edits.get(position, 0) + 1
        self._last[row, block_start] = tokens.clone()
        if self.then is not None:
            self.then(row, block_start, tokens)

    def num_forwards(self, row: int = 0) -> int:
        """Steps seen of this row."""
        return self._forwards.get(row, 0)

    def order(self, row: int, start: int, end: int) -> list[int]:
        """For each position in [start, end) the forward (from 0) that unmasked it, -1 where none did.

        A block that begins inside the prompt counts its prompt tokens as unmasked by the block's first forward: ask only
        from the prompt's length on.
        """
        seen = self._unmasked_at.get(row, {})
        return [seen.get(position, -1) for position in range(start, end)]

    def edits(self, row: int, start: int, end: int) -> list[int]:
        """For each position in [start, end) how often it was changed after it had been unmasked."""
        seen = self._edits.get(row, {})
        return [seen.get(position, 0) for position in range(start, end)]
