from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from llada_kernels.ops import threshold_unmask
from llada_kernels.ops.lm_head_unmask import BACKENDS, lm_head_unmask

from ..backends import cpu_backends

NAMES = cpu_backends(BACKENDS)
DTYPES = [torch.float32, torch.bfloat16]
#: rows, length, width, vocabulary: few and many positions, part and group boundaries, odd widths
SHAPES = [
    (1, 1, 8, 2),
    (1, 3, 7, 40),
    (1, 4, 64, 1025),
    (2, 5, 33, 1024),
    (1, 32, 48, 3000),
    (3, 33, 16, 2100),
    (1, 64, 5, 1023),
    (2, 0, 4, 9),
    (1, 300, 5, 1100),  # more positions than exist at once
    (2, 160, 33, 1025),
]


def integers(shape, dtype, seed=0):
    """Inputs of small integers, whose products every order of summation gives exactly; logits tie often."""
    generator = torch.Generator().manual_seed(seed)
    rows, length, width, vocab = shape
    hidden = torch.randint(-2, 3, (rows, length, width), generator=generator).to(dtype)
    lm_head = torch.randint(-2, 3, (vocab, width), generator=generator).to(dtype)
    mask = vocab // 3
    tokens = torch.randint(0, vocab, (rows, length), generator=generator)
    tokens[torch.rand(rows, length, generator=generator) < 0.6] = mask
    return hidden, lm_head, tokens, mask


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_products_give_the_results_of_threshold_unmask(backend, dtype, shape):
    hidden, lm_head, tokens, mask = integers(shape, dtype)
    rng = random.Random(1)
    for scale in (1, 1 / 16):  # certain and uncertain positions; powers of two keep the products exact
        editable = rng.choice([None, torch.rand(shape[:2]) < 0.5])
        arguments = {"threshold": 0.3, "editing_threshold": [0.1] * shape[0], "min_unmask": 2, "editable": editable}
        result = lm_head_unmask(hidden * scale, lm_head, tokens, mask, **arguments, backend=backend)
        logits = ((hidden * scale).double() @ lm_head.double().T).to(dtype)
        expected = threshold_unmask(logits, tokens, mask, **arguments, backend="reference")
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("backend", NAMES)
def test_logits_are_rounded_to_the_dtype_of_hidden(backend):
    """257 and 256 are one bf16 number: the lower id wins, at the confidence of a tie. In fp32 they are two."""
    lm_head = torch.zeros(5, 2)
    lm_head[1], lm_head[3] = torch.tensor([256.0, 0.0]), torch.tensor([256.0, 1.0])
    hidden, tokens = torch.ones(1, 1, 2), torch.full((1, 1), 4)
    for dtype, token, confidence in ((torch.bfloat16, 1, 0.5), (torch.float32, 3, 0.7310586)):
        result = lm_head_unmask(hidden.to(dtype), lm_head.to(dtype), tokens, 4, 0.0, backend=backend)
        assert result.tokens.item() == token
        torch.testing.assert_close(result.confidence.item(), confidence, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [2, 40])
