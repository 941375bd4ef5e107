from __future__ import annotations

import pytest
import torch

from llada_kernels.ops.lm_head_unmask import lm_head_unmask
from llada_kernels.ops.threshold_unmask import threshold_unmask

from ...ops.test_lm_head_unmask import integers


@pytest.mark.parametrize("shape", [(1, 1, 8, 2), (1, 3, 7, 1025), (2, 5, 33, 1024), (1, 33, 48, 2100), (2, 33, 80, 1500), (2, 0, 4, 9)])
def test_exact_products_give_the_results_of_threshold_unmask(shape, dtype, device):
    """Few and many positions (each another tile), odd widths, vocabularies at and beyond the end of a part."""
    hidden, lm_head, tokens, mask = integers(shape, dtype)
    hidden = hidden / 16  # uncertain positions; a power of two keeps the products exact
    editable = torch.rand(shape[:2]) < 0.5
    arguments = {"threshold": 0.01, "editing_threshold": [0.01] * shape[0], "min_unmask": 2}
    there = [x.to(device) for x in (hidden, lm_head, tokens)]
    result = lm_head_unmask(*there, mask, **arguments, editable=editable.to(device), backend="triton")
    logits = (hidden.double() @ lm_head.double().T).to(dtype)
    expected = threshold_unmask(logits, tokens, mask, **arguments, editable=editable, backend="reference")
    for name, ours, theirs in zip(expected._fields, result, expected, strict=True):
        assert torch.equal(ours.cpu(), theirs), name


def test_logits_are_rounded_to_the_dtype_of_hidden(dtype, device):
    """2049 and 2048 are one fp16 number, 257 and 256 one bf16 number: the lower id wins. In fp32 they are two."""
    lm_head = torch.zeros(5, 2, device=device)
    large = 256 if dtype == torch.bfloat16 else 2048
    lm_head[1, 0], lm_head[3, 0], lm_head[3, 1] = large, large, 1
    hidden, tokens = torch.ones(1, 1, 2, dtype=dtype, device=device), torch.full((1, 1), 4, device=device)
    result = lm_head_unmask(hidden, lm_head.to(dtype), tokens, 4, 0.0, backend="triton")
    token, confidence = (3, 0.7310586) if dtype == torch.float32 else (1, 0.5)
    assert result.tokens.item() == token
    torch.testing.assert_close(result.confidence.item(), confidence, rtol=1e-6, atol=0)


def test_bad_logits_mark_the_row_and_no_other(dtype, device):
    hidden, lm_head = (torch.ones(*shape, dtype=dtype, device=device) for shape in ((3, 4, 8), (40, 8)))
    hidden[1, 2, 3], hidden[2, 0] = torch.nan, torch.inf
    tokens = torch.full((3, 4), 7, device=device)
    result = lm_head_unmask(hidden, lm_head, tokens, 7, 0.0, backend="triton")
    assert result.counts.tolist() == [[4, 0], [-1, -1], [-1, -1]]
    assert (result.tokens[0] == 0).all() and torch.equal(result.tokens[1:], tokens[1:])
    assert result.confidence.isnan().nonzero().tolist() == [[1, 2], [2, 0]]


def test_draws_are_left_to_another_backend(device):
    hidden, lm_head, tokens, mask = (x.to(device) if isinstance(x, torch.Tensor) else x for x in integers((2, 4, 8, 50), torch.float32))
    with pytest.raises(ValueError, match="triton draws no tokens"):
        lm_head_unmask(hidden, lm_head, tokens, mask, 0.1, temperature=0.7, backend="triton")


def test_strides_do_not_matter(device):
    hidden, lm_head, tokens, mask = (x.to(device) if isinstance(x, torch.Tensor) else x for x in integers((4, 6, 8, 30), torch.float32))
    a = lm_head_unmask(hidden, lm_head, tokens, mask, 0.1, 0.0, backend="triton")
    strided = (hidden.mT.contiguous().mT, lm_head.T.contiguous().T, tokens.T.contiguous().T)
    b = lm_head_unmask(*strided, mask, 0.1, 0.0, backend="triton")
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_operator_contract(device):
    hidden, lm_head, tokens, mask = (x.to(device) if isinstance(x, torch.Tensor) else x for x in integers((2, 3, 8, 30), torch.float32))
    row = torch.tensor([0.5, 0.5], device=device)
    rest = (tokens, mask, row, row, torch.ones(2, dtype=torch.int64, device=device), tokens == mask)
    torch.library.opcheck(torch.ops.llada_kernels_triton.lm_head_unmask, (hidden, lm_head, *rest))


def test_compiles_without_graph_breaks(device):
    hidden, lm_head, tokens, mask = (x.to(device) if isinstance(x, torch.Tensor) else x for x in integers((2, 5, 8, 30), torch.float32))
    hidden.requires_grad_()

    def step(x):
        return lm_head_unmask(x * 2, lm_head, tokens, mask, 0.2, 0.1, backend="triton")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden)
    assert all(torch.equal(a, b) for a, b in zip(compiled, step(hidden), strict=True))
