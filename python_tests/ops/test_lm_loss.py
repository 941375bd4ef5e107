from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch

from llada_kernels.ops.lm_loss import BACKENDS, lm_loss
from llada_kernels.testing import assert_as_exact_as

from ..backends import cpu_backends

NAMES = cpu_backends(BACKENDS)
SHAPES = [(1, 8, 2), (7, 17, 11), (70, 64, 2100), (300, 40, 4500), (1100, 24, 70)]  # tokens, width, vocab
ENTROPIES = [(None, 1.0), ("all", 1.0), ("correct", 0.5), ("all", 2.0)]


def transcription(hidden, lm_head, targets, weights, entropy, temperature):
    """All logits at once, in the dtype of hidden: loss, token losses, entropies, correct."""
    logits = hidden @ lm_head.T
    kept = weights != 0
    losses = torch.nn.functional.cross_entropy(logits, targets.clamp(min=0), reduction="none") * kept
    log_p = torch.log_softmax(logits / temperature, dim=1)
    correct = (logits.argmax(1) == targets) & kept
    selected = kept if entropy == "all" else correct
    return (weights.to(losses.dtype) * losses).sum(), losses, -(log_p.exp() * log_p).sum(1) * selected, correct


def case(shape, dtype, skipped=0.4, seed=0):
    """Inputs in which half of the targets are the most probable token, with garbage where the weight is 0."""
    torch.manual_seed(seed)
    tokens, width, vocab = shape
    hidden, lm_head = torch.randn(tokens, width).to(dtype), (torch.randn(vocab, width) * 2 / width**0.5).to(dtype)
    targets, weights = torch.randint(0, vocab, (tokens,)), torch.rand(tokens) + 0.1
    targets[::2] = (hidden.double() @ lm_head.double().T).argmax(1)[::2]
    weights[torch.rand(tokens) < skipped] = 0
    weights[-1] = -0.5
    targets[weights == 0] = -100
    return hidden, lm_head, targets, weights


def run(op, hidden, lm_head, targets, weights, entropy, temperature, grads):
    """Outputs and the gradients of hidden and lm_head for incoming gradients of all outputs."""
    h, w = hidden.clone().requires_grad_(), lm_head.clone().requires_grad_()
    loss, losses, entropies, correct = op(h, w, targets, weights, entropy, temperature)
    outputs = [loss, losses] + ([entropies] if entropy else [])
    incoming = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=False)]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, (h, w), incoming)), correct


def check_values_and_gradients(ours, tensors, entropy, temperature):
    """Against the transcription in fp64, as exact as the transcription in the dtype of hidden. The tensors are those of :func:`case`."""
    hidden, lm_head, targets, weights = tensors
    grads = [torch.randn(()), torch.randn(len(hidden)), torch.randn(len(hidden))]
    settings = (targets, weights, entropy, temperature, [g.to(hidden.device) for g in grads])
    mine, my_correct = run(ours, hidden, lm_head, *settings)
    same, _ = run(transcription, hidden, lm_head, *settings)
    exact, correct = run(transcription, hidden.double(), lm_head.double(), *settings)
    assert torch.equal(my_correct, correct)
    names = ["loss", "token_losses"] + ["entropy"] * bool(entropy) + ["grad_hidden", "grad_lm_head"]
    for name, a, b, c in zip(names, mine, same, exact, strict=True):
        assert a.dtype == (hidden.dtype if name.startswith("grad") else torch.float32)
        assert_as_exact_as(a, b, c, floor=1e-6 if hidden.dtype == torch.float32 else 4e-6, name=name)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("entropy", "temperature"), ENTROPIES)
def test_values_and_gradients(backend, dtype, shape, entropy, temperature):
    check_values_and_gradients(partial(lm_loss, backend=backend), case(shape, dtype), entropy, temperature)


@pytest.mark.parametrize("backend", NAMES)
def test_skipped_positions_are_not_read(backend):
    hidden, lm_head, targets, weights = case((9, 8, 20), torch.float32)
    clean = run(
        lambda *a: lm_loss(*a, backend=backend),
        hidden,
        lm_head,
        targets,
        weights,
        "all",
        1.0,
        [torch.ones(()), torch.zeros(9), torch.zeros(9)],
    )
    hidden[weights == 0], targets[weights == 0] = torch.nan, 10**9
    h, w = hidden.clone().requires_grad_(), lm_head.clone().requires_grad_()
    result = lm_loss(h, w, targets, weights, "all", backend=backend)
    result.loss.backward()
    assert torch.equal(result.loss, clean[0][0]) and torch.equal(result.token_losses, clean[0][1])
    assert (result.token_losses[weights == 0] == 0).all() and (result.entropy[weights == 0] == 0).all()
    assert not result.correct[weights == 0].any()
    assert (h.grad[weights == 0] == 0).all() and h.grad.isfinite().all() and w.grad.isfinite().all()


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_predict(backend, dtype):
    for tokens in (0, 5):
        hidden, lm_head = torch.randn(tokens, 8, dtype=dtype).requires_grad_(), torch.randn(30, 8, dtype=dtype).requires_grad_()
        result = lm_loss(hidden, lm_head, torch.full((tokens,), -100), torch.zeros(tokens), "correct", backend=backend)
        result.loss.backward()
        assert result.loss == 0 and (result.token_losses == 0).all() and (result.entropy == 0).all()
        assert (hidden.grad == 0).all() and (lm_head.grad == 0).all()