def test_real_numbers_agree_with_linear_up_to_rounding(dtype, length):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, length, 256, generator=generator).to(dtype)
    lm_head = (torch.randn(5000, 256, generator=generator) / 4).to(dtype)
    tokens = torch.full((2, length), 4999)
    result = lm_head_unmask(hidden, lm_head, tokens, 4999, 0.5, min_unmask=length, backend="native")
    logits = hidden.double() @ lm_head.double().T
    step = 2.0**-8 if dtype == torch.bfloat16 else 1e-5  # relative rounding of a logit, absolute error of a probability's logarithm: x 16
    logits[..., 4999] = -torch.inf
    top = logits.amax(-1)
    chosen = logits.gather(-1, result.tokens.unsqueeze(-1)).squeeze(-1)
    assert (top - chosen <= 2 * step * top.abs()).all()
    rounded = F.linear(hidden, lm_head).double()
    probability = rounded.softmax(-1).gather(-1, result.tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(result.confidence.double(), probability, rtol=64 * step, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_repeats_bitwise_on_any_number_of_threads(dtype):
    hidden, lm_head = torch.randn(2, 35, 50).to(dtype), torch.randn(7000, 50).to(dtype)
    tokens = torch.full((2, 35), 6999)
    seen, before = [], torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        seen.append(lm_head_unmask(hidden, lm_head, tokens, 6999, 0.01, backend="native"))
    torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(p, q) for p, q in zip(seen[0], other, strict=True))


def test_never_holds_the_logits():
    """Peak memory of a call in a fresh process, on one thread: far below the 82 MB of the logits."""
    script = r"""
import re, torch
from llada_kernels.ops import lm_head_unmask
torch.set_num_threads(1)
def peak():  # not ru_maxrss: a process inherits that of the one that starts it
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
def step(length, vocab):
    h, w, t = torch.randn(4, length, 8), torch.randn(vocab, 8), torch.zeros(4, length, dtype=torch.int64)
    lm_head_unmask(h, w, t, 0, 0.5, backend="native")
step(20, 50)
before = peak()
step(128, 40000)
print(peak() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
    assert grown < 10_000  # KiB


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("temperature", [1.3, [0.7, 0.0], [0.0, 0.0]])
def test_tokens_are_drawn_from_the_logits(backend, temperature):
    hidden, lm_head, tokens, mask = integers((2, 4, 8, 50), torch.float32)
    arguments = {"temperature": temperature, "top_p": 0.9, "seed": 3}
    result = lm_head_unmask(hidden.requires_grad_(), lm_head, tokens, mask, 0.1, **arguments, backend=backend)
    expected = threshold_unmask(F.linear(hidden, lm_head), tokens, mask, 0.1, **arguments, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize(("value", "got"), [(torch.nan, "NaN"), (torch.inf, r"\+inf"), (-torch.inf, "no finite logit besides")])
def test_bad_logits_are_named(backend, value, got):
    hidden, lm_head, tokens = torch.randn(3, 4, 8), torch.zeros(40, 8), torch.full((3, 4), 7)
    lm_head[:, 0] = 1
    hidden[1, 2] = 0
    hidden[1, 2, 0] = value
    if value == -torch.inf:
        lm_head = lm_head[:, :1].contiguous()  # 0 * inf would be NaN
        hidden = hidden[..., :1].contiguous()
    elif value == torch.inf:
        lm_head, hidden = lm_head[:, :1].contiguous(), hidden[..., :1].contiguous()
    with pytest.raises(ValueError, match=f"logits: expected finite numbers, got {got}.* in row 1, position 2"):
        lm_head_unmask(hidden, lm_head, tokens, 7, 0.5, backend=backend)


@pytest.mark.parametrize("backend", NAMES)
def test_weights_of_ones_in_every_bit_are_nan(backend):
    hidden, lm_head, tokens = torch.randn(1, 3, 8), torch.randn(2000, 8), torch.full((1, 3), 7)
    lm_head.view(torch.int32)[1500] = -1
    with pytest.raises(ValueError, match="logits: expected finite numbers, got NaN.* in row 0, position 0"):
        lm_head_unmask(hidden, lm_head, tokens, 7, 0.5, backend=backend)


@pytest.mark.parametrize("backend", NAMES)
def test_non_contiguous_inputs(backend):
    hidden, lm_head, tokens, mask = integers((4, 6, 8, 30), torch.float32)
    editable = torch.rand(4, 6) < 0.5
    a = lm_head_unmask(hidden, lm_head, tokens, mask, 0.1, 0.0, editable=editable, backend=backend)
    strided = (hidden.mT.contiguous().mT, lm_head.T.contiguous().T, tokens.T.contiguous().T)
    b = lm_head_unmask(*strided, mask, 0.1, torch.zeros(8)[::2], editable=editable.T.contiguous().T, backend=backend)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_contract(dtype):
    hidden, lm_head, tokens, mask = integers((2, 3, 8, 30), dtype)
    row = torch.tensor([0.5, 0.5])
    rest = (tokens, mask, row, row, torch.ones(2, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool))
    torch.library.opcheck(torch.ops.llada_kernels.lm_head_unmask, (hidden, lm_head, *rest))


@pytest.mark.parametrize("backend", NAMES)
def test_compiles_without_graph_breaks(backend):
    hidden, lm_head, tokens, mask = integers((2, 5, 8, 30), torch.float32)
    hidden.requires_grad_()

    def step(x):
        return lm_head_unmask(x * 2, lm_head, tokens, mask, 0.2, 0.1, backend=backend)

    compiler = "inductor" if backend == "native" else "aot_eager"  # tracing is what can fail in the reference
    compiled = torch.compile(step, fullgraph=True, backend=compiler)(hidden)
    assert all(torch.equal(a, b) for a, b in zip(compiled, step(hidden), strict=True))
    with torch.inference_mode():
        assert torch.equal(step(hidden).tokens, compiled.tokens)


def test_errors():
    hidden, lm_head, tokens, mask = integers((2, 3, 8, 30), torch.float32)
    usual = {"hidden": hidden, "lm_head": lm_head, "tokens": tokens, "mask_token_id": mask, "threshold": 0.5}
    cases = [
        ({"hidden": hidden[0]}, r"hidden: expected 3 dimensions, got shape \(3, 8\)"),
        ({"hidden": hidden.long(), "lm_head": lm_head.long()}, "hidden: expected a floating dtype, got torch.int64"),
        ({"lm_head": lm_head[:, :7]}, r"lm_head: expected shape \(\*, 8\), got \(30, 7\)"),
        ({"lm_head": lm_head.double()}, "lm_head: expected dtype torch.float32"),
        ({"lm_head": lm_head[:1], "mask_token_id": 0}, "hidden: expected at least 2 ids in the vocabulary, got 1"),
        ({"tokens": tokens[:, :2]}, r"tokens: expected shape \(2, 3\), got \(2, 2\)"),
        ({"mask_token_id": 30}, r"mask_token_id: expected an id in \[0, 30\), got 30"),
        ({"threshold": 1.5}, r"threshold: expected numbers in \[0, 1\], got 1.5"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            lm_head_unmask(**(usual | arguments))
