"""Packed documents, indexed by global sample number: a run's position in its data is one integer."""

from __future__ import annotations

import bisect
import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..masks import block_ids
from ._checks import check_int
from .noise import uniform

__all__ = ["Batch", "Document", "PackedDataset", "collate", "document_blocks", "pack"]

_ORDER = 255  # purpose of the numbers that order an epoch's rows; noise uses small ones


@dataclass(frozen=True)
class Document:
    """Token ids of one document and, for fine-tuning, which of them are supervised (None: all).

    Attributes:
        tokens: [n], integers.
        supervised: [n], bool, or None. Positions that are not supervised (prompts) are never masked and carry no loss.
    """

    tokens: Sequence[int] | Tensor
    supervised: Sequence[bool] | Tensor | None = None

    @classmethod
    def from_prompt_and_answer(cls, prompt: Sequence[int], answer: Sequence[int]) -> Document:
        """A document whose answer alone is supervised."""
        return cls([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents, flattened: L tokens.

    Attributes:
        tokens: [L], int64.
        cu_seqlens: [documents + 1], int32; where documents begin, and L.
        supervised: [L], bool.
        samples: [L], int64; global index of the row that a token is part of.
        indices: [L], int64; the token's index within its row.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    supervised: Tensor
    samples: Tensor
    indices: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; ``cu_seqlens`` stays on the CPU, where masks are planned."""
        moved = (t.to(device) for t in (self.supervised, self.samples, self.indices))
        return Batch(self.tokens.to(device), self.cu_seqlens, *moved)


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[tuple[int, int, int]]]:
    """Best-fit packing: pieces (document, begin, end) of every row, no row above ``row_tokens`` tokens.

    Documents longer than a row are cut into pieces of a row's length; then the longest piece goes first, each into the
    fullest row that still has room. Empty documents are left out. Ties go to the lower document and the older row.

    Raises:
        ValueError: ``row_tokens`` is below 1.
    """
    check_int("row_tokens", row_tokens, 1)
    pieces = [
        (document, begin, min(begin + row_tokens, length))
        for document, length in enumerate(lengths)
        for begin in range(0, length, row_tokens)
    ]
    pieces.sort(key=lambda p: (p[1] - p[2], p[0], p[1]))
    rows: list[list[tuple[int, int, int]]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for piece in pieces:
        size = piece[2] - piece[1]
        at = bisect.bisect_left(room, (size, -1))
        if at == len(room):
            rows.append([])
            free, row = row_tokens, len(rows) - 1
        else:
            free, row = room.pop(at)
        rows[row].append(piece)
        bisect.insort(room, (free - size, row))
    return rows


class PackedDataset:
    """Documents packed into rows, with an endless sequence of samples: sample g is a row, a pure function of g and seed.

    Each epoch goes through all rows in an order of its own.

    Args:
        documents: documents, or bare sequences of token ids.
        row_tokens: token budget of a row.
        seed: of the order of rows.
        shuffle: False: rows in their packed order.

    Raises:
        TypeError: a document that holds anything but integers; it is named by its index.
        ValueError: one that is not 1-D, no tokens at all, ``row_tokens`` below 1, or supervised flags of another length than the
            tokens.
    """

    def __init__(
        self,
        documents: Sequence[Document | Sequence[int] | Tensor],
        row_tokens: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self._tokens: list[Tensor] = []
        self._supervised: list[Tensor | None] = []
        check_int("row_tokens", row_tokens, 1)
        check_int("seed", seed)
        if not isinstance(documents, Iterable) or isinstance(documents, str | bytes):
            raise TypeError(f"documents: expected a sequence of documents, got {type(documents).__name__}")
        for number, item in enumerate(documents):
            document = item if isinstance(item, Document) else Document(item)
            tokens = _integers("documents", "token ids", document.tokens, number).to(torch.int64)
            flags = None
            if document.supervised is not None:
                flags = _integers("supervised", "flags", document.supervised, number).to(torch.bool)
                if flags.shape != tokens.shape:
                    raise ValueError(f"supervised: expected {len(tokens)} flags for document {number}, got {len(flags)}")
            self._tokens.append(tokens)
            self._supervised.append(flags)
        self.rows = pack([len(t) for t in self._tokens], row_tokens)
        if not self.rows:
            raise ValueError("documents: expected at least one token, got none")
        self.row_tokens, self.seed, self.shuffle = row_tokens, seed, shuffle
        self._order: tuple[int, list[int]] | None = None

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        """Tokens of one epoch."""
        return sum(len(t) for t in self._tokens)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all tokens and supervised flags in order: two data sets with the same digest hold the same."""
        digest = hashlib.sha256()
        for tokens, flags in zip(self._tokens, self._supervised, strict=True):
            digest.update(len(tokens).to_bytes(8, "little") + (b"all" if flags is None else b"some"))
            digest.update(tokens.numpy().tobytes())
            digest.update(b"" if flags is None else flags.numpy().tobytes())
        return digest.hexdigest()

    def check_tokens(self, vocab_size: int, mask_token_id: int | None) -> None:
        """Raise ValueError, naming the document, if a token is outside the vocabulary or is the mask token."""
        for number, tokens in enumerate(self._tokens):
            wrong = tokens[(tokens < 0) | (tokens >= vocab_size)]
            if len(wrong):
                raise ValueError(f"dataset: expected token ids of 0 to {vocab_size - 1}, got {int(wrong[0])} in document {number}")
            if mask_token_id is not None and bool((tokens == mask_token_id).any()):
                raise ValueError(f"dataset: expected text without the mask token {mask_token_id}, got one in document {number}")

    @property
    def longest_document(self) -> int:
        """Length of the longest piece of a document in a row."""
        return max(end - begin for row in self.rows for _, begin, end in row)

    def row(self, sample: int) -> list[tuple[Tensor, Tensor]]:
        """(tokens, supervised) of each document of sample ``sample``."""
        epoch, place = divmod(sample, self.num_rows)
        if self.shuffle:
            if self._order is None or self._order[0] != epoch:
                rows = torch.arange(self.num_rows)
                keys = uniform(self.seed, epoch, torch.zeros_like(rows), rows, _ORDER)
                self._order = (epoch, torch.argsort(keys, stable=True).tolist())
            place = self._order[1][place]
        parts = []
        for document, begin, end in self.rows[place]:
            tokens, flags = self._tokens[document][begin:end], self._supervised[document]
            parts.append((tokens, torch.ones(end - begin, dtype=torch.bool) if flags is None else flags[begin:end]))
        return parts

    def batch(self, first_sample: int, rows: int) -> Batch:
        """Samples ``first_sample`` to ``first_sample + rows - 1`` as one pack."""
        return collate([(s, self.row(s)) for s in range(first_sample, first_sample + rows)])


def _integers(name: str, what: str, values: Any, number: int) -> Tensor:
    """The 1-D tensor of a document's ids or flags, on the CPU."""
    expected = f"{name}: expected 1-D integer {what} for document {number}"
    try:
        tensor = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{expected}, got {type(values).__name__}") from None
    if tensor.ndim != 1:
        raise ValueError(f"{expected}, got shape {tuple(tensor.shape)}")
    flags = tensor.dtype == torch.bool and name == "supervised"
    if tensor.numel() and not flags and (tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(f"{expected}, got {tensor.dtype}")
    return tensor


def collate(rows: Sequence[tuple[int, Sequence[tuple[Tensor, Tensor]]]]) -> Batch:
    """Join rows, each (global sample index, [(tokens, supervised) of each document]), into one pack."""
    tokens, supervised, samples, indices, lengths = [], [], [], [], [0]
    for sample, documents in rows:
        size = sum(len(t) for t, _ in documents)
        samples.append(torch.full((size,), sample, dtype=torch.int64))
        indices.append(torch.arange(size))
        for document, flags in documents:
            tokens.append(document)
            supervised.append(flags)
            lengths.append(len(document))
    cu_seqlens = torch.tensor(lengths, dtype=torch.int64).cumsum(0).to(torch.int32)
    return Batch(torch.cat(tokens), cu_seqlens, torch.cat(supervised), torch.cat(samples), torch.cat(indices))


def document_blocks(cu_seqlens: Tensor, block_size: int | str) -> Tensor:
    """Block number of each token of a pack, [L] int64: blocks start with their document; "full" is one block each.

    Raises:
        ValueError: a block size below 1.
    """
    longest = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
    return block_ids(cu_seqlens, max(longest, 1) if block_size == "full" else int(block_size))
