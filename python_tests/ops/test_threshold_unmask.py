from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from llada_kernels.ops.threshold_unmask import BACKENDS, reference, threshold_unmask
from llada_kernels.ops.threshold_unmask.arguments import rule_arguments

from ..backends import cpu_backends, everywhere

NAMES = cpu_backends(BACKENDS)
DTYPES = [torch.float32, torch.bfloat16]


def uniform(seed, position, forward):
    """Philox4x32-10 (Salmon et al. 2011) in Python integers; 53 bits of its first two words."""
    low = 2**32 - 1
    counter = [position & low, (position >> 32) & low, forward & low, (forward >> 32) & low]
    key = [seed & low, (seed >> 32) & low]
    for _ in range(10):
        p, q = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [(q >> 32) ^ counter[1] ^ key[0], q & low, (p >> 32) ^ counter[3] ^ key[1], p & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return ((counter[0] << 21) | (counter[1] >> 11)) / 2**53


def choose(x, mask, temperature, top_k, top_p, u):
    """Chosen id and confidence for one position, x a list of numbers."""
    others = [i for i in range(len(x)) if i != mask]
    best = max(others, key=lambda i: (x[i], -i))
    weight = [math.exp((v - max(x)) / (temperature or 1)) for v in x]
    if temperature == 0:
        return best, weight[best] / math.fsum(weight)
    kept = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if top_k:
        kept = kept[:top_k]
    if top_p is not None and top_p < 1:
        reach, mass, n = top_p * math.fsum(weight[i] for i in kept), 0.0, 0
        while n < 1 or mass < reach:
            mass += weight[kept[n]]
            n += 1
        kept = kept[:n]
    drawable = [i for i in sorted(kept) if i != mask]
    if not drawable:
        return best, 0.0
    target, mass = u * math.fsum(weight[i] for i in drawable), 0.0
    for i in drawable:
        mass += weight[i]
        if mass > target:
            break
    return i, weight[i] / math.fsum(weight[j] for j in kept)


def expected(logits, tokens, mask, p):
    """Direct transcription of the rules; p: one dict of parameters per row. Returns tokens, confidence, counts as lists."""
    new, confidences, counts = [], [], []
    for r, row in enumerate(tokens.tolist()):
        q = p[r]
        chosen = [
            choose(x, mask, q["temperature"], q["top_k"], q["top_p"], uniform(q["seed"], q["positions"][i], q["forward_index"]))
            for i, x in enumerate(logits[r].tolist())
        ]
        masked = [i for i, t in enumerate(row) if t == mask]
        accepted = [i for i in masked if chosen[i][1] > q["threshold"]]
        if len(accepted) < q["min_unmask"]:
            accepted = sorted(masked, key=lambda i: (-chosen[i][1], i))[: q["min_unmask"]]
        edit = q["editing_threshold"]
        edited = [
            i
            for i, t in enumerate(row)
            if edit is not None and edit >= 0 and t != mask and q["editable"][i] and chosen[i][0] != t and chosen[i][1] > edit
        ]
        new.append([chosen[i][0] if i in accepted + edited else t for i, t in enumerate(row)])
        confidences.append([c for _, c in chosen])
        counts.append([len(accepted), len(edited)])
    return new, confidences, counts


def random_case(rng, vocab_choices=(2, 3, 17, 40, 65)):
    """Logits with ties, -inf, dominant masks; parameters per row or shared; the same as keyword arguments and as one dict per row."""
    rows, length, vocab = rng.randint(1, 4), rng.randint(1, 9), rng.choice(vocab_choices)
    logits = torch.randn(rows, length, vocab) * rng.choice([0, 0.3, 1, 4])
    if rng.random() < 0.3:
        logits = logits.round()
    mask = rng.randrange(vocab)
    if rng.random() < 0.2:
        logits[torch.rand(rows, length, vocab) < 0.3] = -torch.inf
        logits[..., (mask + 1) % vocab] = 0.5
    if rng.random() < 0.3:
        logits[..., mask] = logits.amax(-1) + rng.choice([0, 1, 6])
    tokens = torch.randint(0, vocab, (rows, length))
    tokens[torch.rand(rows, length) < 0.6] = mask
    draws = {
        "threshold": rng.random,
        "editing_threshold": lambda: rng.choice([0.0, rng.random()]),
        "min_unmask": lambda: rng.randint(0, 5),
        "temperature": lambda: rng.choice([0.0, 0.5, 1.0, 2.5]),
        "top_k": lambda: rng.randint(0, vocab + 1),
        "top_p": lambda: rng.choice([0.0, 0.3, 0.9, 1.0]),
        "seed": lambda: rng.randrange(2**63),
        "forward_index": lambda: rng.randint(0, 2**40),
    }
    arguments, per_row = {}, [{} for _ in range(rows)]
    for name, draw in draws.items():
        kind = rng.choice(["number", "tensor", "list"] + ["none"] * (name in ("editing_threshold", "top_k", "top_p")))
        values = [draw() for _ in range(rows)] if kind in ("tensor", "list") else [None if kind == "none" else draw()] * rows
        if name == "editing_threshold" and kind == "tensor":
            values[0] = -1.0
        if name in ("threshold", "editing_threshold"):  # compared in fp32
            values = [None if v is None else float(torch.tensor(v)) for v in values]
        dtype = torch.int64 if isinstance(values[0], int) else torch.float64
        arguments[name] = torch.tensor(values, dtype=dtype) if kind == "tensor" else values if kind == "list" else values[0]
        for q, v in zip(per_row, values, strict=True):
            q[name] = v
    editable = rng.choice([None, torch.rand(rows, length) < 0.5])
    positions = rng.choice([None, torch.randint(0, 2**40, (rows, length))])
    arguments |= {"editable": editable, "positions": positions}
    for r, q in enumerate(per_row):
        q["editable"] = [True] * length if editable is None else editable[r].tolist()
        q["positions"] = list(range(length)) if positions is None else positions[r].tolist()
    return logits, tokens, mask, arguments, per_row


@everywhere(BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_transcription(backend, device, dtype):
    rng = random.Random(1)
    for _ in range(8 if device == "emulated" else 120):
        logits, tokens, mask, arguments, per_row = random_case(rng)
        logits = logits.to(dtype)
        before = logits.clone(), tokens.clone()
        result = threshold_unmask(logits, tokens, mask, **arguments, backend=backend)
        new, confidence, counts = expected(logits, tokens, mask, per_row)
        assert result.tokens.tolist() == new
        assert result.counts.tolist() == counts
        torch.testing.assert_close(result.confidence, torch.tensor(confidence), atol=1e-6, rtol=1e-5)
        assert torch.equal(logits, before[0]) and torch.equal(tokens, before[1])


@everywhere(BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_the_reference(backend, device, dtype):
    rng = random.Random(2)
    for i in range(12 if device == "emulated" else 250 if backend == "native" else 1):
        logits, tokens, mask, arguments, _ = random_case(rng, (2, 16, 31, 100, 3000))
        if i % 5 == 0:
            logits = logits * 20
        results = [threshold_unmask(logits.to(dtype), tokens, mask, **arguments, backend=name) for name in (backend, "reference")]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@everywhere(BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 1000, "top_p": 0.95, "seed": 5}])
def test_the_real_vocabulary(backend, device, dtype, sampling):
    """V = 157184: bitwise equal backends, and confidence within fp32 of the exact softmax."""
    logits, mask = (torch.randn(1, 3, 157184) * 3).to(dtype), 156895
    tokens = torch.full((1, 3), mask)
    results = [threshold_unmask(logits, tokens, mask, 0.5, min_unmask=3, **sampling, backend=name) for name in (backend, "reference")]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    if not sampling:
        exact = torch.softmax(logits.double(), -1).gather(-1, results[0].tokens.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(results[0].confidence.double(), exact, atol=0, rtol=1e-6)


@everywhere(BACKENDS)
def test_temperature_zero_takes_the_lowest_of_equal_logits_but_never_the_mask(backend, device):
    logits = torch.tensor([[[0.0, 2.0, 1.0, 2.0, 5.0], [3.0, 3.0, 3.0, 3.0, 3.0], [-1.0, -0.0, 0.0, -torch.inf, -torch.inf]]])
    result = threshold_unmask(logits, torch.full((1, 3), 4), 4, 0.0, backend=backend)
    assert result.tokens.tolist() == [[1, 0, 1]]
    probability = torch.softmax(logits.double(), -1)[0, [0, 1, 2], [1, 0, 1]]  # the mask token counts in the denominator
    torch.testing.assert_close(result.confidence[0].double(), probability, atol=0, rtol=5e-7)


@everywhere(BACKENDS)
def test_masked_positions(backend, device):
    """More confident than a strict threshold, else the min_unmask most confident, the lowest position first among equals."""
    p = torch.tensor([0.5, 0.8, 0.5, 0.9, 0.5])
    logits = torch.stack((p.log(), (1 - p).log(), torch.full((5,), -torch.inf)), -1)[None].float()
    tokens = torch.tensor([[2, 2, 2, 1, 2]])

    def accepted(threshold, min_unmask):
        result = threshold_unmask(logits, tokens, 2, threshold, min_unmask=min_unmask, backend=backend)
        changed = (result.tokens != tokens).nonzero()[:, 1].tolist()
        assert result.counts.tolist() == [[len(changed), 0]]
        return changed

    assert accepted(0.7, 1) == [1]
    assert accepted(0.4, 1) == [0, 1, 2, 4]
    assert accepted(0.5, 1) == [1]  # 0.5 is not above 0.5
    assert accepted(0.5, 2) == [0, 1]
    assert accepted(0.5, 3) == [0, 1, 2]
    assert accepted(0.95, 99) == [0, 1, 2, 4]
    assert accepted(0.95, 0) == []
    assert accepted(1.0, 1) == [1]


@everywhere(BACKENDS)
def test_editing(backend, device):
    """None is off; 0.0 edits every changed token; only editable positions that were not masked before the call."""
    logits = torch.full((1, 4, 4), -2.0)
    logits[0, :, 1] = torch.tensor([1.0, 3.0, 0.5, 4.0])
    logits[0, 2, 3] = 60.0  # the mask token itself is by far the most probable: token 1 is chosen, at a confidence above 0
    tokens = torch.tensor([[0, 1, 0, 3]])

    def edited(**arguments):
        result = threshold_unmask(logits, tokens, 3, 0.5, backend=backend, **arguments)
        assert result.tokens[0, 3] == 1  # masked: unmasked in any case
        assert result.counts.tolist() == [[1, int((result.tokens != tokens).sum()) - 1]]
        return (result.tokens != tokens)[0, :3].nonzero().flatten().tolist()

    assert edited() == []
    assert edited(editing_threshold=0.0) == [0, 2]
    assert edited(editing_threshold=0.5) == [0]
    assert edited(editing_threshold=1.0) == []
    assert edited(editing_threshold=[-1.0]) == []
    assert edited(editing_threshold=0.0, editable=torch.tensor([[False, True, True, False]])) == [2]


@everywhere(BACKENDS)
def test_nothing_but_the_mask_token_kept(backend, device):
    logits = torch.tensor([[[1.0, 2.0, 9.0, 2.0]]])
    result = threshold_unmask(logits, torch.tensor([[2]]), 2, 0.0, temperature=1.0, top_k=1, seed=0, backend=backend)
    assert result.tokens.item() == 1 and result.confidence.item() == 0 and result.counts.tolist() == [[1, 0]]


@everywhere(BACKENDS)
def test_a_row_alone_equals_the_row_in_a_batch(backend, device):
    rng = random.Random(3)
    for _ in range(3 if device == "emulated" else 15):
        logits, tokens, mask, arguments, per_row = random_case(rng)
        together = threshold_unmask(logits, tokens, mask, **arguments, backend=backend)
        for r, own in enumerate(per_row):
            alone = {k: v for k, v in own.items() if k not in ("editable", "positions", "editing_threshold")}
            edit = None if own["editing_threshold"] is None else [own["editing_threshold"]]
            part = slice(r, r + 1)
            for k in ("editable", "positions"):
                alone[k] = None if arguments[k] is None else arguments[k][part]
            single = threshold_unmask(logits[part], tokens[part], mask, **alone, editing_threshold=edit, backend=backend)
            assert all(torch.equal(a, b[part]) for a, b in zip(single, together, strict=True))


@everywhere(BACKENDS)
def test_draws_depend_on_seed_position_and_forward_only(backend, device):
    logits, tokens = torch.zeros(1, 64, 50), torch.full((1, 64), 49)
    arguments = {"mask_token_id": 49, "threshold": 0.0, "temperature": 1.0, "backend": backend}
    full = threshold_unmask(logits, tokens, seed=7, **arguments).tokens
    assert (full != 49).all()
    positions = torch.arange(20, 30)[None]
    part = threshold_unmask(logits[:, :10], tokens[:, :10], seed=7, positions=positions, **arguments).tokens
    assert torch.equal(part, full[:, 20:30])
    for other in ({"seed": 8}, {"seed": 7, "forward_index": 1}, {"seed": 7, "positions": torch.arange(64)[None] + 100}):
        assert (threshold_unmask(logits, tokens, **other, **arguments).tokens == full).float().mean() < 0.2


def test_without_a_seed_torch_decides():
    logits, tokens = torch.zeros(1, 32, 50), torch.full((1, 32), 49)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(threshold_unmask(logits, tokens, 49, 0.0, temperature=1.0).tokens)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    state = torch.get_rng_state()
    threshold_unmask(logits, tokens, 49, 0.0)
    assert torch.equal(torch.get_rng_state(), state)  # temperature 0 draws nothing


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.9}])
def test_distribution_of_the_draws(filters):
    """Chi-square of 20000 draws against the filtered distribution without the mask token (99.9 % quantile)."""
    row, mask, temperature = torch.tensor([1.0, 0.2, 2.0, -1.0, 1.5, 0.0, 0.7, 1.2]), 4, 0.7
    draws = threshold_unmask(row.expand(1, 20000, 8), torch.full((1, 20000), mask), mask, 0.0, temperature=temperature, seed=11, **filters)
    weight = torch.softmax(row.double() / temperature, 0)
    kept = weight.sort(descending=True).indices[: filters.get("top_k", 8)]
    if "top_p" in filters:
        cumulative = weight[kept].cumsum(0) / weight[kept].sum()
        kept = kept[: int((cumulative < filters["top_p"]).sum()) + 1]
    probability = torch.zeros_like(weight)
    probability[kept] = weight[kept] / weight[kept].sum()
    torch.testing.assert_close(draws.confidence.double(), probability[draws.tokens], atol=1e-6, rtol=1e-6)
    probability[mask] = 0
    probability /= probability.sum()
    counts = torch.bincount(draws.tokens[0], minlength=8).double()
    assert (counts[probability == 0] == 0).all()
    drawn = probability > 0
    statistic = ((counts - 20000 * probability)[drawn] ** 2 / (20000 * probability[drawn])).sum()
    quantile = {2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5}[int(drawn.sum()) - 1]
    assert statistic < quantile