@pytest.mark.parametrize("backend", NAMES)
def test_known_values(backend):
    """A uniform prediction: cross entropy and entropy are log V at any temperature, and the lowest id counts as the prediction."""
    hidden, lm_head = torch.zeros(3, 4), torch.randn(50, 4)
    targets, weights = torch.tensor([0, 1, 49]), torch.tensor([2.0, 1.0, 1.0])
    result = lm_loss(hidden, lm_head, targets, weights, "all", 0.3, backend=backend)
    log_v = torch.tensor(50.0).log()
    torch.testing.assert_close(result.loss, 4 * log_v)
    torch.testing.assert_close(result.entropy, log_v.expand(3))
    assert result.correct.tolist() == [True, False, False]
    only = lm_loss(hidden, lm_head, targets, weights, "correct", backend=backend)
    torch.testing.assert_close(only.entropy, torch.stack((log_v, log_v * 0, log_v * 0)))
    assert lm_loss(hidden, lm_head, targets, weights, backend=backend).entropy is None


@pytest.mark.parametrize("backend", NAMES)
def test_large_logits_do_not_overflow(backend):
    hidden, lm_head = torch.eye(3) * 1e4, torch.eye(3)
    result = lm_loss(hidden, lm_head, torch.tensor([0, 1, 0]), torch.ones(3), "all", 0.01, backend=backend)
    assert result.token_losses.tolist() == [0, 0, 1e4] and result.entropy.tolist() == [0, 0, 0]


