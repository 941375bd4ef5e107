from __future__ import annotations

import pytest
import torch

from llada_kernels.ops.lm_loss import lm_loss

from ...ops.test_lm_loss import case, check_impossible_ids, check_values_and_gradients, run

ENTROPIES = [(None, 1.0), ("all", 2.0), ("correct", 0.5)]
CASES = [((tokens, width, vocab), *entropy) for tokens, width, vocab in ((1, 8, 2), (7, 17, 11), (140, 24, 70)) for entropy in ENTROPIES]
CASES += [((9, 40, 4200), "all", 0.5)]  # two splits of the vocabulary


def triton(*args):
    return lm_loss(*args, backend="triton")


@pytest.mark.parametrize(("shape", "entropy", "temperature"), CASES)
def test_values_and_gradients(dtype, device, shape, entropy, temperature):
    check_values_and_gradients(triton, [x.to(device) for x in case(shape, dtype)], entropy, temperature)


def test_skipped_positions_are_not_read(device):
    hidden, lm_head, targets, weights = (x.to(device) for x in case((9, 8, 20), torch.float32))
    incoming = [torch.ones((), device=device), torch.zeros(9, device=device), torch.zeros(9, device=device)]
    clean, _ = run(triton, hidden, lm_head, targets, weights, "all", 1.0, incoming)
    hidden[weights == 0], targets[weights == 0] = torch.nan, 10**9
    garbage, correct = run(triton, hidden, lm_head, targets, weights, "all", 1.0, incoming)
    assert all(torch.equal(a, b) for a, b in zip(clean, garbage, strict=True))
    assert not correct[weights == 0].any() and (garbage[1][weights == 0] == 0).all() and (garbage[3][weights == 0] == 0).all()


def test_impossible_ids(device):
    check_impossible_ids(triton, device)


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_predict(dtype, device, tokens):
    hidden, lm_head = (torch.randn(n, 8, dtype=dtype, device=device, requires_grad=True) for n in (tokens, 30))
    targets = torch.full((tokens,), -100, device=device)
    result = triton(hidden, lm_head, targets, torch.zeros(tokens, device=device), "correct")
    result.loss.backward()
    assert result.loss == 0 and (result.token_losses == 0).all() and (result.entropy == 0).all()
    assert (hidden.grad == 0).all() and (lm_head.grad == 0).all()


def test_known_values(device):
    """A uniform prediction: cross entropy and entropy are log V at any temperature, and the lowest id counts as the prediction."""
    hidden, lm_head = torch.zeros(3, 4, device=device), torch.randn(4100, 4, device=device)
    targets, weights = torch.tensor([0, 1, 4099], device=device), torch.tensor([2.0, 1.0, 1.0], device=device)
    result = triton(hidden, lm_head, targets, weights, "all", 0.3)
    log_v = torch.tensor(4100.0, device=device).log()
    torch.testing.assert_close(result.loss, 4 * log_v)
    torch.testing.assert_close(result.entropy, log_v.expand(3))
    assert result.correct.tolist() == [True, False, False]
    assert triton(hidden, lm_head, targets, weights).entropy is None


def test_large_logits_do_not_overflow(device):
    hidden, lm_head = torch.eye(3, device=device) * 1e4, torch.eye(3, device=device)
    result = triton(hidden, lm_head, torch.tensor([0, 1, 0], device=device), torch.ones(3, device=device), "all", 0.01)
    assert result.token_losses.tolist() == [0, 0, 1e4] and result.entropy.tolist() == [0, 0, 0]


@pytest.mark.parametrize("wanted", ["hidden", "lm_head"])
def test_one_gradient_alone(wanted, device):
    hidden, lm_head, targets, weights = (x.to(device) for x in case((20, 16, 100), torch.float32))
    incoming = [torch.ones((), device=device), torch.zeros(20, device=device)]
    both, _ = run(triton, hidden, lm_head, targets, weights, None, 1.0, incoming)
    x = (hidden if wanted == "hidden" else lm_head).clone().requires_grad_()
    triton(x if wanted == "hidden" else hidden, x if wanted == "lm_head" else lm_head, targets, weights).loss.backward()
    assert torch.equal(x.grad, both[2 if wanted == "hidden" else 3])


def test_strides_do_not_matter_and_bits_repeat(device):
    inputs = hidden, lm_head, targets, weights = [x.to(device) for x in case((20, 16, 30), torch.float32)]
    strided = (hidden.T.contiguous().T, lm_head.T.contiguous().T, targets.repeat(2, 1).T[:, 0], weights.repeat(2, 1).T[:, 0])
    grads = [torch.randn((), device=device), torch.randn((), device=device).expand(20), torch.randn(40, device=device)[::2]]
    a, b = (run(triton, *x, "all", 1.0, grads)[0] for x in (inputs, strided))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_weights_are_not_differentiated(device):
    hidden, lm_head, targets, weights = (x.to(device) for x in case((6, 8, 20), torch.float32))
    with pytest.raises(ValueError, match="triton does not differentiate weights"):
        triton(hidden, lm_head, targets, weights.requires_grad_())


def test_operator_contract(device):
    hidden, lm_head, targets, weights = (x.to(device) for x in case((6, 8, 20), torch.float32))
    args = (hidden.requires_grad_(), lm_head.requires_grad_(), targets, weights, 2, 0.5)
    torch.library.opcheck(torch.ops.llada_kernels_triton.lm_loss, args)


def test_compiles_without_graph_breaks(device):
    hidden, lm_head, targets, weights = (x.to(device) for x in case((6, 8, 20), torch.float32))
    a, b = hidden.clone().requires_grad_(), lm_head.clone().requires_grad_()

    def step(h, w):
        result = triton(h, w, targets, weights, "correct", 0.5)
        return result.loss + 2 * result.entropy.sum()

    torch.compile(step, fullgraph=True, backend="aot_eager")(a, b).backward()
    c, d = hidden.clone().requires_grad_(), lm_head.clone().requires_grad_()
    step(c, d).backward()
    torch.testing.assert_close(a.grad, c.grad)
    torch.testing.assert_close(b.grad, d.grad)