def test_philox_known_answers():
    """The vectors of the Random123 distribution: words 0 and 1."""
    vectors = [  # counter (4 words), key (2 words), first two words
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB)),
    ]

    def number(low, high):
        value = high << 32 | low
        return value - 2**64 if value >= 2**63 else value

    for c, k, (first, second) in vectors:
        arguments = number(*k), number(*c[:2]), number(*c[2:])
        answer = ((first << 21) | (second >> 11)) / 2**53
        assert uniform(*arguments) == answer
        assert reference.philox_uniform(*(torch.tensor([a]) for a in arguments)).item() == answer


def test_reference_fuses_multiply_and_add():
    """Against fractions: no other fp32 number is nearer, and of two as near the even one is taken."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3000, generator=generator)
    b *= (8 * torch.randn(3000, generator=generator)).exp()  # small products, of which fp64 keeps less than all beside c
    # 1 + 3 * 2**-24 - 3 * 2**-56 fp64 rounds onto the middle of two fp32 numbers, of which the upper one is even
    a = torch.cat((a, 2.0**-24 * torch.tensor([1 + 2.0**-16, -1 - 2.0**-16, 1.0, 1.0])))
    b = torch.cat((b, torch.tensor([3 - 3 * 2.0**-16, 3 - 3 * 2.0**-16, 1.0, 3.0])))
    for c in (1.0, -1.0, 0.693146998882293701171875):
        for x, y, total in zip(a.tolist(), b.tolist(), reference.fused_multiply_add(a, b, c), strict=True):
            exact = Fraction(x) * Fraction(y) + Fraction(c)
            near = [total, *(torch.nextafter(total, torch.tensor(side)) for side in (-torch.inf, torch.inf))]
            even = [int(n.view(torch.int32)) % 2 for n in near]
            assert min(zip([abs(Fraction(n.item()) - exact) for n in near], even, range(3), strict=True))[2] == 0
    inf, one = torch.tensor([torch.inf, -torch.inf, 3e38, -3e38]), torch.full((4,), 3.0)
    assert reference.fused_multiply_add(inf, one, 1.0).tolist() == [torch.inf, -torch.inf] * 2
    assert reference.fused_multiply_add(one, one, -torch.inf).tolist() == [-torch.inf] * 4


def test_exponential_and_grid():
    z = -torch.cat((torch.zeros(1), torch.rand(10000) * 63)).double()
    torch.testing.assert_close(reference.exponential(z), z.exp(), atol=0, rtol=3e-14)
    assert reference.exponential(torch.tensor([-torch.inf, -1e300], dtype=torch.float64)).max() < 1e-27
    z = z.float()
    error = (reference.exponential32(z).double() / z.double().exp() - 1).abs()[z > -55]
    assert (error <= 2e-7 * (1 - z[z > -55] / 8)).all()
    one, least, below = reference.exponential32(torch.tensor([0.0, -55.0, -torch.inf])).tolist()
    assert one == 1 and least == below
    assert reference.exponential32(torch.tensor([torch.nan])).isnan().all()
    weight = reference.to_grid(torch.rand(157184, dtype=torch.float64), 157184)
    sums = [weight.sum(), weight.flip(0).cumsum(0)[-1], weight[torch.randperm(157184)].view(64, -1).sum(1).sum()]
    assert sums[0] == sums[1] == sums[2] == math.fsum(weight.tolist())


def test_numbers_become_tensors_once():
    """Calls share them; what equals a number that was seen is still checked."""
    logits, tokens = torch.randn(2, 3, 9), torch.zeros(2, 3, dtype=torch.int64)

    def rules(x, threshold, least, temperature=0.0):
        return rule_arguments("logits", x, 9, tokens, 8, threshold, 0.25, least, temperature, None, None, 7, None, None, 3)

    with torch.inference_mode():
        first = rules(logits, 0.5, 1)
    for name, value in rules(logits, 0.5, 1)._asdict().items():
        assert value is getattr(first, name), name
    assert first.threshold.tolist() == [0.5, 0.5] and not first.threshold.is_inference()
    thresholds = torch.tensor([0.5, 0.5])
    assert rules(logits, thresholds, 1).threshold.tolist() == [0.5, 0.5]
    thresholds[1] = 0.75
    assert rules(logits, thresholds, 1).threshold.tolist() == [0.5, 0.75]
    with pytest.raises(TypeError, match="min_unmask: expected a number or one per row, got bool"):
        rules(logits, 0.5, True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = rules(mode.from_tensor(logits), 0.5, 2)
        rules(logits, 0.5, 3)
    assert isinstance(fake.min_unmask, FakeTensor)
    assert not any(isinstance(rules(logits, 0.5, least).min_unmask, FakeTensor) for least in (2, 3))


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize(("value", "got"), [(torch.nan, "NaN"), (torch.inf, r"\+inf"), (-torch.inf, "no finite logit besides")])
def test_bad_logits_are_named(backend, value, got):
    logits, tokens = torch.randn(3, 4, 40), torch.full((3, 4), 7)
    if value == -torch.inf:
        logits[1, 2, torch.arange(40) != 7] = value
    else:
        logits[1, 2, 33] = value
    with pytest.raises(ValueError, match=f"logits: expected finite numbers, got {got}.* in row 1, position 2"):
        threshold_unmask(logits, tokens, 7, 0.5, backend=backend)
    if value != -torch.inf:
        logits = torch.randn(3, 4, 40)
        logits[1, 2, 7] = value  # the mask token's own logit
        with pytest.raises(ValueError, match="row 1, position 2"):
            threshold_unmask(logits, tokens, 7, 0.5, temperature=1.0, backend=backend)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("bits", [0x7FC00001, 0x7F800001, 0x7FFFFFFF, -1, -0x3FFFFF])
def test_every_nan_is_one(backend, bits):
    """Whatever its sign and its low bits: -1 is memory full of ones."""
    logits, tokens = torch.randn(3, 4, 40), torch.full((3, 4), 7)
    logits.view(torch.int32)[1, 2, 33] = bits
    with pytest.raises(ValueError, match="logits: expected finite numbers, got NaN.* in row 1, position 2"):
        threshold_unmask(logits, tokens, 7, 0.5, backend=backend)


def test_bad_logits_set_a_flag_where_raising_would_synchronise():
    logits, tokens = torch.randn(2, 4, 40), torch.full((2, 4), 7)
    logits[1, 2, 3] = torch.nan
    flagged = torch.compile(lambda x: threshold_unmask(x, tokens, 7, 0.0, backend="reference"), fullgraph=True, backend="aot_eager")(logits)
    assert flagged.counts.tolist() == [[4, 0], [-1, -1]]
    assert (flagged.tokens[0] != 7).all() and (flagged.tokens[1] == 7).all()


def test_same_bits_for_any_number_of_threads():
    logits, tokens = torch.randn(4, 16, 500), torch.full((4, 16), 3)
    seen, before = [], torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        seen.append(threshold_unmask(logits, tokens, 3, 0.01, temperature=[0.0, 1.0, 0.5, 2.0], top_p=0.9, seed=1, backend="native"))
    torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(p, q) for p, q in zip(seen[0], other, strict=True))


@everywhere(BACKENDS)
def test_non_contiguous_and_empty_inputs(backend, device):
    logits, tokens = torch.randn(30, 5, 3).transpose(0, 2), torch.full((5, 3), 4).T
    arguments = {"editable": torch.ones(5, 3, dtype=torch.bool).T, "positions": torch.arange(15).view(5, 3).T, "backend": backend}
    arguments |= {"temperature": torch.tensor([1.0, 9.0, 0.0, 9.0, 2.0, 9.0])[::2], "seed": 3}
    a = threshold_unmask(logits, tokens, 4, 0.2, 0.0, **arguments)
    arguments |= {k: arguments[k].contiguous() for k in ("editable", "positions", "temperature")}
    b = threshold_unmask(logits.contiguous(), tokens.contiguous(), 4, 0.2, 0.0, **arguments)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    for shape in ((0, 4), (2, 0)):
        result = threshold_unmask(torch.randn(*shape, 9), torch.zeros(shape, dtype=torch.int64), 4, 0.5, temperature=1.0, backend=backend)
        assert result.tokens.shape == result.confidence.shape == shape
        assert result.counts.shape == (shape[0], 2) and (result.counts == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_contract(dtype):
    row = torch.tensor([0.5, 0.5])
    arguments = (torch.randn(2, 3, 9, dtype=dtype), torch.full((2, 3), 4), 4, row, row, torch.ones(2, dtype=torch.int64))
    sampling = (row.double(), torch.ones(2, dtype=torch.int64), row.double(), *[torch.ones(2, dtype=torch.int64)])
    rest = (torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, dtype=torch.int64))
    torch.library.opcheck(torch.ops.llada_kernels.threshold_unmask, (*arguments, *sampling, *rest))
    torch.library.opcheck(torch.ops.llada_kernels.threshold_unmask, (*arguments, *[None] * 7))


@pytest.mark.parametrize("backend", NAMES)
def test_compiles_without_graph_breaks(backend):
    logits, tokens = torch.randn(2, 5, 30, requires_grad=True), torch.full((2, 5), 4)
    temperature = torch.tensor([0.0, 1.3])

    def step(x):
        return threshold_unmask(x * 2, tokens, 4, 0.2, 0.1, temperature=temperature, top_k=9, top_p=0.9, seed=3, backend=backend)

    compiler = "inductor" if backend == "native" else "aot_eager"  # tracing is what can fail in the reference
    compiled = torch.compile(step, fullgraph=True, backend=compiler)(logits)
    assert all(torch.equal(a, b) for a, b in zip(compiled, step(logits), strict=True))
    with torch.inference_mode():
        assert torch.equal(step(logits).tokens, compiled.tokens)


def test_errors():
    logits, tokens = torch.randn(2, 3, 9), torch.full((2, 3), 4)
    cases = [
        ({"threshold": 1.5}, r"threshold: expected numbers in \[0, 1\], got 1.5"),
        ({"threshold": float("nan")}, r"threshold: expected numbers in \[0, 1\], got nan"),
        ({"threshold": torch.tensor([0.5, -0.5])}, r"threshold: expected numbers in \[0, 1\], got -0.5"),
        ({"threshold": [0.5]}, r"threshold: expected one number per row \(2\), got 1"),
        ({"threshold": torch.ones(3)}, r"threshold: expected shape \(2,\), got \(3,\)"),
        ({"editing_threshold": -0.1}, r"editing_threshold: expected numbers in \[0.0, 1\], got -0.1"),
        ({"editing_threshold": 2.0}, r"editing_threshold: expected numbers in \[0.0, 1\], got 2.0"),
        ({"min_unmask": -1}, r"min_unmask: expected numbers at least 0 and below 2\^63, got -1"),
        ({"min_unmask": 1.5}, "min_unmask: expected integers, got 1.5"),
        ({"min_unmask": torch.ones(2)}, "min_unmask: expected an integer dtype, got torch.float32"),
        ({"temperature": -1.0}, "temperature: expected numbers at least 0 and finite, got -1.0"),
        ({"temperature": float("inf")}, "temperature: expected numbers at least 0 and finite, got inf"),
        ({"temperature": 1.0, "top_k": -1}, "top_k: expected numbers at least 0"),
        ({"temperature": 1.0, "top_p": 1.1}, r"top_p: expected numbers in \[0, 1\], got 1.1"),
        ({"temperature": 1.0, "seed": -1}, "seed: expected numbers at least 0"),
        ({"temperature": 1.0, "seed": 2**64}, r"seed: expected numbers at least 0 and below 2\^63"),
        ({"threshold": ["a", "b"]}, "threshold: expected numbers, got 'a'"),
        ({"mask_token_id": 9}, r"mask_token_id: expected an id in \[0, 9\), got 9"),
        ({"tokens": tokens[:, :2]}, r"tokens: expected shape \(2, 3\), got \(2, 2\)"),
        ({"tokens": tokens.int()}, "tokens: expected dtype int64, got int32"),
        ({"editable": torch.ones(2, 3)}, "editable: expected dtype bool, got float32"),
        ({"positions": torch.zeros(2, 4, dtype=torch.int64)}, r"positions: expected shape \(2, 3\), got \(2, 4\)"),
        ({"logits": logits[0]}, "logits: expected 3 dimensions"),
        ({"logits": logits.long()}, "logits: expected a floating dtype"),
    ]
    usual = {"logits": logits, "tokens": tokens, "mask_token_id": 4, "threshold": 0.5}
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            threshold_unmask(**(usual | arguments))
    for name, value, kind in (("threshold", "high", "str"), *((n, None, "NoneType") for n in ("threshold", "min_unmask", "temperature"))):
        with pytest.raises(TypeError, match=f"{name}: expected a number or one per row, got {kind}"):
            threshold_unmask(**(usual | {name: value}))
    with pytest.raises(TypeError, match="forward_index: expected a number or one per row, got NoneType"):
        threshold_unmask(**usual, temperature=1.0, forward_index=None)
    with pytest.raises(ValueError, match="native serves float32, bfloat16, got torch.float64"):
        threshold_unmask(**(usual | {"logits": logits.double()}), backend="native")


def test_the_mask_token_is_an_int():
    logits, tokens = torch.randn(1, 4, 50), torch.full((1, 4), 48)
    want = threshold_unmask(logits, tokens, 48, 0.5).tokens
    assert torch.equal(threshold_unmask(logits, tokens, torch.tensor(48), 0.5).tokens, want)
    assert torch.equal(threshold_unmask(logits, tokens, tokens.numpy()[0, 0], 0.5).tokens, want)
    for wrong, got in ((48.7, "float 48.7"), (48.0, "float 48.0"), (True, "bool True"), (None, "NoneType None"), ("48", "str '48'")):
        with pytest.raises(TypeError, match=f"mask_token_id: expected an int, got {got}"):
            threshold_unmask(logits, tokens, wrong, 0.5)
