"""Packing, and samples as a pure function of their number."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_kernels.training.data import Document, PackedDataset, document_blocks, pack


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 70), max_size=40), st.integers(1, 32))
def test_pack_keeps_every_token_once_within_the_budget(lengths, row_tokens):
    rows = pack(lengths, row_tokens)
    seen = Counter()
    for row in rows:
        assert 0 < sum(end - begin for _, begin, end in row) <= row_tokens
        for document, begin, end in row:
            seen.update((document, i) for i in range(begin, end))
    assert seen == Counter((d, i) for d, n in enumerate(lengths) for i in range(n))


def test_best_fit_wastes_little():
    lengths = [1 + (37 * i) % 100 for i in range(500)]
    rows = pack(lengths, 128)
    assert sum(lengths) / (128 * len(rows)) > 0.97


def documents():
    return [list(range(100 * d, 100 * d + 3 + 5 * d % 17)) for d in range(30)]


def test_epochs_shuffle_all_rows_and_are_reproducible():
    data, again = PackedDataset(documents(), 20, seed=3), PackedDataset(documents(), 20, seed=3)
    n = data.num_rows
    first = [tuple(torch.cat([t for t, _ in data.row(s)]).tolist()) for s in range(2 * n)]
    assert sorted(first[:n]) == sorted(first[n:]) and first[:n] != first[n:]
    for sample in (2 * n - 1, 0, n, 5):  # in any order, from another object
        assert tuple(torch.cat([t for t, _ in again.row(sample)]).tolist()) == first[sample]
    other = PackedDataset(documents(), 20, seed=4)
    assert [tuple(torch.cat([t for t, _ in other.row(s)]).tolist()) for s in range(n)] != first[:n]


def test_batch_layout():
    data = PackedDataset([[1, 2, 3], Document.from_prompt_and_answer([4, 5], [6])], 3, shuffle=False)
    batch = data.batch(0, 2)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6] and batch.cu_seqlens.tolist() == [0, 3, 6]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.supervised.tolist() == [True] * 3 + [False, False, True]
    assert batch.samples.tolist() == [0] * 3 + [1] * 3 and batch.indices.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.longest_document == 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.one_of(st.integers(1, 9), st.just("full")))
def test_document_blocks_against_a_loop(lengths, block_size):
    expected, block = [], 0
    for n in lengths:
        size = max(n, 1) if block_size == "full" else block_size
        expected += [block + i // size for i in range(n)]
        block += -(-n // size)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    assert document_blocks(cu_seqlens, block_size).tolist() == expected


def test_bad_data():
    with pytest.raises(ValueError, match="at least one token"):
        PackedDataset([[], []], 8)
    with pytest.raises(ValueError, match="supervised: expected 2 flags for document 0"):
        PackedDataset([Document([1, 2], [True])], 8)
    with pytest.raises(ValueError, match="row_tokens"):
        PackedDataset([[1]], 0)
    with pytest.raises(TypeError, match="row_tokens: expected an int, got 2.0"):
        PackedDataset([[1]], 2.0)
    with pytest.raises(ValueError, match="block_size"):
        document_blocks(torch.tensor([0, 4]), 0)


@pytest.mark.parametrize(
    ("document", "error", "got"),
    [
        (torch.zeros(1, 5, dtype=torch.int64), ValueError, r"shape \(1, 5\)"), ([[1, 2]], ValueError, r"shape \(1, 2\)"),
        (3, ValueError, r"shape \(\)"), (torch.tensor([1.0, 2.9]), TypeError, "torch.float32"), ([0.5], TypeError, "torch.float32"),
        ([True, False], TypeError, "torch.bool"), ("text", TypeError, "str"), (b"text", TypeError, "bytes"),
        (None, TypeError, "NoneType"), ({1, 2}, TypeError, "set"), ([2**70], TypeError, "list"),
    ],
)  # fmt: skip
def test_a_document_is_a_sequence_of_integers(document, error, got):
    for item in (document, Document(document)):
        with pytest.raises(error, match=f"^documents: expected 1-D integer token ids for document 1, got {got}"):
            PackedDataset([[1, 2], item], 8)


def test_documents_and_flags_of_the_wrong_type():
    for documents_, got in (("text", "str"), (None, "NoneType"), (Document([1]), "Document")):
        with pytest.raises(TypeError, match=f"documents: expected a sequence of documents, got {got}"):
            PackedDataset(documents_, 8)
    with pytest.raises(TypeError, match="supervised: expected 1-D integer flags for document 0, got torch.float32"):
        PackedDataset([Document([1], [0.5])], 8)
    data = PackedDataset([range(3), np.arange(2, dtype=np.int32), Document(torch.tensor([7], dtype=torch.uint8), [1]), []], 8)
    assert data.batch(0, 1).tokens.tolist() == [0, 1, 2, 0, 1, 7]
