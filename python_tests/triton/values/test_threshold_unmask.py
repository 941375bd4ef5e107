from __future__ import annotations

import random

import pytest
import torch

from llada_kernels.ops.threshold_unmask import threshold_unmask

from ...ops.test_threshold_unmask import random_case


def both(logits, tokens, mask, *args, device, **kwargs):
    """By the reference on a CPU and by Triton on the device, which must agree to the bit."""
    expected = threshold_unmask(logits, tokens, mask, *args, **kwargs, backend="reference")
    there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    result = threshold_unmask(logits.to(device), tokens.to(device), mask, *args, **there, backend="triton")
    for name, ours, theirs in zip(expected._fields, result, expected, strict=True):
        assert torch.equal(ours.cpu(), theirs), name
    return expected


@pytest.mark.parametrize("vocab", [2, 65, 1024, 1025, 3000])
def test_is_bitwise_the_reference(vocab, dtype, device):
    rng = random.Random(vocab)
    for scale in (1, 20):
        logits, tokens, mask, arguments, _ = random_case(rng, (vocab,))
        arguments["temperature"] = 0.0
        both((logits * scale).to(dtype), tokens, mask, **arguments, device=device)


def test_many_parts(dtype, device):
    """More parts than the second kernel combines at once; every logit ties with its neighbours."""
    logits = torch.randn(1, 2, 50).to(dtype).repeat_interleave(700, 2)[..., :33001]
    logits[0, 1, 32999] = 40
    result = both(logits, torch.full((1, 2), 33000), 33000, 0.9, device=device)
    assert result.tokens.tolist() == [[33000, 32999]]


def test_many_positions(device):
    """More positions than the second kernel takes at once: the most confident ones of all are found, the first among equals."""
    logits, tokens = torch.randn(1, 35, 9), torch.randint(0, 5, (1, 35))
    logits[0, [2, 20, 33]] = torch.tensor([0.0, 2, 0, 0, 0, 0, 0, 0, 0])
    logits[0, 34, 6] = 9
    tokens[0, [2, 3, 20, 33, 34]] = 8
    for threshold, least, unmasked in ((0.9, 1, 1), (0.9, 3, 3), (1.0, 99, 5)):
        result = both(logits, tokens, 8, threshold, 0.3, least, device=device)
        assert result.counts[0, 0] == unmasked and result.counts[0, 1] > 0


def test_bad_logits_mark_the_row_and_no_other(dtype, device):
    logits, tokens = torch.randn(5, 3, 1100).to(dtype), torch.full((5, 3), 7)
    expected = threshold_unmask(logits, tokens, 7, 0.0, backend="reference")
    logits[0, 1, 1050], logits[1, 2, 5], logits[2, 0, 7] = torch.nan, torch.inf, torch.nan  # the last is the mask token's
    logits[3, 1] = -torch.inf
    logits[3, 1, 7] = 1
    result = threshold_unmask(logits.to(device), tokens.to(device), 7, 0.0, backend="triton")
    assert result.counts.tolist() == [[-1, -1]] * 4 + expected.counts[4:].tolist()
    assert torch.equal(result.tokens[:4].cpu(), tokens[:4]) and torch.equal(result.tokens[4].cpu(), expected.tokens[4])
    bad = torch.zeros(5, 3, dtype=torch.bool)
    bad[0, 1] = bad[1, 2] = bad[2, 0] = bad[3, 1] = True
    assert torch.equal(result.confidence.isnan().cpu(), bad)
    assert torch.equal(result.confidence.cpu()[~bad], expected.confidence[~bad])


def test_part_without_a_finite_logit(dtype, device):
    logits = torch.full((1, 2, 2100), -torch.inf, dtype=dtype)
    logits[0, 0, 2050], logits[0, 1, 3], logits[0, 1, 1500] = -5, 1, 1
    result = both(logits, torch.full((1, 2), 1500), 1500, 0.4, device=device)
    assert result.tokens.tolist() == [[2050, 3]]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (1, 1)])
def test_few_positions(shape, device):
    logits = torch.randn(*shape, 9)
    both(logits, torch.full(shape, 4), 4, 0.5, 0.1, device=device)


def test_strides_do_not_matter(device):
    logits, tokens = torch.randn(30, 5, 3).transpose(0, 2), torch.full((5, 3), 4).T
    least = torch.arange(6)[::2]
    both(logits, tokens, 4, 0.2, 0.0, min_unmask=least, editable=torch.ones(5, 3, dtype=torch.bool).T, device=device)


def test_draws_are_left_to_another_backend(device):
    logits, tokens = torch.randn(1, 2, 9, device=device), torch.zeros(1, 2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="triton draws no tokens"):
        threshold_unmask(logits, tokens, 4, 0.5, temperature=1.0, backend="triton")


def test_operator_contract(device):
    row, tokens = torch.tensor([0.5, 0.5], device=device), torch.full((2, 3), 4, device=device)
    arguments = (torch.randn(2, 3, 9, device=device), tokens, 4, row, row, torch.ones(2, dtype=torch.int64, device=device), tokens == 4)
    torch.library.opcheck(torch.ops.llada_kernels_triton.threshold_unmask, arguments)


def test_compiles_without_graph_breaks(device):
    logits, tokens = torch.randn(2, 5, 30, device=device, requires_grad=True), torch.full((2, 5), 4, device=device)

    def step(x):
        return threshold_unmask(x * 2, tokens, 4, 0.2, 0.1, backend="triton")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(logits)
    assert all(torch.equal(a, b) for a, b in zip(compiled, step(logits), strict=True))