def check_impossible_ids(loss, device):
    """Ids whose logit is -inf, whole tiles and splits of the vocabulary: as if they were not there."""
    for vocab, first, last in ((1000, 0, 300), (5000, 0, 2100), (5000, 2048, 5000)):
        hidden, lm_head = torch.rand(4, 8, device=device), torch.randn(vocab, 8, device=device)
        possible = torch.ones(vocab, dtype=torch.bool, device=device)
        possible[first:last] = False
        target = int(possible.nonzero()[3])
        log_p = (hidden.double() @ lm_head[possible].double().T).log_softmax(1)
        lm_head[~possible] = -torch.inf
        result = loss(hidden, lm_head, torch.full((4,), target, device=device), torch.ones(4, device=device), "all")
        torch.testing.assert_close(result.token_losses.double(), -log_p[:, 3], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result.entropy.double(), -(log_p.exp() * log_p).sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", NAMES)
def test_impossible_ids(backend):
    check_impossible_ids(lambda *args: lm_loss(*args, backend=backend), "cpu")


@pytest.mark.parametrize("wanted", ["hidden", "lm_head"])
def test_one_gradient_alone(wanted):
    hidden, lm_head, targets, weights = case((40, 16, 100), torch.float32)
    both = run(lambda *a: lm_loss(*a, backend="native"), hidden, lm_head, targets, weights, None, 1.0, [torch.ones(()), torch.zeros(40)])
    x = (hidden if wanted == "hidden" else lm_head).clone().requires_grad_()
    lm_loss(x if wanted == "hidden" else hidden, x if wanted == "lm_head" else lm_head, targets, weights, backend="native").loss.backward()
    assert torch.equal(x.grad, both[0][2 if wanted == "hidden" else 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(dtype):
    hidden, lm_head, targets, weights = case((1100, 24, 2500), dtype)
    grads = [torch.randn(()), torch.randn(1100), torch.randn(1100)]
    seen, before = [], torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        seen.append(run(lambda *a: lm_loss(*a, backend="native"), hidden, lm_head, targets, weights, "correct", 0.5, grads)[0])
    torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(p, q) for p, q in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("backend", NAMES)
def test_non_contiguous_inputs(backend):
    hidden, lm_head, targets, weights = case((20, 16, 30), torch.float32)
    strided = (hidden.T.contiguous().T, lm_head.T.contiguous().T, targets.repeat(2, 1).T[:, 0], weights.repeat(2, 1).T[:, 0])
    grads = [torch.randn(()), torch.randn(()).expand(20), torch.randn(40)[::2]]
    a, b = (
        run(lambda *x: lm_loss(*x, backend=backend), *inputs, "all", 1.0, grads)[0]
        for inputs in ((hidden, lm_head, targets, weights), strided)
    )
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("entropy", [None, "all", "correct"])
def test_gradcheck(entropy):
    hidden, lm_head, targets, weights = case((5, 4, 9), torch.float64)
    weights = weights.double().requires_grad_()

    def op(h, w, g):
        loss, losses, entropies, _ = lm_loss(h, w, targets, g, entropy, 0.7, backend="reference")
        return (loss, losses) if entropy is None else (loss, losses, entropies)

    with torch.no_grad():
        weights[weights == 0] = 0.2  # a step away from 0 would change which positions are skipped
        targets[targets < 0] = 3
    assert torch.autograd.gradcheck(op, (hidden.requires_grad_(), lm_head.requires_grad_(), weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy_of", [0, 2])
def test_operator_contract(dtype, entropy_of):
    hidden, lm_head, targets, weights = case((6, 8, 20), dtype)
    args = (hidden.requires_grad_(), lm_head.requires_grad_(), targets, weights, entropy_of, 0.5)
    torch.library.opcheck(torch.ops.llada_kernels.lm_loss, args)


@pytest.mark.parametrize("backend", NAMES)
def test_compiles_without_graph_breaks(backend):
    hidden, lm_head, targets, weights = case((6, 8, 20), torch.float32)
    a, b = hidden.clone().requires_grad_(), lm_head.clone().requires_grad_()

    def step(h, w):
        result = lm_loss(h, w, targets, weights, "correct", 0.5, backend=backend)
        return result.loss + 2 * result.entropy.sum()

    compiler = "inductor" if backend == "native" else "aot_eager"  # tracing is what can fail in the reference
    torch.compile(step, fullgraph=True, backend=compiler)(a, b).backward()
    c, d = hidden.clone().requires_grad_(), lm_head.clone().requires_grad_()
    step(c, d).backward()
    torch.testing.assert_close(a.grad, c.grad)
    torch.testing.assert_close(b.grad, d.grad)


def test_never_holds_the_logits():
    """Peak memory of forward and backward in a fresh process: far below the 320 MB of the logits."""
    script = r"""
import re, torch
from llada_kernels.ops import lm_loss
def peak():  # not ru_maxrss: a process inherits that of the one that starts it
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
def step(tokens, vocab):
    h, w = torch.randn(tokens, 8).requires_grad_(), torch.randn(vocab, 8).requires_grad_()
    r = lm_loss(h, w, torch.randint(0, vocab, (tokens,)), torch.ones(tokens), "all", backend="native")
    (r.loss + r.entropy.sum()).backward()
step(10, 50)
before = peak()
step(2000, 40000)
print(peak() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
    assert grown < 40_000  # KiB


def test_errors():
    hidden, lm_head, targets, weights = case((6, 8, 20), torch.float32, skipped=0.0)
    for backend in NAMES:
        wrong = targets.clone()
        wrong[3] = 20
        with pytest.raises(ValueError, match=r"targets: expected ids in \[0, 20\) where the weight is not 0, got 20 at position 3"):
            lm_loss(hidden, lm_head, wrong, weights, backend=backend)
    with pytest.raises(ValueError, match=r"lm_head: expected shape \(\*, 8\), got \(20, 7\)"):
        lm_loss(hidden, lm_head[:, :7], targets, weights)
    with pytest.raises(ValueError, match=r"targets: expected shape \(6,\), got \(5,\)"):
        lm_loss(hidden, lm_head, targets[:5], weights)
    with pytest.raises(ValueError, match="targets: expected dtype int64, got int32"):
        lm_loss(hidden, lm_head, targets.int(), weights)
    with pytest.raises(ValueError, match="weights: expected dtype float32, got float64"):
        lm_loss(hidden, lm_head, targets, weights.double())
    with pytest.raises(ValueError, match="entropy: expected None, 'all' or 'correct', got 'some'"):
        lm_loss(hidden, lm_head, targets, weights, "some")
    with pytest.raises(ValueError, match="entropy_temperature: expected a finite number above 0, got 0"):
        lm_loss(hidden, lm_head, targets, weights, "all", 0)
    with pytest.raises(ValueError, match="native does not differentiate weights"):
        lm_loss(hidden, lm_head, targets, weights.requires_grad_(), backend="native")
